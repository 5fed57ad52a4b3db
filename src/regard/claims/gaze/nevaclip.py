"""Does a spot that is moved by gradient come to rest on what a caption names?

The encoder is the bundled viewer, its class token less the token's mean over scenes that nothing is judged on; the
caption of a scene is the viewer's own row for the pair of colour and shape that one of its four objects has. Beside it:
the caption of a pair that the scene lacks, the row of another pair at random (the rows shuffled), places drawn evenly,
and places drawn about the middle. There are no people here: how plausible paths are for people is not asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import Dials, render, sample
from ...gaze.nevaclip import blur, nevaclip
from ...zoo.recipes import viewer
from .._measure import mean

SCALES = "small", "large"
SCENES = {"small": 48, "large": 192}
FIXATIONS, AROUND = 2, 2  # fixations of a path; pixels about a box that still count as a look at it
KNOBS: dict[str, Any] = {
    "iterations": 10,
    "rate": 0.15,
    "fovea": 0.05,
    "blur_window": 15,
    "blur_sigma": 6.0,
    "forgetting": 1.0,
    "start": "random",
}
FOUR = Dials(objects=(4, 4), clutter=(0, 6))
SPREAD = 0.25  # of places about the middle, in shares of the picture
DRAWN = 200  # places a scene of each control

EXPECTED = (
    "25 points more fixations of the right caption are on what it names than of places drawn evenly, and than of "
    "places about the middle, by two standard errors over scenes; of the caption of an absent pair within 12 points of "
    "places drawn evenly"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of fixations in the named object's box, by caption and by chance."""
    n = SCENES[scale]
    model, _ = zoo.load("viewer")
    rows = model.classifier.weight.detach()
    scenes = [sample(FOUR, viewer.HELD_OUT + seed, i) for i in range(n)]
    pictures = render(scenes, viewer.SIZE)
    pixels = viewer.pixels(pictures)
    others = viewer.pixels(render([sample(FOUR, viewer.HELD_OUT + seed + 500, i) for i in range(100)], viewer.SIZE))
    with torch.no_grad():
        middle = _token(model, others).mean(0)
        soft = blur(pixels, window=KNOBS["blur_window"], sigma=KNOBS["blur_sigma"])
        sharp, blurred = (model(x).logits.sigmoid() for x in (pixels, soft))

    rng = np.random.default_rng(seed)
    pairs = [viewer.pairs(scene) for scene in scenes]
    objects = [int(rng.choice([i for i, pair in enumerate(of) if of.count(pair) == 1])) for of in pairs]
    named = torch.tensor([of[i] for of, i in zip(pairs, objects)])
    absent = torch.tensor([int(rng.choice(sorted(set(range(len(viewer.PAIRS))) - set(of)))) for of in pairs])
    shuffled = torch.from_numpy(rng.permutation(len(viewer.PAIRS)))[named]
    boxes = np.stack([pictures.boxes(i, objects=4) for i in range(n)]).astype(float)  # left, top, right, bottom
    boxes += np.array([-AROUND, -AROUND, AROUND, AROUND])
    at = np.arange(n), objects

    shares, anything = {}, {}
    for name, caption in (("right caption", named), ("absent pair", absent), ("rows shuffled", shuffled)):
        paths = nevaclip(
            lambda seen: _token(model, seen) - middle, pixels, rows[caption], fixations=FIXATIONS, seed=seed, **KNOBS
        )
        places = np.stack([path.places for path in paths])  # [scene, fixation, 2]
        shares[name] = _inside(places, boxes[at][:, None]).mean(1)
        anything[name] = _inside(places[:, :, None], boxes[:, None]).any(2).mean()
        if name == "right caption":
            shown = places
    chance = {
        "evenly": rng.uniform(size=(n, DRAWN, 2)),
        "about the middle": np.clip(rng.normal(0.5, SPREAD, size=(n, DRAWN, 2)), 0, 1),
    }
    for name, drawn in chance.items():
        shares[name] = _inside(drawn * viewer.SIZE, boxes[at][:, None]).mean(1)

    more = {name: mean(shares["right caption"] - shares[name]) for name in chance}
    blind = mean(shares["absent pair"] - shares["evenly"])
    holds = all(gain.value >= 0.25 and gain.above() for gain in more.values()) and abs(blind.value) <= 0.12
    measured = (
        "on the named object: "
        + ", ".join(f"{name} {mean(of):.2f}" for name, of in shares.items())
        + "; the right caption above "
        + ", ".join(f"{name} {gain:.2f}" for name, gain in more.items())
        + f"; the absent pair beside evenly {blind:+.2f}; on any object: "
        + ", ".join(f"{name} {share:.2f}" for name, share in anything.items())
    )
    row = torch.arange(n)
    known, unknown = (float(likely[row, named].mean()) for likely in (sharp, blurred))
    premises = [
        Premise("the encoder knows the object where it is sharp", "0.8 or more", f"{known:.2f}", known >= 0.8),
        Premise("and less so where all is blurred", "0.5 or less", f"{unknown:.2f}", unknown <= 0.5),
    ]

    def draw(figure: Any) -> None:
        left, *panels = figure.subplots(1, 4, width_ratios=(1.6, 1, 1, 1))
        values = [mean(of) for of in shares.values()]
        left.barh(list(shares), [v.value for v in values], xerr=[2 * v.error for v in values])
        left.invert_yaxis()
        left.set(xlabel="fixations on the named object", xlim=(0, 1))
        for i, axes in enumerate(panels):
            axes.imshow(pictures.image(i))
            axes.plot(*shown[i].T, "o-", color="white", markeredgecolor="black")
            axes.set(xticks=[], yticks=[], title=viewer.PAIRS[int(named[i])])

    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=draw)


def _token(model: Any, pixels: Tensor) -> Tensor:
    return model.vit(pixels).last_hidden_state[:, 0]


def _inside(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """places [..., 2], x and y; boxes [..., 4]"""
    return ((places >= boxes[..., :2]) & (places <= boxes[..., 2:])).all(-1)
