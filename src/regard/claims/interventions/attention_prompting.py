"""The zoo's describer on crowded scenes that are dimmed where the question is not about them.

On Yu et al., Attention Prompting on Image for Large Vision-Language Models (arXiv:2409.17143). The helper is the zoo's
lookout in place of CLIP: how likely each patch shows the shape that is asked about stands for the map of the class
token, and turned round for that of the patches, whose likeness to the text CLIP has turned round. Control: the map of
another shape of the same scene. The model's own map, and the true one, a Gaussian around the object, stand beside.
Scenes as in training are asked too, which must not be read worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...interventions.attention_prompting import attention_prompting, heat, overlay, soften
from .. import _oracles as oracles
from .._judged import Tried, draw_bars, headroom, judged, kept
from .._locator import asked_shape, located, other_shape
from .._shown import JUDGED, MODELS, ROWS, Asked, Gain, Shown, Under, means, paired

SCENES = {"small": 150, "large": 1000}
WIDTH = 0.1  # standard deviation of the true map, as a share of the picture
MARGIN, OVER, NO_LOSS = 0.05, 0.03, -0.01
EXPECTED = (
    "dimmed by the helper's map 5 points more colours are right than plainly, and 3 more than dimmed by the map of "
    "another shape, each by two standard errors; scenes as in training are read no more than a point worse"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A picture that is dimmed where the question is not about it is read better."""
    tried, drawn = [], {}
    for name in MODELS:
        shown = Shown(name, "crowded", SCENES[scale], JUDGED + seed)
        asked = shown.colours()
        others = [other_shape(shown.scenes[a.scene], asked_shape(a.text), seed + i) for i, a in enumerate(asked)]
        elsewhere = [overlay(shown.images[a.scene], _heat(shown.images[a.scene], o)) for a, o in zip(asked, others)]
        right = {
            "plain": shown.right(asked),
            "helper": shown.right(asked, under=_helped(shown)),
            "another map": shown.right(asked, images=elsewhere),
            "own attention": shown.right(asked, under=means(attention_prompting, processor=shown.processor)),
            "true map": shown.right(asked, images=[overlay(shown.images[a.scene], _true(shown, a)) for a in asked]),
        }
        over = {way: paired(right["helper"], some) for way, some in right.items()}
        gains = {way: paired(some, right["plain"]) for way, some in right.items()}
        usual = _trained(shown)
        family = oracles.masks(shown, asked, right["plain"])
        true = Premise(
            "a true map helps: pictures dimmed around what is asked about",
            "5 points, by two standard errors",
            str(gains["true map"]),
            gains["true map"].sure(MARGIN),
        )
        measured = (
            f"colours right {right['plain'].mean():.1%}; dimmed by the helper {gains['helper']}, over another map "
            f"{over['another map']}; by the model's own attention {gains['own attention']}; by another map "
            f"{gains['another map']}; scenes as in training {usual}."
        )
        holds = over["plain"].sure(MARGIN) and over["another map"].sure(OVER) and usual.value >= NO_LOSS
        tried.append(Tried(name, [*kept(name, "P12"), headroom("a mask", family), true], holds, measured))
        drawn[name] = {way: float(some.mean()) for way, some in right.items()}
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _heat(image: Image.Image, shape: str) -> Tensor:
    likely = torch.from_numpy(located(image, shape))
    return heat(likely, -likely)


def _source(image: Image.Image, text: str) -> Tensor:
    return _heat(image, asked_shape(text))


def _helped(shown: Shown) -> Under:
    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> attention_prompting:
        return attention_prompting.fit(model, inputs, shown.processor, source=_source)

    return under


def _true(shown: Shown, a: Asked) -> Tensor:
    thing, at = shown.scenes[a.scene].objects[a.about[0]], (np.arange(ROWS) + 0.5) / ROWS
    far = (at[None] - thing.x) ** 2 + (at[:, None] - thing.y) ** 2
    return soften(torch.from_numpy(np.exp(-far / (2 * WIDTH**2))))


def _trained(shown: Shown) -> Gain:
    """How many more colours are right of scenes as in training."""
    plain = Shown(shown.name, "plain", shown.n, shown.seed)
    asked = plain.colours()
    return paired(plain.right(asked, under=_helped(plain)), plain.right(asked))
