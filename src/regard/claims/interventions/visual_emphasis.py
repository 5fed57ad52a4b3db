"""What visual-emphasis makes of the patches that the tower marks, on the zoo's describer.

On Arif et al., Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model
(arXiv:2501.12206). Control: as many other patches of each picture, drawn by seed, get what the marked ones get. How
often marked patches lie on objects is told beside how often patches do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding
from ...interventions._method import image_tokens
from ...interventions.visual_emphasis import Emphasis, emphasised, visual_emphasis
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, Asked, Shown, means

SCENES = {"small": 150, "large": 1000}
EXPECTED = (
    "with visual-emphasis fewer of the objects that captions name are absent, or more colours are right, than plainly "
    "and than with as many other patches raised, each by two standard errors, and neither is worse than plainly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Patches that the tower looks at early, and its outliers, hold what keeps an answer from inventing."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, means(visual_emphasis), partial(_others, seed), oracles.attention)
        top, bottom, chance = _on_objects(found.crowded)
        measured = (
            f"{top:.0%} of the salient patches are of objects, and {bottom}, where {chance:.0%} of all are; "
            f"{found.told('visual-emphasis', 'other patches')}."
        )
        premises = [*kept(name, "P1", "P3", "P5", "P6"), headroom("attention", found.family)]
        tried.append(Tried(name, premises, found.helps, measured))
        drawn[name] = found.bars("visual-emphasis", "other patches")
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _others(seed: int, model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> visual_emphasis:
    """As many other patches of each row in place of either set."""
    tokens = emphasised(model, inputs)
    ids = inputs["input_ids"]
    image = image_tokens(model, ids, "the control")
    top, bottom = tokens.top & ~tokens.bottom, tokens.bottom
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + at.start))
    order = chance.masked_fill(~image | top | bottom, 2.0).argsort(1).argsort(1)
    n, both = top.sum(1, keepdim=True), (top | bottom).sum(1, keepdim=True)
    return visual_emphasis(tokens=Emphasis(order < n, (order >= n) & (order < both)))


def _on_objects(shown: Shown) -> tuple[float, str, float]:
    """Which part of salient patches, of outliers and of all is of objects."""
    some = range(min(shown.n, 64))
    inputs = shown.inputs([Asked(i, "describe", "") for i in some])
    image = image_tokens(shown.model, inputs["input_ids"], "the claim")
    top, bottom = (which[image].view(len(some), -1) for which in emphasised(shown.model, inputs))
    objects = torch.stack([shown.owned[i].any(0) for i in some])
    told = f"{objects[bottom].float().mean():.0%} of {int(bottom.sum())} outliers" if bottom.any() else "no outliers"
    return float(objects[top].float().mean()), told, float(objects.float().mean())
