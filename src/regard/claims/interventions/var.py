"""Text without visual sinks, text without other patches, and what var makes of it, on the zoo's describer and witness.

On Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv:2503.03321). In the
language model, from its third layer on, text after the picture is made blind to the sinks of each layer, or to as many
other patches, drawn by seed; to all others where the sinks are more than half. What is to be redistributed must be
there: sinks as the paper finds them, by huge numbers in hidden states, that draw more attention than other patches.
Control: as much attention is moved off patches at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...call import Call
from ...catalog import Finding, Premise
from ...interventions._method import NOTHING, image_keys, layers
from ...interventions.var import after, var
from ...kernels import Factor
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, means, paired

SCENES = {"small": 150, "large": 1000}
DRAWS = 2.0  # times the attention of another patch, that a sink has to draw
EXPECTED = (
    "with text blind to the sinks at most 2 points fewer colours are right, and more than with text blind to as many "
    "other patches, by two standard errors; with var fewer of the objects that captions name are absent, or more "
    "colours are right, than plainly and than with other patches in place of sinks, each by two standard errors, and "
    "neither is worse than plainly"
)


@dataclass(kw_only=True)
class Others(var):
    """var with as many other patches, drawn by seed, in place of the sinks."""

    seed: int = 0

    def sinks(self, call: Call) -> Tensor:
        image = image_keys(call)
        assert image is not None
        sink = super().sinks(call) & image
        chance = torch.rand(image.shape[1], generator=torch.Generator().manual_seed(self.seed))
        order = chance.masked_fill(~(image & ~sink), 2.0).argsort(1).argsort(1)
        return (order < sink.sum(1, keepdim=True)) & image & ~sink


class _Blind:
    """Text after the picture does not see what counts as sinks, down to the last layer."""

    def begin(self, model: nn.Module) -> None:
        super().begin(model)  # type: ignore[misc]
        self._layers = set(layers(model, "var")[2:])

    def moved(self, call: Call, image: Tensor, sink: Tensor) -> Call:
        blind = after(call, image, range(call.query.shape[2]))
        return call.scaled(Factor(NOTHING * blind[:, None], (sink & image)[:, None]))


class BlindToSinks(_Blind, var):
    """Text does not see the sinks of the picture; how much they would draw is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.counts = torch.zeros(4)  # sinks, their weight; other patches, theirs

    def moved(self, call: Call, image: Tensor, sink: Tensor) -> Call:
        n = call.query.shape[2]
        last = call.weights.rows(n - 1, n)[:, :, 0].mean(1)
        for i, some in enumerate((sink & image, image & ~sink)):
            self.counts[2 * i : 2 * i + 2] += torch.tensor([some.sum(), (last * some).sum()])
        return super().moved(call, image, sink)

    @property
    def draws(self) -> tuple[float, float]:
        """Share of patches that are sinks, and the weight of one over that of another patch."""
        sinks, on, others, on_others = self.counts.tolist()
        return sinks / (sinks + others), (on / max(sinks, 1)) / (on_others / max(others, 1))


class BlindToOthers(_Blind, Others):
    """Text does not see as many other patches."""


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Text misses nothing without visual sinks, and invents less where their attention goes to the picture."""
    tried, drawn = [], {}
    for name in MODELS:
        other = Others(seed=seed)
        found = Compared(name, SCENES[scale], seed, means(var), lambda *_, o=other: o, oracles.attention)
        sinks, others = BlindToSinks(), BlindToOthers(seed=seed)
        blind = {
            "blind to sinks": found.crowded.right(found.asked, under=lambda *_, s=sinks: s),
            "blind to others": found.crowded.right(found.asked, under=lambda *_, o=others: o),
        }
        gain, over = paired(blind["blind to sinks"], found.right["plain"]), paired(*blind.values())
        many, draws = sinks.draws
        measured = (
            f"{many:.0%} of the patches are sinks; text blind to them {gain}, over blind to as many others {over}; "
            f"{found.told('var', 'other patches')}."
        )
        there = Premise(
            "sinks draw attention: weight of one over that of another patch",
            f"{DRAWS:g}",
            f"{draws:.2f}",
            draws >= DRAWS,
        )
        premises = [there, *kept(name, "P1", "P2", "P6", "P7"), headroom("attention", found.family)]
        tried.append(Tried(name, premises, gain.value >= -0.02 and over.sure() and found.helps, measured))
        drawn[name] = found.bars("var", "others moved") | {way: float(some.mean()) for way, some in blind.items()}
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))
