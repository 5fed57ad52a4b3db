"""A chain of agents that read each other's captions, with attention given back to the picture, on the zoo's describer.

On Yu et al., Visual Multi-Agent System: Mitigating Hallucination Snowballing via Visual Flow (arXiv:2509.21789). Each
agent sees the picture, reads the caption before and describes; what grows from the first to the last is the share of
the objects named that are absent. Only the reallocation is tried: the relay is a trained block. Control: as many other
image tokens count as active, drawn by seed. A single agent is compared as other methods are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions.visual_flow import Flow, flowing, visual_flow
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._premises import after_caption
from .._shown import MODELS, Asked, Gain, Shown, Under, fewer, invented, means, share

SCENES = {"small": 100, "large": 1000}
TURNS, GROWS = 4, 0.05
EXPECTED = (
    f"from the first to turn {TURNS} the share of absent objects grows by at most half of what it does plainly, less "
    "than plainly and than with other tokens active by two standard errors; and what is there is named at turn "
    f"{TURNS} at most 2 points less than plainly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """An invention that one agent makes is not believed by those after where they look at the picture."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, means(visual_flow), partial(_others, seed), oracles.attention)
        ways: dict[str, Under | None] = {
            "plain": None,
            "method": means(visual_flow),
            "control": partial(_others, seed),
        }
        turns = {way: _chain(found.tempted, found.said[way], under) for way, under in ways.items()}
        growth = {way: fewer(last, found.said[way]) for way, last in turns.items()}
        less = {way: _slower(found, turns, way) for way in ("plain", "control")}
        named = {way: float(last[:, 2].sum() / last[:, 3].sum()) for way, last in turns.items()}
        measured = (
            f"absent of the objects named at turn {TURNS} {share(turns['plain']):.1%}, {growth['plain']} more than at "
            f"the first; with visual-flow {growth['method']} more, less by {less['plain']} than plainly and by "
            f"{less['control']} than with other tokens; of what is there {named['plain']:.0%} and "
            f"{named['method']:.0%} named. One agent: {found.told('visual-flow', 'other tokens')}."
        )
        grows = Premise(
            f"inventions grow along the chain: share of absent objects at turn {TURNS} less that at the first",
            f"{100 * GROWS:.0f} points or more, by two standard errors",
            str(growth["plain"]),
            growth["plain"].sure(GROWS),
        )
        holds = (
            growth["method"].value <= growth["plain"].value / 2
            and all(gain.sure() for gain in less.values())
            and named["method"] >= named["plain"] - 0.02
        )
        some = flowing(found.tempted.model, found.tempted.inputs(_describing(found.tempted)))
        idle = float(some.inactive.sum() / (some.active | some.inactive).sum())
        sides = Premise(
            "some image tokens are inactive, others active: share of the inactive",
            "5% or more, and half at most",
            f"{idle:.1%}",
            0.05 <= idle <= 0.5,
        )
        premises = [*kept(name, "P3", "P10", "P15"), grows, sides, headroom("attention", found.family)]
        tried.append(Tried(name, premises, holds, measured))
        drawn[name] = found.bars("visual-flow", "other tokens")
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _describing(shown: Shown) -> list[Asked]:
    return [Asked(i, "describe", "") for i in range(min(shown.n, 64))]


def _chain(shown: Shown, first: Tensor, under: Under | None) -> Tensor:
    """What captions of the last agent hold, as `invented` counts it; the first says what it says alone."""
    said = shown.captions(under=under)
    for _ in range(TURNS - 1):
        asked = [Asked(i, after_caption(text, "describe"), "") for i, text in enumerate(said)]
        said = shown.answers(asked, under=under, length=48)
    return invented(said, shown.scenes)


def _slower(found: Compared, turns: Mapping[str, Tensor], way: str, draws: int = 500) -> Gain:
    """By how much less the share grows with the method than this way, error by drawing scenes anew."""
    chance = torch.randint(found.tempted.n, (draws, found.tempted.n), generator=torch.Generator().manual_seed(0))

    def growth(name: str, at: Tensor) -> Tensor:
        last, first = (
            t[at][..., 1].sum(-1) / t[at][..., 0].sum(-1).clamp(min=1) for t in (turns[name], found.said[name])
        )
        return last - first

    every = torch.arange(found.tempted.n)[None]
    drawn, whole = (growth(way, at) - growth("method", at) for at in (chance, every))
    return Gain(float(whole), float(drawn.std()))


def _others(seed: int, model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> visual_flow:
    """As many other image tokens of each row are active."""
    flow = flowing(model, inputs)
    image = flow.active | flow.inactive
    chance = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed + at.start))
    order = chance.masked_fill(~image, 2.0).argsort(1).argsort(1)
    active = image & (order < flow.active.sum(1, keepdim=True))
    return visual_flow(flow=Flow(active, image & ~active, flow.instruction))
