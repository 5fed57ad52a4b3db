"""Answers on pictures of which a quarter of the tokens is left, by what they matter, on the zoo's describer.

On Yang et al., VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization
(arXiv:2508.05211), at the setting for a quarter. Questions ask for the colour of one of many small objects. Controls:
random tokens are kept in place of those that matter, and those that matter least. Told beside: with all patches in
place of global ones, and with nothing merged. Settings are searched on some prompts and compared on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...catalog import Finding
from ...interventions.vflowopt import GRID, RATIOS, WINDOW, T, _last, cost, mattering, tune, vflowopt
from ...seam import intervene
from .._judged import Tried, draw_bars, judged, kept
from .._shown import JUDGED, MODELS, Shown, paired

SCENES = {"small": 150, "large": 1000}
PROMPTS, CALLS = 8, 24
EXPECTED = (
    "at a quarter of the image tokens at least 95% as many colours are right as with all, 5 points more than with "
    "random tokens, by two standard errors, and these more than with those that matter least; searched settings keep "
    "more of the last token's state on other prompts than the paper's"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What a tower's global patches look at is what an answer needs."""
    tried, drawn = [], {}
    for name in MODELS:
        shown = Shown(name, "crowded", SCENES[scale], JUDGED + seed)
        asked = shown.colours()
        right = {"all": shown.right(asked)}
        for way in ("vflowopt", "random", "least", "all patches ask", "nothing merged"):
            right[way] = shown.right(asked, under=partial(_under, way, seed))
        shares = {way: float(some.mean()) for way, some in right.items()}
        over, reversed_ = (paired(right[a], right[b]) for a, b in (("vflowopt", "random"), ("random", "least")))
        cosines = _tuned(name, seed)
        gain = paired(*cosines)
        measured = (
            f"with {cost(RATIOS):.0%} of the image tokens on average "
            + ", ".join(f"{way} {share:.1%}" for way, share in shares.items())
            + f" of {len(asked)} colours right; over random {over}, random over least {reversed_}; cosine of the last "
            f"state {cosines[0].mean():.3f} searched, {cosines[1].mean():.3f} with the paper's settings, difference "
            f"{gain.value:+.4f} ± {gain.error:.4f}."
        )
        holds = shares["vflowopt"] >= 0.95 * shares["all"] and over.sure(0.05) and reversed_.sure() and gain.above()
        tried.append(Tried(name, kept(name, "P1", "P16"), holds, measured))
        drawn[name] = shares
    return judged(tried, EXPECTED, seed, partial(draw_bars, drawn))


def _under(way: str, seed: int, model: nn.Module, inputs: Mapping[str, Tensor], at: slice) -> vflowopt:
    found = mattering(model, inputs, t=0.0 if way == "all patches ask" else T)
    if way == "least":
        found = found._replace(value=found.value.nan_to_num(0.0).amax() - found.value)
    if way == "random":
        chance = torch.rand(found.value.shape, generator=torch.Generator().manual_seed(seed + at.start))
        found = found._replace(value=chance.masked_fill(found.value.isnan(), torch.nan))
    return vflowopt(importance=found, window=0.0 if way == "nothing merged" else WINDOW / GRID)


def _tuned(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Cosine of the last token's state with and without pruning, on prompts that nothing was searched on. [prompt]"""
    some, others = (Shown(name, "crowded", n, seed + at) for n, at in ((PROMPTS, 0), (64, 500)))
    settings, _ = tune(some.model, some.inputs(some.colours()[:PROMPTS]), calls=CALLS, seed=seed)
    inputs = others.inputs(others.colours())
    plain, found = _last(others.model, inputs), []
    for knobs in (settings, {}):
        with intervene(others.model, vflowopt.fit(others.model, inputs, **knobs)):
            found.append(functional.cosine_similarity(plain, _last(others.model, inputs), dim=-1))
    return found[0], found[1]
