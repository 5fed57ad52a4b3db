"""A picture of two objects and an expression for one: does each part of RefAM make its map fit the object better?

On Kukleva et al., RefAM (arXiv:2509.22650), whose ablation adds the parts one after the other on RefCOCO. Here the
zoo's painter reads generated scenes, noised alike for all settings. As many pixels are chosen as the object has, which
uses the truth, so that no threshold has to be found. Controls: a word of the object is left out instead of the stop
word; and the magnets are read instead of being left out. Magnets are those that the method takes by itself, of which
the painter's tokenizer knows two.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from ... import loading
from ...attribution.refam import STOP_WORDS, refam
from ...call import Call
from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, SHAPES, Scene, caption, render
from ...evaluation.localisation import iou_score
from ...recording import statistic
from ...seam import record
from ...zoo.recipes import painter, viewer
from .._measure import Mean, mean

SCALES = "small", "large"
EXPECTED = (
    "from all tokens' mean on, leaving out global sinks, then stop words, then what magnets draw, each raises the "
    "intersection over union with the described object by two standard errors, all together by 0.05 or more; it is "
    "lower by two standard errors where a word of the object is left out instead of the stop word, and where the "
    "magnets are read"
)
SCENES = {"small": 300, "large": 3000}
READ = ("and", "pink")  # magnets that are read, as a control
STEPS: dict[str, dict[str, Any]] = {
    "all tokens": {"stop_words": (), "magnets": (), "sinks": False},
    "no sinks": {"stop_words": (), "magnets": ()},
    "no stop words": {"magnets": ()},
    "magnets": {},
}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap with the described object as the parts are added, and with two of them spoilt."""
    scenes = drawn(SCENES[scale], seed)
    expressions = [caption(scene).split(" and ")[0] for scene in scenes]  # of the one on the left
    pictures = render(scenes, painter.SIZE)
    asked = [min(range(2), key=lambda i, s=scene: s.objects[i].x) for scene in scenes]
    masks = np.stack([owner == which for owner, which in zip(pictures.owner, asked)])
    pipeline = loading.load("painter").processor
    pipeline.set_progress_bar_config(disable=True)
    pixels = 2 * pictures.tensor() - 1

    def maps(texts: list[str] = expressions, **knobs: Any) -> xr.DataArray:
        return refam(pipeline, {"pixel_values": pixels, "text": texts}, seed=seed, **knobs)

    found = {name: maps(**knobs) for name, knobs in STEPS.items()}
    ious = {name: iou_score(one, masks) for name, one in found.items()}
    steps = [mean(ious[b] - ious[a]) for a, b in zip(list(STEPS), list(STEPS)[1:])]
    whole = mean(ious["magnets"] - ious["all tokens"])
    spoilt = [iou_score(maps(stop_words=some, magnets=()), masks) for some in (tuple(COLOURS), SHAPES)]
    content = mean(np.mean(spoilt, 0) - ious["no stop words"])
    also = [f"{one} {' '.join(READ)}" for one in expressions]
    read = mean(iou_score(maps(also, stop_words=STOP_WORDS - set(READ), magnets=()), masks) - ious["no stop words"])
    holds = all(step.above() for step in steps) and whole.value >= 0.05 and content.below() and read.below()
    measured = (
        f"intersection over union {', '.join(f'{mean(ious[name]):.3f} ({name})' for name in STEPS)}; the parts add "
        f"{', '.join(f'{step:.3f}' for step in steps)}; a word of the object left out instead of the stop word "
        f"{content:+.3f}, magnets read {read:+.3f} ({len(scenes)} scenes, an object is {masks.mean():.0%} of one)"
    )
    stop, sinks = _premises(pipeline, expressions)
    premises = [
        Premise(
            "maps of the object's words find it",
            "0.2",
            f"{mean(ious['no stop words']).value:.2f}",
            ious["no stop words"].mean() >= 0.2,
        ),
        Premise("stop words draw weight, of all that falls on words", "2%", f"{stop:.0%}", stop >= 0.02),
        Premise("layers in which a token draws more than twice its even share", "1", f"{sinks}", sinks >= 1),
    ]
    bars = {name: mean(one) for name, one in ious.items()}
    return Finding(
        holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, scenes[:4], expressions, found, bars)
    )


def drawn(n: int, seed: int) -> list[Scene]:
    """Scenes of two objects of different colours and shapes."""
    dials = replace(painter.DIALS, objects=(2, 2))
    every = (painter.draw(viewer.HELD_OUT + seed, i, dials) for i in count())
    return list(islice((s for s in every if len({o.colour for o in s.objects} | {o.shape for o in s.objects}) == 4), n))


def _premises(pipeline: Any, expressions: list[str]) -> tuple[float, int]:
    """Share of stop words in the weight on words, as the expressions are painted; and how many layers have a sink."""
    seen: list[NDArray[np.float32]] = []

    @statistic("batch token", title="Mean weight on words")
    def read(call: Call) -> None:
        if call.site.cross:
            seen.append(call.weights.dense().mean((0, 1, 2)).numpy())

    some = [one for one in expressions if one.startswith("a ")][:50]  # four tokens: begin, a, colour, shape
    with torch.no_grad(), record(pipeline.transformer, read):
        pipeline(some, num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    weights = np.stack(seen)  # [layer, token]
    return float((weights[:, 1] / weights[:, 1:].sum(1)).mean()), int((weights.max(1) > 2 / weights.shape[1]).sum())


def _draw(
    scenes: list[Scene], expressions: list[str], found: dict[str, xr.DataArray], bars: dict[str, Mean], figure: Any
) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    axes = left.subplots(len(scenes), 1 + len(found))
    for line, picture, text, i in zip(axes, render(scenes, painter.SIZE).pixels, expressions, range(len(scenes))):
        line[0].imshow(picture)
        line[0].set_title(text, fontsize=7)
        for axis, (name, maps) in zip(line[1:], found.items()):
            axis.imshow(maps.values[i], cmap="magma")
            axis.set_title(name if i == 0 else "", fontsize=7)
        for axis in line:
            axis.set_axis_off()
    axis = right.subplots()
    axis.bar(range(len(bars)), [bar.value for bar in bars.values()], yerr=[2 * bar.error for bar in bars.values()])
    axis.set_xticks(range(len(bars)), [name.replace(" ", "\n") for name in bars], fontsize=7)
    axis.set_ylabel("intersection over union")
