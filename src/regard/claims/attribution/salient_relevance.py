"""A trained convolutional network names the colour of an object; do regions of relevance cover it better than pixels?

On Li et al., Beyond saliency (arXiv:1712.08268), who show this on photographs, without a measure of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ...attribution import attribute
from ...catalog import Finding
from ...data.scenes import render
from ...evaluation.localisation import inside_score, iou_score
from .. import _colours as colours

SCALES = "small", "large"
EXPECTED = (
    "in scenes of one object, as many pixels as the object has, chosen by salient relevance, overlap it by an "
    "intersection over union at least 0.05 higher than chosen by the size of the raw relevance; it cannot be told "
    "where the network names less than 80% of the scenes"
)
SCENES = {"small": 100, "large": 500}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap of raw and of salient relevance with exact masks."""
    model = colours.network(seed)
    scenes = colours.held_out(colours.ALONE, SCENES[scale], seed)
    right, inputs = colours.accuracy(model, scenes), {"pixel_values": colours.pixels(scenes)}
    masks = render(scenes, colours.SIZE).owner == 0
    target = colours.colour_of(scenes, 0)
    raw = abs(attribute(model, inputs, target, method="layerwise_relevance"))
    salient = attribute(model, inputs, target, method="salient_relevance")
    ious = [float(np.mean(iou_score(found, masks))) for found in (raw, salient)]
    shares = [float(np.mean(inside_score(found, masks))) for found in (raw, salient)]
    holds = None if right < 0.8 else ious[1] >= ious[0] + 0.05
    measured = (
        f"Intersection over union {ious[1]:.2f} of salient relevance, {ious[0]:.2f} of raw relevance; share of the map "
        f"on the object {shares[1]:.2f} and {shares[0]:.2f}, of which the object is {masks.mean():.2f}. The network "
        f"names the colours of {right:.0%} of {len(scenes)} scenes."
    )
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, scenes[:6], raw[:6], salient[:6]))


def _draw(scenes: list[Any], raw: Any, salient: Any, figure: Any) -> None:
    axes = figure.subplots(3, len(scenes))
    pictures = render(scenes, colours.SIZE)
    rows = (pictures.pixels, raw.values, salient.values)
    for line, name, values in zip(axes, ("picture", "raw relevance", "salient relevance"), rows):
        for axis, value in zip(line, values):
            axis.imshow(value, cmap="magma")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
