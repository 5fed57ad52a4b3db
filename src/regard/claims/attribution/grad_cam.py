"""A trained convolutional network names two colours; does Grad-CAM for each show the object that has it?

On Selvaraju et al., Grad-CAM (arXiv:1610.02391), sections 4.1 and 5.1. They measure localisation on ImageNet's boxes
and by the pointing game, where the maps of VGG-16 hit in 70.6%. The control is the network before training.
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
from .._measure import Mean, mean

SCALES = "small", "large"
EXPECTED = (
    "in scenes of two objects, the maximum of Grad-CAM for a colour lies in the box of the object of that colour in at "
    "least 70% (localises), and in at most 15% in that of the other object (class-discriminative), each by two "
    "standard errors; in the same network before training in at most 40% in that of the object"
)
SCENES = {"small": 150, "large": 1000}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Point at each of two colours, with Grad-CAM and Guided Grad-CAM."""
    model = colours.network(seed)
    scenes = colours.held_out(colours.PAIR, SCENES[scale], seed, distinct=True)
    inputs = {"pixel_values": colours.pixels(scenes)}
    blank = colours.forgetful(model, seed)
    boxes = [colours.boxes(scenes, which) for which in (0, 1)]
    hits: dict[str, list[Mean]] = {}
    shown: dict[str, list[Any]] = {}
    for name, (which_model, method) in {
        "grad_cam": (model, "grad_cam"),
        "guided_grad_cam": (model, "guided_grad_cam"),
        "before training": (blank, "grad_cam"),
    }.items():
        found = [attribute(which_model, inputs, colours.colour_of(scenes, which), method=method) for which in (0, 1)]
        own = [pointing_game_score(found[i], boxes[i]) for i in (0, 1)]
        other = [pointing_game_score(found[i], boxes[1 - i]) & ~_both(found[i], boxes) for i in (0, 1)]
        # two questions of one scene are one draw
        hits[name], shown[name] = [mean(np.mean(of, axis=0)) for of in (own, other)], found
    chance = float(np.mean([box.mean() for box in boxes]))
    own, other = hits["grad_cam"]
    untrained = hits["before training"][0]
    holds = own.above(0.7) and other.below(0.15) and untrained.value <= 0.4
    measured = (
        f"Grad-CAM points at the asked object in {own:.1%} and at the other in {other:.1%}, Guided Grad-CAM in "
        f"{hits['guided_grad_cam'][0]:.1%} and {hits['guided_grad_cam'][1]:.1%}, Grad-CAM before training in "
        f"{untrained:.1%} and {hits['before training'][1]:.1%}; a box is {chance:.0%} of the picture ({len(scenes)} "
        "scenes)"
    )
    shown.pop("before training")
    premises = [colours.learned(model, scenes)]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, scenes[:4], shown))


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
