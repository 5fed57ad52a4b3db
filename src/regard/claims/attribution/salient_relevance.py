"""A trained convolutional network names the colour of an object; do regions of relevance cover it better than pixels?

On Li et al., Beyond saliency (arXiv:1712.08268), who show this on photographs, without a measure of it. Relevance is
enlarged before it is compared with itself: at 64 pixels a patch would be a tenth of the picture, and an earlier design,
which did that, came to nothing. The control shuffles the pixels of the relevance first. Relevance that is merely
smoothed is reported beside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ...attribution import attribute
from ...attribution.salient_relevance import context_aware
from ...catalog import Finding, Premise
from ...data.scenes import render
from ...evaluation.localisation import iou_score
from ...extras import needs
from .. import _colours as colours
from .._measure import mean

SCALES = "small", "large"
EXPECTED = (
    "in scenes of one object, as many pixels as the object has, chosen by salient relevance, overlap it by an "
    "intersection over union at least 0.05 higher than chosen by the size of the raw relevance, and by two standard "
    "errors; where the pixels of the relevance are shuffled it is at most 0.2"
)
SCENES, LONGEST = {"small": 30, "large": 500}, 160  # pixels that relevance is enlarged to
SMOOTHED = 1.5  # pixels


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap of raw and of salient relevance with exact masks."""
    with needs("this claim", "claims"):
        from scipy.ndimage import gaussian_filter

    model = colours.network(seed)
    scenes = colours.held_out(colours.ALONE, SCENES[scale], seed)
    inputs, target = {"pixel_values": colours.pixels(scenes)}, colours.colour_of(scenes, 0)
    masks = render(scenes, colours.SIZE).owner == 0
    raw = abs(attribute(model, inputs, target, method="layerwise_relevance"))
    salient = attribute(model, inputs, target, method="salient_relevance", longest=LONGEST)
    rng = np.random.default_rng(seed)
    mixed = torch.from_numpy(np.stack([rng.permutation(one.ravel()).reshape(one.shape) for one in raw.values]))
    ways = {
        "raw": raw.values,
        "salient": salient.values,
        "smoothed": np.stack([gaussian_filter(one, SMOOTHED) for one in raw.values]),
        "shuffled": np.stack([context_aware((one / one.max())[None], longest=LONGEST).numpy() for one in mixed]),
    }
    ious = {way: iou_score(values, masks) for way, values in ways.items()}
    gain = mean(ious["salient"] - ious["raw"])
    holds = gain.value >= 0.05 and gain.above() and float(np.mean(ious["shuffled"])) <= 0.2
    left = 1 - float(np.mean([_chosen(one, mask) for one, mask in zip(raw.values, masks)]))
    measured = (
        f"intersection over union {mean(ious['salient']):.2f} of salient relevance, {mean(ious['raw']):.2f} of raw "
        f"relevance ({gain:.3f} apart), {mean(ious['shuffled']):.2f} where its pixels are shuffled; smoothed by "
        f"{SMOOTHED} pixels {mean(ious['smoothed']):.2f} ({len(scenes)} scenes)"
    )
    premises = [
        colours.learned(model, scenes),
        Premise(
            "raw relevance is of single pixels",
            "as many as the object has leave out a quarter of it or more",
            f"{left:.0%}",
            left >= 0.25,
        ),
    ]
    draw = partial(_draw, scenes[:6], raw[:6], salient[:6])
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def _chosen(values: np.ndarray, mask: np.ndarray) -> float:
    """Share of the object among as many of the highest pixels."""
    highest = np.argsort(values.ravel())[-int(mask.sum()) :]
    return float(mask.ravel()[highest].mean())


def _draw(scenes: list[Any], raw: Any, salient: Any, figure: Any) -> None:
    axes = figure.subplots(3, len(scenes))
    pictures = render(scenes, colours.SIZE)
    rows = (pictures.pixels, raw.values, salient.values)
    for line, name, values in zip(axes, ("picture", "raw relevance", "salient relevance"), rows):
        for axis, value in zip(line, values):
            axis.imshow(value, cmap="magma")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
