"""Trevithick and Yang (arXiv:2010.04595): views merged by attention tell more of a hidden point than their mean.

Three opaque discs in the plane, of one radius, four cameras on the rim, a fifth view between them to be told: the
point of the surface that a pixel shows is given, and its colour is to be told from what the four saw there. So the
merge alone is judged, in worlds that were not trained on. The premise of the paper is that a view's own features tell
how far the surface is that it sees, or the merge could not know that the view is blocked: with discs of one radius,
width is distance. Control: radii of 0.15 to 0.35, where it is not. The mean has as many weights: its layer of scores
is one more layer before it. Whole radiance fields did not learn colours in a minute, so none is judged here. Piloted
four times, on other seeds, with cameras anywhere and fewer worlds first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data import flatland
from ...models.grf import ViewAttention, encoded, project, sampled
from .._measure import mean

SCALES = "small", "large"
STEPS, RUNS = {"small": 800, "large": 2000}, {"small": 1, "large": 5}
TRAIN, HELD, BATCH, RATE = 4000, 300, 32, 2e-3
VIEWS, PIXELS, CHANNELS, HIDDEN, FREQUENCIES = 4, 24, 24, 48, 3
GAIN, ARC = 0.3, np.radians(90)  # dB; how far to either side of the fifth view the four stand
RADII = {"one radius": (0.3, 0.3), "any radius": (0.15, 0.35)}
MERGES = "attention", "mean"
NAMES = "pictures", "places", "depth", "points", "colours", "views", "there"


class Told(nn.Module):
    """Colours of points from pictures of one row. [world, point, 3]"""

    def __init__(self, merge: str) -> None:
        super().__init__()
        sizes = [3, CHANNELS, CHANNELS, CHANNELS]
        layers = [nn.Conv2d(a, b, (1, 5), padding=(0, 2)) for a, b in pairwise(sizes)]
        self.pixels = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        places = 3 * (1 + 2 * FREQUENCIES)
        self.views = ViewAttention(CHANNELS, places, CHANNELS, hidden=HIDDEN, merge=merge)
        self.colour = nn.Sequential(nn.Linear(CHANNELS + places, 64), nn.ReLU(), nn.Linear(64, 3), nn.Sigmoid())

    def forward(self, pictures: Tensor, places: Tensor, depth: Tensor, points: Tensor) -> Tensor:
        """pictures [world, view, 3, 1, pixel], places and depth [world, point, view, ..], points [world, point, 3]"""
        seen, (every, views) = self.pixels(pictures.flatten(0, 1)), pictures.shape[:2]
        flat = sampled(seen, places.transpose(0, 1).flatten(1, 2), depth.transpose(0, 1).flatten(1, 2))
        features = flat.unflatten(1, (every, views)).transpose(0, 1)  # [world, point, view, channel]
        at = encoded(points, FREQUENCIES)
        merged = self.views(features.flatten(0, 1), at.flatten(0, 1)[:, None])
        return self.colour(torch.cat([merged, at.flatten(0, 1)], -1)).view(*points.shape)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Attention over views and their mean, on worlds where hiding can be seen, and where it cannot."""
    expected = (
        f"colours of points that two or more of {VIEWS} views do not see, in worlds not trained on: attention is above "
        f"the mean by {GAIN} dB or more, and two standard errors over worlds, in each training; where discs have "
        f"any radius, by at most half as much"
    )
    gains: dict[str, list[Tensor]] = {kind: [] for kind in RADII}
    levels: dict[tuple[str, str], list[float]] = {(kind, merge): [] for kind in RADII for merge in MERGES}
    hidden, grey, shown = 0.0, 0.0, None  # of the first run
    for kind, radii in RADII.items():
        for run in range(RUNS[scale] * seed, RUNS[scale] * (seed + 1)):
            data = worlds(TRAIN + HELD, radii, run)
            truth, views, there = (data[name][TRAIN:] for name in ("colours", "views", "there"))
            told = {merge: trained(merge, data, STEPS[scale], run) for merge in MERGES}
            judged = there & (views <= VIEWS - 2)
            for merge, colours in told.items():
                levels[kind, merge].append(level(per_world(colours - truth, there)))
            gains[kind].append(gain(*(per_world(colours - truth, judged) for colours in told.values())))
            if not shown:
                hidden = float(judged.sum() / there.sum())
                grey = level(per_world(data["colours"][:TRAIN][data["there"][:TRAIN]].mean(0) - truth, there))
                shown = there, [("truth", truth), *told.items()]
    better, control = torch.stack(gains["one radius"]), torch.stack(gains["any radius"])
    holds = bool((better[:, 0] >= GAIN).all() and (better[:, 0] - 2 * better[:, 1] > 0).all())
    holds = holds and float(control[:, 0].mean()) <= float(better[:, 0].mean()) / 2
    said = {which: float(np.mean(of)) for which, of in levels.items()}
    least = min(said["one radius", merge] for merge in MERGES)
    measured = (
        f"attention above the mean on hidden points by {_listed(better)} dB (± over worlds), where discs have any "
        f"radius by {_listed(control)} dB; on all points "
        + "; ".join(f"{kind}: " + ", ".join(f"{merge} {said[kind, merge]:.1f}" for merge in MERGES) for kind in RADII)
        + " dB"
    )
    premises = [
        Premise("points are hidden", "40% or more from two views or more", f"{hidden:.0%}", hidden >= 0.4),
        Premise("both learn", f"6 dB or more above one grey ({grey:.1f} dB)", f"{least:.1f} dB", least >= grey + 6),
    ]

    assert shown is not None

    def draw(figure: Any) -> None:
        there, rows = shown
        for axes, (name, colours) in zip(figure.subplots(len(rows), 1), rows, strict=True):
            axes.imshow(colours[:12].where(there[:12, :, None], 1.0).flatten(0, 1)[None].numpy(), aspect="auto")
            axes.set(title=f"{name}: what a fifth camera sees of 12 worlds", xticks=[], yticks=[])

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def per_world(off: Tensor, points: Tensor) -> Tensor:
    """Mean squared error of each world over these of its points, NaN where it has none. [world]"""
    return (off.square().mean(-1) * points).sum(1) / points.sum(1)


def level(errors: Tensor) -> float:
    """PSNR in dB of a mean over worlds."""
    return float(-10 * errors.nanmean().log10())


def gain(better: Tensor, worse: Tensor) -> Tensor:
    """Difference of two levels in dB, and its standard error over worlds, by its linear part. [2]"""
    some = ~better.isnan()
    parts = worse[some] / worse[some].mean() - better[some] / better[some].mean()
    return torch.tensor([level(better) - level(worse), 10 / np.log(10) * mean(parts).error])


def _listed(gains: Tensor) -> str:
    return ", ".join(f"{value:+.2f} ± {error:.2f}" for value, error in gains.tolist())


def worlds(n: int, radii: tuple[float, float], seed: int) -> dict[str, Tensor]:
    """Pictures, cameras and the pixels of one more view, of `n` worlds."""
    lens = torch.tensor([[PIXELS, 0, (PIXELS - 1) / 2], [0, PIXELS, 0], [0, 0, 1.0]]).expand(VIEWS, 3, 3)
    made: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for index in range(n):
        world = flatland.discs(3, radius=radii, seed=seed, index=index)
        draws = np.random.default_rng((seed, index))
        middle, angles = draws.uniform(0, 2 * np.pi), draws.uniform(-ARC, ARC, VIEWS)
        angles = middle + angles
        cameras = [flatland.camera(angle, pixels=PIXELS) for angle in angles]
        pictures = np.stack([flatland.trace(world, *of).colours for of in cameras])
        target = flatland.trace(world, *flatland.camera(middle, pixels=PIXELS))
        there = target.disc >= 0
        at = np.where(there[:, None], target.points, 0.0)
        views = sum(flatland.visible(world, at, of[0]).astype(int) for of in cameras)
        points = torch.tensor(np.pad(at, ((0, 0), (0, 1)))).float()
        places, depth = project(points, torch.stack([pose(angle) for angle in angles]), lens)
        found = (torch.tensor(pictures).float().mT[:, :, None], places, depth, points)
        found += (torch.tensor(target.colours).float(), torch.tensor(views), torch.tensor(there))
        for name, value in zip(made, found, strict=True):
            made[name].append(value)
    return {name: torch.stack(values) for name, values in made.items()}


def pose(angle: float) -> Tensor:
    """Of `flatland.camera`, in space: from camera to world [4, 4]."""
    forward, right = -np.array([np.cos(angle), np.sin(angle), 0]), np.array([-np.sin(angle), np.cos(angle), 0])
    found = np.eye(4)
    found[:3, 0], found[:3, 1], found[:3, 2], found[:3, 3] = right, np.cross(forward, right), forward, -2 * forward
    return torch.tensor(found).float()


def trained(merge: str, data: dict[str, Tensor], steps: int, seed: int) -> Tensor:
    """Colours that a model says of the worlds held out, which it was not trained on. [world, point, 3]"""
    torch.manual_seed(seed)
    model, inputs = Told(merge), [data[name] for name in NAMES[:4]]
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(TRAIN, (BATCH,), generator=draws)
        optimiser.zero_grad()
        there = data["there"][some]
        F.mse_loss(model(*(x[some] for x in inputs))[there], data["colours"][some][there]).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return model(*(x[TRAIN:] for x in inputs))
