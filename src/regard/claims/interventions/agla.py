"""The zoo's describer on crowded scenes: logits of the picture, and of what in it the question is about.

On An et al., AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
Attention (arXiv:2406.12718). The matcher is the zoo's lookout in place of BLIP: how likely each patch shows the shape
that is asked about, and how likely the picture has one. Knobs are the paper's. It samples; here all is greedy. Control:
the map of another shape of the same scene, with as much of the picture masked; and the masked picture alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions.agla import agla, masked
from .. import _oracles as oracles
from .._judged import Tried, draw_bars, headroom, judged, kept
from .._locator import asked_shape, hit, located, other_shape, present
from .._shown import JUDGED, MODELS, Asked, Gain, Shown, Under, paired

SCENES = {"small": 200, "large": 1000}
POLLS = 200
MARGIN, OVER, NO_LOSS = 0.03, 0.02, -0.03
EXPECTED = (
    "with agla 3 points more colours are right than plainly, 2 more than with the map of another shape and than from "
    "the masked picture alone, each by two standard errors; polls are not 3 points worse"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Logits of what the question is about, added to those of the picture, make answers right."""
    tried, drawn = [], {}
    for name in MODELS:
        shown = Shown(name, "crowded", SCENES[scale], JUDGED + seed)
        asked = shown.colours()
        right = {
            "plain": shown.right(asked),
            "agla": shown.right(asked, under=_under(shown)),
            "another map": shown.right(asked, under=_elsewhere(shown, asked, seed)),
            "masked alone": shown.right(asked, images=[_masked(shown.images[a.scene], a.text) for a in asked]),
        }
        over = {way: paired(right["agla"], some) for way, some in right.items()}
        same = paired(shown.right(asked, under=_under(shown, whole=True)), right["plain"])
        polls = _polls(shown)
        family = oracles.masks(shown, asked, right["plain"])
        hits = [_found(shown, a) for a in asked]
        finds = Premise(
            "the matcher finds what is asked about: its most relevant patch is near",
            "70%",
            f"{np.mean(hits):.0%}",
            bool(np.mean(hits) >= 0.7),
        )
        measured = (
            f"colours right {right['plain'].mean():.1%}, with agla {over['plain']}, over the map of another shape "
            f"{over['another map']}, over the masked picture alone {over['masked alone']}; with the whole picture "
            f"twice {same}; polls {polls}."
        )
        better = all(over[way].sure(OVER) for way in ("another map", "masked alone"))
        holds = over["plain"].sure(MARGIN) and better and polls.value >= NO_LOSS
        tried.append(Tried(name, [*kept(name, "P12"), headroom("a mask", family), finds], holds, measured))
        drawn[name] = {way: float(some.mean()) for way, some in right.items()}
        drawn[name]["oracle"] = drawn[name]["plain"] + family.oracle.value
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _match(image: Image.Image, text: str) -> tuple[np.ndarray, float]:
    shape = asked_shape(text)
    return located(image, shape), present(image, shape)


def _masked(image: Image.Image, text: str) -> Image.Image:
    return masked(image, *_match(image, text))


def _under(shown: Shown, *, whole: bool = False) -> Under:
    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> agla:
        if whole:
            return agla(model, inputs, masked=inputs)
        return agla.fit(model, inputs, shown.processor, match=_match)

    return under


def _elsewhere(shown: Shown, asked: Sequence[Asked], seed: int) -> Under:
    """The map of another shape that the scene has, and the similarity of what is asked."""

    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> agla:
        images = []
        for i, a in enumerate(asked[at], at.start):
            image, shape = shown.images[a.scene], asked_shape(a.text)
            other = other_shape(shown.scenes[a.scene], shape, seed + i)
            images.append(masked(image, located(image, other), present(image, shape)))
        pixels = shown.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return agla(model, inputs, masked={**inputs, "pixel_values": pixels})

    return under


def _polls(shown: Shown) -> Gain:
    polls = shown.polls()[:POLLS]
    ways = [shown.right(polls, under=under) for under in (_under(shown), None)]
    return paired(*ways, [a.scene for a in polls])


def _found(shown: Shown, a: Asked) -> bool:
    thing = shown.scenes[a.scene].objects[a.about[0]]
    return hit(located(shown.images[a.scene], asked_shape(a.text)), thing.x, thing.y)
