"""A trained convolutional network names two colours; does Grad-CAM for each show the object that has it?

On Selvaraju et al., Grad-CAM (arXiv:1610.02391), sections 4.1 and 5.1. They measure localisation on ImageNet's boxes
and by the pointing game, where the maps of VGG-16 hit in 70.6%.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ...attribution import attribute
from ...catalog import Finding
from ...data.scenes import render
from ...evaluation.localisation import pointing_game_score
from .. import _colours as colours

SCALES = "small", "large"
EXPECTED = (
    "in scenes of two objects, the maximum of Grad-CAM for a colour lies in the box of the object of that colour in at "
    "least 70% (localises), and in at most 15% in that of the other object (class-discriminative); it cannot be told "
    "where the network names less than 80% of the scenes"
)
SCENES = {"small": 150, "large": 1000}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Point at each of two colours, with Grad-CAM and Guided Grad-CAM."""
    model = colours.network(seed)
    scenes = colours.held_out(colours.PAIR, SCENES[scale], seed, distinct=True)
    right, inputs = colours.accuracy(model, scenes), {"pixel_values": colours.pixels(scenes)}
    boxes = [colours.boxes(scenes, which) for which in (0, 1)]
    hits: dict[str, list[float]] = {}
    shown: dict[str, list[Any]] = {}
    for method in ("grad_cam", "guided_grad_cam"):
        found = [attribute(model, inputs, colours.colour_of(scenes, which), method=method) for which in (0, 1)]
        own = np.mean([pointing_game_score(found[i], boxes[i]).mean() for i in (0, 1)])
        other = np.mean(
            [(pointing_game_score(found[i], boxes[1 - i]) & ~_both(found[i], boxes)).mean() for i in (0, 1)]
        )
        hits[method], shown[method] = [float(own), float(other)], found
    chance = float(np.mean([box.mean() for box in boxes]))
    own, other = hits["grad_cam"]
    holds = None if right < 0.8 else own >= 0.7 and other <= 0.15
    measured = (
        f"Grad-CAM points at the asked object in {own:.0%} and at the other in {other:.0%}, Guided Grad-CAM in "
        f"{hits['guided_grad_cam'][0]:.0%} and {hits['guided_grad_cam'][1]:.0%}; a box is {chance:.0%} of the picture. "
        f"The network names all colours of {right:.0%} of {len(scenes)} scenes."
    )
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, scenes[:4], shown))


def _both(found: Any, boxes: list[Any]) -> Any:
    """Whether the maximum lies where the two boxes overlap."""
    return np.array([(a & b).ravel()[m.ravel().argmax()] for m, a, b in zip(found.values, *boxes)])


def _draw(scenes: list[Any], shown: dict[str, list[Any]], figure: Any) -> None:
    axes = figure.subplots(len(scenes), 5)
    pictures = render(scenes, colours.SIZE)
    for row, (line, scene) in enumerate(zip(axes, scenes)):
        line[0].imshow(pictures.pixels[row])
        for axis, (method, which) in zip(line[1:], [(m, w) for m in shown for w in (0, 1)]):
            axis.imshow(pictures.pixels[row], alpha=0.35)
            values = shown[method][which].values[row]
            limit = abs(values).max() or 1
            axis.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, alpha=0.75)
            axis.set_title(f"{method.replace('_', '-')}: {scene.objects[which].colour}", fontsize=7)
        for axis in line:
            axis.set_axis_off()
