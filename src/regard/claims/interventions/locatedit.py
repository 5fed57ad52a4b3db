"""Edits of what the zoo's painter paints, kept to where the words are that changed.

On Soni, Soni and Rambhatla, LOCATEdit (arXiv:2503.21541). A caption of two objects has the colour of the second
replaced, and both are painted from the same noise. The object is where the plain picture, or the one painted of the new
caption alone, shows its colour. Masks are cut to have as many places as the object, so that only their shapes differ.
Control: the graph of self-attention with its places in a random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Scene, caption
from ...interventions import painted
from ...interventions.locatedit import Map, locatedit
from ...loading import load
from ...seam import intervene
from ...zoo.recipes import viewer
from ...zoo.recipes.painter import shown
from .. import _painted
from .._measure import Mean, mean

SCENES = {"small": 24, "large": 300}
STEPS = 6
LEAST, MOST = 0.3, 0.8  # overlap of raw masks, between which there is something to smooth
EXPECTED = (
    "smoothed masks overlap the edited object by 0.05 more than raw ones, and than with the graph's places shuffled, "
    "at the same area; pixels outside the object change less by a fifth than with raw masks; the new pair is named no "
    "less often by two points, each by two standard errors"
)


class Shuffled(locatedit):
    """The same with the places of the graph in another order."""

    def add(self, cross: Map, graph: Map) -> Tensor:
        found, grid = graph
        order = torch.randperm(found.shape[1], generator=torch.Generator().manual_seed(self.step))
        return super().add(cross, (found[:, order][:, :, order], grid))


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Smoothing over self-attention puts an edit where it belongs, and leaves the rest alone."""
    model, pipeline = load("painter")
    cases = [case for case in map(partial(_edited, seed), _painted.scenes(SCENES[scale], seed)) if case is not None]
    ways: dict[str, tuple[type[locatedit], dict[str, float]]] = {
        "none": (locatedit, {"cut": -1.0}),
        "raw": (locatedit, {"strength": 0.0}),
        "smoothed": (locatedit, {}),
        "shuffled": (Shuffled, {}),
    }
    overlap: dict[str, list[float]] = {way: [] for way in ways}
    changed: dict[str, list[float]] = {way: [] for way in ways}
    pictures: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    for i, (old, new) in enumerate(cases):
        inputs = {"prompt": [caption(old), caption(new)], "num_inference_steps": STEPS}
        where = None
        for way, (kind, knobs) in ways.items():
            method = kind.fit(model, inputs, pipeline, **knobs)
            with intervene(model, method):
                kept, edited = painted(pipeline, inputs, seed=seed + i, callback_on_step_end=method.on_step_end)
            if where is None:  # painted of the new caption alone
                where = _object(kept, old) | _object(edited, new)
            if not where.any() or where.all():
                break  # nothing of it was painted
            assert method.sum is not None
            overlap[way].append(_overlap(method.sum.sum(0), where))
            changed[way].append(float(np.abs(edited - kept).mean(-1)[~where].mean()))
            pictures[way].append(edited)
    scenes = [new for (_, new), _ in zip(cases, pictures["none"])]
    named = {way: _named(np.stack(some), scenes) for way, some in pictures.items()}
    iou = {way: torch.tensor(some) for way, some in overlap.items()}
    off = {way: torch.tensor(some) for way, some in changed.items()}
    gains = {way: mean(iou["smoothed"] - iou[way]) for way in ("raw", "shuffled")}
    saved = mean(0.8 * off["raw"] - off["smoothed"])
    right = mean(named["smoothed"] - named["raw"])
    raw = float(iou["raw"].mean())
    premise = Premise(
        "raw attention to the words finds the object in part: overlap",
        f"{LEAST} to {MOST}",
        f"{raw:.2f}",
        LEAST <= raw <= MOST,
    )
    measured = (
        f"overlap of masks with the object {raw:.3f} raw, {iou['smoothed'].mean():.3f} smoothed "
        f"({gains['raw']:+.3f}), {iou['shuffled'].mean():.3f} over a shuffled graph ({gains['shuffled']:+.3f}); change "
        f"outside the object "
        + ", ".join(f"{way} {float(some.mean()):.4f}" for way, some in off.items())
        + f" (four fifths of raw, less smoothed: {saved:+.4f}); new pair named "
        + ", ".join(f"{way} {float(some.mean()):.0%}" for way, some in named.items())
        + f"; {len(scenes)} edits"
    )
    holds = (
        all(gain.value >= 0.05 and gain.above() for gain in gains.values()) and saved.above() and right.value >= -0.02
    )
    drawing = partial(_draw, {way: mean(some) for way, some in iou.items()}, {way: mean(s) for way, s in off.items()})
    return Finding(holds, measured, EXPECTED, seed, premises=[premise], draw=drawing)


def _edited(seed: int, scene: Scene) -> tuple[Scene, Scene] | None:
    """The scene, and the same with another colour of the second object; None where both have one colour."""
    one, two = scene.objects
    if one.colour == two.colour:
        return None
    left = [colour for colour in COLOURS if colour not in (one.colour, two.colour)]
    chosen = left[np.random.default_rng((seed, int(1e6 * (one.x + two.y)))).integers(len(left))]
    return scene, replace(scene, objects=(one, replace(two, colour=chosen)))


def _object(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Where a picture shows the colour of the scene's second object. bool [row, column]"""
    pixels = (255 * picture).round().astype(np.uint8)
    return shown(pixels, [o.colour for o in scene.objects])[scene.objects[1].colour]


def _overlap(found: Tensor, where: np.ndarray) -> float:
    """Intersection over union of the object's places with as many of the map's highest."""
    rows, columns = found.shape
    side = where.shape[0] // rows
    covered = torch.from_numpy(where).float().unflatten(0, (rows, side)).unflatten(2, (columns, side)).mean((1, 3))
    own = (covered >= 0.25).flatten()
    if not own.any():
        own = (covered == covered.max()).flatten()
    mine = torch.zeros_like(own)
    mine[found.flatten().topk(int(own.sum())).indices] = True
    return float((own & mine).sum() / (own | mine).sum())


def _named(pictures: np.ndarray, scenes: Sequence[Scene]) -> Tensor:
    """Whether the viewer names the second object among as many pairs as there are. [scene]"""
    ranks = _painted.logits(pictures).argsort(1, descending=True).argsort(1)
    wanted = [(viewer.pairs(scene)[1], len(set(viewer.pairs(scene)))) for scene in scenes]
    return torch.tensor([float(row[pair] < n) for row, (pair, n) in zip(ranks, wanted, strict=True)])


def _draw(overlap: dict[str, Mean], change: dict[str, Mean], figure: Any) -> None:
    titles = "overlap with the object", "change outside of it"
    for axes, means, title in zip(figure.subplots(1, 2), (overlap, change), titles):
        axes.bar(list(means), [m.value for m in means.values()], yerr=[2 * m.error for m in means.values()])
        axes.set(title=title)
