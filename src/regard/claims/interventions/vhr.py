"""The zoo's describer: heads that the picture changes most, muted and raised.

On He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (arXiv:2412.13949). Scenes
as in the claim of var: biases turned round, and a veil. If divergence ranks the heads that answers need the picture
for, muting the aware half of each layer, prompt by prompt, costs more right answers on presence than muting the other
half. The time of captions holds the finding of heads, which reads the prompts twice more; captions here are far shorter
than prompts, in the paper far longer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import xarray as xr
from torch import nn

from ...catalog import Finding
from ...interventions.vhr import aware_heads, vhr
from .._veiled import LEAST, Veiled, bars, told

SCENES = {"small": 120, "full": 1000}
EXPECTED = (
    "muting the aware heads costs at least twice as many right answers on presence as muting the other half; with vhr, "
    "the share of the objects named that are absent is lower by a tenth of itself or more, and captions take at most "
    "1.25 times as long"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Aware heads carry the picture to the answer, and louder ones invent less."""
    veiled = Veiled(SCENES[scale], seed)
    found: list[xr.DataArray] = []

    def aware_muted(model: nn.Module, inputs: Mapping[str, Any]) -> vhr:
        found.append(aware_heads(model, inputs))
        return vhr(heads=found[-1], alpha=0.0)

    def others_muted(model: nn.Module, inputs: Mapping[str, Any]) -> vhr:
        return vhr(heads=~aware_heads(model, inputs), alpha=0.0)

    answers = {
        "plain": veiled.accuracy(),
        "aware\nmuted": veiled.accuracy(aware_muted),
        "others\nmuted": veiled.accuracy(others_muted),
        "vhr": veiled.accuracy(vhr.fit),
    }
    began = time.process_time()
    plainly = veiled.captions()
    between = time.process_time()
    raised = veiled.captions(vhr.fit)
    ratio = (time.process_time() - between) / (between - began)
    if plainly["chair_i"] < LEAST:
        return Finding(None, f"plainly it invents only {plainly['chair_i']:.1%} of the objects", EXPECTED, seed)

    plain, aware, others, with_vhr = answers.values()
    cost, control = plain - aware, plain - others
    holds = cost > 0 and cost >= 2 * control and raised["chair_i"] <= 0.9 * plainly["chair_i"] and ratio <= 1.25
    measured = (
        f"Right answers on {len(veiled.polls)} questions {plain:.1%}; aware heads muted {aware:.1%}, the others "
        f"{others:.1%}; with vhr {with_vhr:.1%}. {told(plainly, raised, 'vhr')} Captions take {ratio:.2f} times as "
        f"long."
    )
    share = xr.concat(found, "batch").mean("batch")

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1.4, 1.4])
        picture = left.imshow(share.transpose("layer", "head"), vmin=0, vmax=1, cmap="Greens")
        left.set_yticks(range(share.sizes["layer"]), share["layer"].values)
        left.set(xlabel="head", ylabel="layer", title="Aware, share of prompts", xticks=range(share.sizes["head"]))
        figure.colorbar(picture, ax=left, shrink=0.6)
        middle.bar(list(answers), list(answers.values()), color=["0.6", "C3", "C0", "C2"])
        middle.set(ylim=(0.4, 1), title="Right answers on presence")
        bars(right, plainly, raised, "vhr")

    return Finding(holds, measured, EXPECTED, seed, draw=draw)
