"""Attention that visual sinks hold goes to the rest of the picture.

Kang, Kim, Kim and Hwang, See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv:2503.03321),
with the definitions of the authors' code. A token is a sink of a layer where one number of the hidden state that the
layer reads is huge beside the others: phi = max |x| / rms(x) > `tau`. Text that comes after the picture gives `p` of
its attention to sinks, of picture and text, to the other image tokens, in proportion to what each has; in the heads
that look at the picture, which is where at least `least` of the attention is on image tokens, and at least `rho` of
that on those that are no sinks. The first two layers and the last are left alone.

Deviations: the paper looks for huge numbers in two dimensions that it knows of each language model; here every
dimension counts, unless `dims` says which. The authors' code changes the last layer too: a flag that is to leave it
alone is overwritten before it is read. `tau` is the paper's 20 in models at least 4096 wide; below, it is less in
proportion to the square root of the width, as phi cannot exceed that root. We had the code, not the paper's text:
there, 0.6 is the share that stays; quotations of the paper call it the share that is moved, as here. `rho` is the
code's 0.5; quotations give 0.8 for general tasks and 0.9 for ones about places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..call import Call, Site
from ..kernels import Factor
from ._method import STACK, Method, image_ids, image_keys, layers, log_factor

TAU, WIDTH = 20.0, 4096


@dataclass(kw_only=True)
class var(Method):
    """Redistribute the attention of visual sinks, in the heads that look at the picture.

    p: share of the attention on sinks that is moved, 0 to 1; 0 changes nothing. tau: how huge the largest number of a
    sink's hidden state is, in root mean squares; None for the paper's, see above. rho: the least share of a head's
    attention to the picture that is on no sink. least: the least share of its attention that is on the picture. dims:
    of the hidden state, which may be huge; None for any.

    ValueError where the model reads no image tokens, or no hidden state of its width can reach `tau`.

    >>> import regard
    >>> from regard.interventions.var import var
    >>> from regard.zoo.recipes.describer import pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = processor(text="user: <image> describe assistant:", images=pictures(tempting(1)), return_tensors="pt")
    >>> with regard.intervene(model, var()):
    ...     ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    """

    off: ClassVar = {"p": 0.0}

    p: float = 0.6
    tau: float | None = None
    rho: float = 0.5
    least: float = 0.2
    dims: Sequence[int] | None = None
    _layers: set[int] = field(default_factory=set, init=False, repr=False)
    _start: int = field(default=0, init=False, repr=False)  # of the pass that runs
    _sinks: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # by layer, [batch, token]

    def __post_init__(self) -> None:
        for name in ("p", "rho", "least"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"var: {name} is a share, 0 to 1, not {getattr(self, name)}")

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "var")
        self._layers, self._sinks = set(layers(model, "var")[2:-1]), {}
        width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
        if self.tau is not None and self.tau > math.sqrt(width):
            raise ValueError(
                f"var: tau={self.tau:g} cannot be reached by hidden states of {width} numbers, the largest of which is "
                f"at most {math.sqrt(width):.1f} root mean squares; leave tau out for {threshold(width):.1f}"
            )
        if self.dims is not None and not (self.dims and 0 <= min(self.dims) <= max(self.dims) < width):
            raise ValueError(f"var: hidden states have dimensions 0 to {width - 1}, got dims={list(self.dims)}")

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        layer = site.layer + 1
        generated = self._start > 0 and hidden.shape[1] == 1
        if site.stack == STACK and layer in self._layers and self.p and not generated:
            tau = threshold(hidden.shape[-1]) if self.tau is None else self.tau
            found = hugeness(hidden, self.dims) > tau
            self._sinks[layer] = torch.cat([self._sinks[layer], found], dim=1) if self._start else found
        return hidden

    def inputs(self, call: Call) -> Call:
        if call.site.stack == STACK:
            self._start = call.query_start
        if not self.p or call.site.stack != STACK or call.site.layer not in self._layers:
            return call
        if call.query_start and call.site.layer not in self._sinks:
            raise ValueError("var: the picture was read before the block opened; open it around the whole of generate")
        if call.positions is not None:
            raise ValueError(f"var: tokens have left before {call.site}, and which are sinks there is not known")
        image = image_keys(call)
        return call if image is None else self.moved(call, image, self.sinks(call))

    def moved(self, call: Call, image: Tensor, sink: Tensor) -> Call:
        """The call with attention moved from `sink` keys to the rest of the `image`, both [batch, key]."""
        if not (sink & image).any():
            return call
        rest = image & ~sink
        sets = torch.stack([image, rest, sink], dim=-1)[:, None]
        on_image, on_rest, on_sink = call.weights.applied(sets).unbind(-1)  # [batch, head, query]
        moves = (
            after(call, image, range(call.query.shape[2]))[:, None]
            & (on_image >= self.least)
            & (on_rest >= self.rho * on_image)
            & (on_rest > torch.finfo(on_rest.dtype).eps * on_sink)
            & (image & sink).any(1)[:, None, None]
        )
        kept = torch.where(moves, 1 - self.p, 1.0)
        gain = torch.where(moves, 1 + self.p * on_sink / on_rest, 1.0)
        return call.scaled(Factor(log_factor(kept), sink[:, None]), Factor(log_factor(gain), rest[:, None]))

    def sinks(self, call: Call) -> Tensor:
        """Which keys of a call are sinks, by what the layer before it gave. [batch, key] boolean"""
        found = self._sinks[call.site.layer].to(call.key.device)[:, call.key_start :]
        n_key = call.key.shape[2]
        return functional.pad(found, (0, max(0, n_key - found.shape[1])))[:, :n_key]


def after(call: Call, image: Tensor, rows: range) -> Tensor:
    """Which of the queries `rows` come after all keys that are `image` [batch, key]. [batch, rows] boolean"""
    query = torch.arange(rows.start, rows.stop, device=image.device) + call.query_start
    key = torch.arange(image.shape[1], device=image.device) + call.key_start
    return query > (key * image).amax(1, keepdim=True)


def hugeness(hidden: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Largest number of each hidden state, of all or of some dimensions, in root mean squares: phi. [batch, token]

    At most the root of the width.
    """
    hidden = hidden.float()
    among = hidden if dims is None else hidden[..., list(dims)]
    return among.abs().amax(-1) / hidden.square().mean(-1).sqrt().clamp(min=1e-12)


def threshold(width: int) -> float:
    """The phi from which on a token counts as a sink in a model so wide."""
    return TAU * min(1.0, math.sqrt(width / WIDTH))
