"""Attention given back: in middle layers to the parts of a picture that are active, in deep ones to the instruction.

Yu et al., Visual Multi-Agent System: Mitigating Hallucination Snowballing via Visual Flow (arXiv:2509.21789), by a
reader's quotations of the paper, which we had not at hand, and the authors' repository, a skeleton. In the middle third
of the layers scores are divided by `tau`; of what a row gives to inactive image tokens and to the instruction,
`alpha_middle` goes to the active image tokens. In the last third, of what it gives to the picture, `alpha_deep` goes to
the instruction. Each receiver gets in proportion to what it has, and rows still sum to one. A token is inactive where
its curve over layers, of the attention that it receives, stays below the lower quartile of all and within a fifth of
itself; unimodal where the curve has one peak, inside, above `PEAK` of the largest value of all.

A chain of agents hands on, beside its text, the states of unimodal image tokens, made one with the instruction by a
trained block (`Relay`): without training, only the reallocation is to be had.

Deviations: which layers are middle and deep is not told; here they are thirds. The authors' repository spreads what is
collected evenly over all keys that give nothing, `spread="even"`, with 0.2 and 0.1 in place of 0.1 and 0.3. What a peak
is normalised by is not told either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..call import Call
from ..kernels import Factor
from ..seam import intervene
from ._method import STACK, Method, at_prompt, image_ids, image_keys, image_tokens, layers, log_factor, padded_left

PEAK, QUARTILE, FLUCTUATION, TOLERANCE = 0.3, 0.25, 0.2, 0.05


class Flow(NamedTuple):
    """Of each token of a prompt: whether it is an active or an inactive image token, or of the instruction, boolean."""

    active: Tensor  # [batch, token]
    inactive: Tensor
    instruction: Tensor


@dataclass(kw_only=True)
class visual_flow(Method):
    """Move attention to the active image tokens in middle layers, and to the instruction in deep ones.

    flow: as `flowing` finds it for a prompt. alpha_middle, alpha_deep: shares that are moved, 0 to 1. tau: what scores
    of middle layers are divided by. With both shares 0 and a tau of 1 nothing changes. spread: "share", in proportion
    to what receivers have, or "even", over all keys that give nothing, at the cost of rows of weights.

    ValueError where the model reads no image tokens, or the prompt is of another batch.

    >>> import regard
    >>> from regard.interventions.visual_flow import flowing, visual_flow
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["describe"])
    >>> flow = flowing(model, inputs)
    >>> with regard.intervene(model, visual_flow(flow=flow)):
    ...     ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha_middle": 0.0, "alpha_deep": 0.0, "tau": 1.0}
    needs = "image tokens that are active as the prompt is read"

    flow: Flow
    alpha_middle: float = 0.1
    alpha_deep: float = 0.3
    tau: float = 0.8
    spread: Literal["share", "even"] = "share"
    _layers: dict[int, bool] = field(default_factory=dict, init=False, repr=False)  # of those changed: whether deep

    def __post_init__(self) -> None:
        for name in ("alpha_middle", "alpha_deep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"visual-flow: {name} is a share, 0 to 1, not {getattr(self, name)}")
        if self.tau <= 0:
            raise ValueError(f"visual-flow: tau is a temperature, above 0, not {self.tau}")
        if self.spread not in ("share", "even"):
            raise ValueError(f"visual-flow: spread is 'share' or 'even', not {self.spread!r}")

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        """With the image tokens that are active while the model reads `inputs`."""
        flow = knobs.pop("flow", None)
        return cls(flow=flowing(model, inputs) if flow is None else flow, **knobs)

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "visual-flow")
        known = layers(model, "visual-flow")
        n = len(known)
        self._layers = {layer: 3 * i >= 2 * n for i, layer in enumerate(known) if 3 * i >= n}

    def inputs(self, call: Call) -> Call:
        deep = self._layers.get(call.site.layer) if call.site.stack == STACK else None
        if deep is None or image_keys(call) is None:
            return call
        if not deep and self.tau != 1:
            call = self._softened(call)
        alpha = self.alpha_deep if deep else self.alpha_middle
        if not alpha or self.spread == "even":
            return call
        giving, taking = self._sides(call, deep)
        given, taken = call.weights.applied(torch.stack([giving, taking], dim=-1)[:, None]).unbind(-1)
        moves = taken > torch.finfo(taken.dtype).eps * given
        kept, gain = torch.where(moves, 1 - alpha, 1.0), torch.where(moves, 1 + alpha * given / taken, 1.0)
        return call.scaled(Factor(log_factor(kept), giving[:, None]), Factor(log_factor(gain), taking[:, None]))

    def _softened(self, call: Call) -> Call:
        if call.softcap is not None or call.edits:
            why = "are capped" if call.softcap is not None else "are known by weights only, which come before"
            raise ValueError(f"visual-flow: scores of {call.site} {why}, so they cannot be divided by tau: give tau=1")
        factors = tuple(Factor(rows / self.tau, keys) for rows, keys in call.factors)
        bias = None if call.bias is None else call.bias / self.tau
        return call.but(scale=call.scale / self.tau, bias=bias, factors=factors)

    def where(self, call: Call) -> bool:
        there = self.spread == "even" and call.site.stack == STACK and call.site.layer in self._layers
        return there and image_keys(call) is not None

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        deep = self._layers[call.site.layer]
        giving, _ = self._sides(call, deep)
        seen = call.weights.seen(rows.start, rows.stop)
        taking = seen & (self._part(call, 2) if deep else ~giving)[:, None, None]
        return spread_evenly(weights, giving[:, None, None], taking, self.alpha_deep if deep else self.alpha_middle)

    def _part(self, call: Call, i: int) -> Tensor:
        return at_prompt(call, self.flow[i], "visual-flow")

    def _sides(self, call: Call, deep: bool) -> tuple[Tensor, Tensor]:
        """Which keys give, and which take in proportion. [batch, key] boolean"""
        active, inactive, instruction = (self._part(call, i) for i in range(3))
        return (active | inactive, instruction) if deep else (inactive | instruction, active)


def spread_evenly(weights: Tensor, giving: Tensor, taking: Tensor, alpha: float) -> Tensor:
    """Weights of which `alpha` of what is on the `giving` keys goes to the `taking` ones, each as much."""
    many = taking.sum(-1, keepdim=True)
    moved = torch.where(many > 0, alpha * (weights * giving).sum(-1, keepdim=True), 0.0)
    kept = torch.where(giving & (many > 0), (1 - alpha) * weights, weights)
    return kept + taking * moved / many.clamp(min=1)


def flowing(model: nn.Module, inputs: Mapping[str, Any]) -> Flow:
    """Which image tokens of each prompt are active and inactive, and which tokens the instruction, in one plain run.

    The instruction is what comes after the last picture. ValueError where the model reads no image tokens, a row has no
    picture, or padding on the right.
    """
    image_ids(model, "visual-flow")
    image = image_tokens(model, inputs["input_ids"], "visual-flow")
    padded_left(inputs, "visual-flow")
    if (none := ~image.any(1)).any():
        raise ValueError(f"visual-flow: row {int(none.nonzero()[0])} of the inputs has no picture")
    curves = received(model, inputs)
    active = torch.zeros_like(image)
    for row, its in enumerate(image):
        active[row, its] = ~inactive(curves[row, :, its])
    place = torch.arange(image.shape[1], device=image.device)
    return Flow(active, image & ~active, place > (place * image).amax(1, keepdim=True))


def received(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What each token of a prompt gets of all queries, mean over heads. [batch, layer, token]"""
    reader = _Reader()
    with torch.no_grad(), intervene(model, reader):
        model(**inputs, use_cache=False)
    return torch.stack(reader.found, dim=1)


def inactive(curves: Tensor) -> Tensor:
    """Which tokens get little in every layer, and as little in all. curves: [layer, token]. [token] boolean"""
    low = (curves < torch.quantile(curves.flatten(), QUARTILE)).all(0)
    mean = curves.mean(0)
    return low & ((curves.amax(0) - curves.amin(0)) <= FLUCTUATION * mean)


def unimodal(curves: Tensor) -> Tensor:
    """Which tokens have one peak, in the middle half of the layers. curves: [layer, token]. [token] boolean

    >>> import torch
    >>> unimodal(torch.tensor([[0.0, 0.9], [0.2, 0.5], [0.9, 0.3], [0.3, 0.2], [0.1, 0.1]])).tolist()
    [True, False]
    """
    n = len(curves)
    top, at = curves.max(0)
    layer = torch.arange(1, n, device=curves.device)[:, None]
    slack, step = TOLERANCE * top, curves.diff(dim=0)
    one = torch.where(layer <= at, step >= -slack, step <= slack).all(0)
    middle = (at >= n / 4) & (at < 3 * n / 4) & (at > 0) & (at < n - 1)
    return one & middle & (top > PEAK * curves.max())


class Relay(nn.Module):
    """Image tokens that go to the next agent, made one with the instruction: trained blocks of a plain transformer.

    >>> import torch
    >>> Relay(16, heads=2)(torch.zeros(1, 3, 16), torch.zeros(1, 5, 16)).shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, dim: int, *, heads: int = 8, layers: int = 2, ratio: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"a Relay of {dim} numbers cannot have {heads} heads: they share them evenly")
        block = nn.TransformerEncoderLayer(
            dim, heads, ratio * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

    def forward(self, relay: Tensor, instruction: Tensor) -> Tensor:
        """[batch, token, dim] of both; those of the relay are given."""
        return self.blocks(torch.cat([relay, instruction], dim=1))[:, : relay.shape[1]]


def snowballing(passed: Sequence[float], *, turns: int, severity: float = 100.0) -> float:
    """How far invented objects went along a chain of agents: their mean score, 0 to `severity`; lower is better.

    passed: by how many agents each was passed on.

    >>> round(snowballing([0, 4], turns=4), 6)
    50.0
    """
    each = torch.tensor(passed, dtype=torch.float64)
    return float((severity * torch.sigmoid(each - turns / 2)).mean()) if len(each) else 0.0


class _Reader:
    """Gathers what keys of the language model receive; changes nothing."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def inputs(self, call: Call) -> Call:
        if call.site.stack == STACK:
            self.found.append(call.weights.received(by="real").mean(1))
        return call
