"""The residual stream of a language model: what its heads write to it, and what the unembedding reads from it.

Architectures name these modules in as many ways as there are. Here they are found by what flows through them in one
forward pass: heads' outputs, side by side, into one linear map; a layer's output, which is its input plus what that map
gives plus one more term; the last layer's output into a norm, and the norm's output into the unembedding. Where
something else stands in between (a norm after the attention, a gate, a multiplier), there is no such reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .call import Call, Site
from .recording import statistic
from .seam import record
from .sites import find

_TOLERANCE = 1e-4  # of the largest value, for two tensors to count as one


@dataclass
class Stream:
    """What was found. `missing` says what was not, and why; then there are no logits."""

    writes: dict[tuple[str, int], nn.Module] = field(default_factory=dict)  # by stack and layer
    norm: nn.Module | None = None
    unembed: nn.Module | None = None
    residual: Tensor | None = None  # what the norm was given [batch, token, dim]
    missing: str = ""

    def holds(self, site: Site) -> bool:
        """Whether what this site's heads write reaches the unembedding as it is."""
        return not self.missing and (site.stack, site.layer) in self.writes

    def written(self, site: Site, head: int, output: Tensor) -> Tensor:
        """What one head adds to the stream, where its output is `output` [..., dim]. [..., dim of the stream]"""
        wide = output.new_zeros(*output.shape[:-1], site.heads, output.shape[-1])
        wide[..., head, :] = output
        wide = wide.flatten(-2)
        write = self.writes[site.stack, site.layer]
        return write(wide) - write(torch.zeros_like(wide))

    def out(self, residual: Tensor) -> Tensor:
        """Logits where the stream ends so: the norm, then the unembedding. [..., vocabulary]"""
        if self.norm is None or self.unembed is None:
            raise ValueError(f"no logits: {self.missing}")
        return self.unembed(self.norm(residual)).float()

    def alone(self, written: Tensor) -> Tensor:
        """Logits of what was written by itself, without the norm's offset. [..., vocabulary]"""
        return self.out(written) - self.out(torch.zeros_like(written.flatten(0, -2)[:1])[0])


@torch.no_grad()
def read(model: nn.Module, run: Callable[[], Any]) -> Stream:
    """The stream of `model`, by what flows while `run` runs it once, in evaluation mode."""
    stream = Stream(unembed=_unembedding(model))
    if stream.unembed is None:
        stream.missing = f"{type(model).__name__} has no unembedding"
        return stream
    watch = _Watch(stream)
    with ExitStack() as undo:
        blocks: dict[str, Site] = {}
        for site in find(model).values():
            if (path := re.match(r"(.*?\.)?\d+(?=\.)", site.name)) is not None:
                blocks.setdefault(path[0], site)
        for name, module in model.named_modules():
            if name in blocks:
                undo.callback(module.register_forward_pre_hook(watch.enter, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(watch.leave).remove)
            elif any(name.startswith(f"{block}.") for block in blocks):
                undo.callback(module.register_forward_pre_hook(watch.enters, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(watch.gave).remove)
            elif re.search("norm", type(module).__name__, re.IGNORECASE):
                undo.callback(module.register_forward_hook(watch.normed).remove)
        undo.callback(stream.unembed.register_forward_pre_hook(watch.unembedded).remove)
        with record(model, heads=watch.see, own_output=True):
            run()
    return watch.judged()


def _unembedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


class _Watch:
    """Looks on while the model runs."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.waiting: tuple[Site, Tensor] | None = None  # heads' outputs that no module has taken yet
        self.site: Site | None = None  # of the layer that runs
        self.gave_stream: Tensor | None = None  # what its heads wrote
        self.entered: Tensor | None = None
        self.terms: list[Tensor] = []
        self.left: Tensor | None = None  # what the last layer gave
        self.last_norm: tuple[nn.Module, Tensor, Tensor] | None = None
        self.read: Tensor | None = None

    @statistic("batch", title="Nothing")
    def see(self, call: Call) -> Any:
        """Keeps the heads' outputs, and records nothing."""
        self.waiting = call.site, call.output.transpose(1, 2).flatten(2)

    def enter(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.entered = args[0] if args else kwargs.get("hidden_states")
        self.waiting = self.gave_stream = self.site = None
        self.terms = []

    def enters(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.waiting is None or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return
        site, heads = self.waiting
        taken = args[0]
        if next(module.parameters(), None) is not None and taken.numel() == heads.numel() and _same(taken, heads):
            self.site, self.waiting = site, None
            self.stream.writes[site.stack, site.layer] = module

    def gave(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor) or self.entered is None or output.numel() != self.entered.numel():
            return
        if self.site is not None and module is self.stream.writes.get((self.site.stack, self.site.layer)):
            self.gave_stream = output.reshape(self.entered.shape)
        elif self.gave_stream is not None:
            self.terms.append(output.reshape(self.entered.shape))

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.left = output[0] if isinstance(output, tuple) else output
        if self.site is None:
            return
        left, entered, wrote = self.left, self.entered, self.gave_stream
        if left is None or entered is None or wrote is None:
            adds_up = False
        else:
            adds_up = any(_same(left, entered + wrote + term) for term in self.terms)
        if not adds_up:
            self.stream.writes.pop((self.site.stack, self.site.layer), None)
        self.terms = []

    def normed(self, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.last_norm = module, args[0], output

    def unembedded(self, module: nn.Module, args: Any) -> None:
        self.read = args[0]

    def judged(self) -> Stream:
        stream = self.stream
        if self.read is None:
            stream.missing = "its unembedding was not used"
        elif self.last_norm is None or not _same(self.last_norm[2], self.read):
            stream.missing = "what its unembedding reads does not come out of a norm"
        elif self.left is None or not _same(self.last_norm[1], self.left):
            stream.missing = "its last norm is not given what the last layer gives"
        elif not stream.writes:
            stream.missing = "what its heads write does not simply add up (a norm, a gate or a factor comes after)"
        else:
            stream.norm, stream.residual, _ = self.last_norm
        return stream


def _same(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel():
        return False
    limit = _TOLERANCE if one.dtype in (torch.float32, torch.float64) else 2e-2
    other = other.reshape(one.shape).to(one.dtype)
    return bool((one - other).abs().max() <= limit * one.abs().max() + 1e-30)
