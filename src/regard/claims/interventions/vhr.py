"""Heads that the picture changes most, muted and raised, on the zoo's describer and witness.

On He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (arXiv:2412.13949). If
divergence ranks the heads that answers need the picture for, muting the aware half of each layer, prompt by prompt,
costs more right colours of one of many objects than muting the other half. Control: as many heads of each layer at
random, raised. What it costs is counted in prompts read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from ...catalog import Finding
from ...interventions.vhr import aware_heads, vhr
from .. import _oracles as oracles
from .._judged import Compared, Tried, draw_bars, headroom, judged, kept
from .._shown import MODELS, Shown, Under, means, paired

SCENES = {"small": 150, "large": 1000}
EXPECTED = (
    "muting the aware heads costs more right colours than muting the other half; with vhr fewer of the objects that "
    "captions name are absent, or more colours are right, than plainly and than with as many random heads raised, each "
    "by two standard errors, and neither is worse than plainly; a prompt is read at most three times"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Aware heads carry the picture to the answer, and louder ones invent less."""
    tried, drawn = [], {}
    for name in MODELS:
        found = Compared(name, SCENES[scale], seed, means(vhr), _raised(2.0, seed=seed), oracles.attention)
        muted = [found.crowded.right(found.asked, under=_raised(0.0, others=others)) for others in (True, False)]
        cost, reads = paired(*muted), _reads(found.crowded)
        measured = (
            f"muting the aware heads costs {cost} more than muting the others; {found.told('vhr', 'random heads')}; a "
            f"prompt is read {reads} times."
        )
        premises = [*kept(name, "P1", "P2", "P3", "P8"), headroom("attention", found.family)]
        tried.append(Tried(name, premises, cost.sure() and found.helps and reads <= 3, measured))
        drawn[name] = found.bars("vhr", "random raised") | {
            "others muted": float(muted[0].mean()),
            "aware muted": float(muted[1].mean()),
        }
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _raised(alpha: float, *, others: bool = False, seed: int | None = None) -> Under:
    def under(model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> vhr:
        heads = aware_heads(model, inputs)
        if others:
            heads = ~heads
        if seed is not None:  # as many of each layer and row
            chance = torch.rand(heads.shape, generator=torch.Generator().manual_seed(seed + at.start))
            count = torch.from_numpy(heads.sum("head").values)[..., None]
            heads = xr.DataArray((chance.argsort(-1).argsort(-1) < count).numpy(), heads.coords, heads.dims)
        return vhr(heads=heads, alpha=alpha)

    return under


def _reads(shown: Shown) -> int:
    """How often a prompt is read to say one word with vhr."""
    asked, rows = shown.colours()[:2], 0

    def count(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        nonlocal rows
        rows += len(kwargs["inputs_embeds"])

    handle = shown.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        shown.answers(asked, under=means(vhr))
    finally:
        handle.remove()
    return rows // len(asked)
