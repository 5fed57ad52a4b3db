"""The zoo's describer on tiny shapes, asked of the part of the picture that a tree search finds.

On Li, Xu, Zhao and Peng, DyFo: A Training-Free Dynamic Focus Visual Search for Enhancing LMMs in Fine-Grained Visual
Understanding (arXiv:2504.14920), whose text was not at hand. Scenes are drawn at 256 pixels and read at 64, so that a
part brings detail. The expert is the zoo's lookout, which reads pictures in windows of 64 pixels; a patch counts as
found where it is more likely to show the shape than not. The model is asked to confirm that the shape is there.
Controls: the expert's first box, without a search; and boxes of the same sizes elsewhere, which vote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions._picture import Box, cropped
from ...interventions.dyfo import GROWN, LEAST, dyfo
from .. import _oracles as oracles
from .._judged import Tried, draw_bars, headroom, judged, kept
from .._locator import asked_shape, located
from .._shown import JUDGED, MODELS, Asked, Shown, Under, paired

SCENES = {"small": 50, "large": 600}
FOUND = 0.5  # how likely a patch shows the shape
MARGIN, OVER, NO_LOSS = 0.2, 0.1, 0.05
EXPECTED = (
    "with the search 20 points more colours are right than of the whole picture, and 10 more than of the expert's "
    "first box and than of random boxes, each by two standard errors; shapes that are absent are not affirmed 5 points "
    "more often"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A search over parts of the picture, between model and expert, finds small things."""
    tried, drawn = [], {}
    for name in MODELS:
        shown = Shown(name, "tiny", SCENES[scale], JUDGED + seed)
        asked = shown.colours()
        images = [shown.images[a.scene] for a in asked]
        first = [_box(image, a.text) for image, a in zip(images, asked)]
        right = {
            "whole": shown.right(asked),
            "search": shown.right(asked, under=_searched(shown, asked)),
            "first box": shown.right(asked, images=[_cut(i, b) for i, b in zip(images, first)]),
            "random boxes": shown.right(asked, under=_searched(shown, asked, elsewhere=seed)),
        }
        over = {way: paired(right["search"], some) for way, some in right.items()}
        absent = [a for a in shown.polls() if a.answer == "no"][: SCENES[scale]]
        yes = paired(1 - shown.right(absent, under=_searched(shown, absent)), 1 - shown.right(absent))
        family = oracles.crops(shown, asked, right["whole"])
        recall = np.mean([_holds(shown, a, box) for a, box in zip(asked, first)])
        finds = Premise(
            "the expert finds what is asked about: its box holds the middle of it",
            "70%",
            f"{recall:.0%}",
            bool(recall >= 0.7),
        )
        measured = (
            f"colours right {right['whole'].mean():.1%}, with the search {over['whole']}, over the expert's first box "
            f"{over['first box']}, over random boxes {over['random boxes']}; absent shapes affirmed more often by "
            f"{yes}."
        )
        holds = (
            over["whole"].sure(MARGIN)
            and all(over[way].sure(OVER) for way in ("first box", "random boxes"))
            and yes.value <= NO_LOSS
        )
        tried.append(Tried(name, [*kept(name, "P11"), headroom("a crop", family), finds], holds, measured))
        drawn[name] = {way: float(some.mean()) for way, some in right.items()}
        drawn[name]["oracle"] = drawn[name]["whole"] + family.oracle.value
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _boxes(image: Image.Image, text: str) -> list[Box]:
    """Around the patches that likely show the shape that a text names."""
    likely = located(image, asked_shape(text)) >= FOUND
    if not likely.any():
        return []
    rows, columns = (np.flatnonzero(likely.any(axis)) for axis in (1, 0))
    n = len(likely)
    return [Box(columns[0] / n, rows[0] / n, (columns[-1] + 1) / n, (rows[-1] + 1) / n)]


def _box(image: Image.Image, text: str) -> Box | None:
    found = _boxes(image, text)
    return found[0].grown(GROWN, LEAST) if found else None


def _cut(image: Image.Image, box: Box | None) -> Image.Image:
    return image if box is None else cropped(image, box, image.size)


def _confirm(text: str) -> str:
    shape = asked_shape(text)
    return f"is there {'an' if shape[0] in 'aeiou' else 'a'} {shape}?"


def _searched(shown: Shown, asked: Sequence[Asked], *, elsewhere: int | None = None) -> Under:
    """With the expert's boxes; or, by a seed, with boxes of their sizes at random places."""

    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> dyfo:
        rng = np.random.default_rng((elsewhere or 0, at.start))

        def moved(image: Image.Image, text: str) -> list[Box]:
            sides = [(b.right - b.left, b.bottom - b.top) for b in _boxes(image, text)]
            corners = [(rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high)) for wide, high in sides]
            return [Box(x, y, x + wide, y + high) for (x, y), (wide, high) in zip(corners, sides)]

        return dyfo.fit(
            model,
            inputs,
            shown.processor,
            expert=_boxes if elsewhere is None else moved,
            confirm=_confirm if elsewhere is None else None,
            images=[shown.images[a.scene] for a in asked[at]],
        )

    return under


def _holds(shown: Shown, a: Asked, box: Box | None) -> bool:
    thing = shown.scenes[a.scene].objects[a.about[0]]
    return box is not None and box.left <= thing.x <= box.right and box.top <= thing.y <= box.bottom
