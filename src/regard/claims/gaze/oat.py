"""People search for one of sixteen things in a scene: does a model of objects say where they look, in new scenes?

Hybrid search (Ruarte et al., 2025), real data without pictures: of each thing its kind, its box and its place are
known. Scenes are split in three; the network learns on the first, is kept as it was when paths drawn from it behaved
most like people's on the second, and is scored on the third. Behaviour is the paper's: how many paths end at the
target, how long they are, and which shares of looks are new, stay, and come back. So that it learns distances rather
than the few layouts, each is mirrored, stretched and moved a little, anew each time that it is shown. Without pictures
the map of the pixel baseline is made of what is known to stand out: the things, smoothed by about one degree, times the
density of the training scenes' fixations. Paths are cut to the length of the person's that they are compared with,
since baselines are told where the target is and the network has to learn it. What is compared is drawn: paths from the
network, pixels from the map, and as the control things in any order until the target. Likeliest paths and the walk to
the nearest thing, which is told the target, are reported: with sixteen things that walk is more alike to people than
they are to each other. Two designs were tried before: one asked to beat it; the other kept the network of the least
loss, which seldom ends at the target, and had a control that knew each person's length, being cut there and nowhere
else. What decides is the sequence score, by which paths drawn from the network are no more alike to people's than
pixels from the map; by string editing they are. People still are more alike to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...catalog import Finding, Premise
from ...data import loaders
from ...gaze.fixation_map import fixation_map
from ...gaze.oat import OAT, OATConfig, object_sequence, padded
from ...gaze.sequence_score import sequence_score
from ...gaze.string_edit import string_edit
from .._data import folder
from .._measure import mean

SCALES = "small", "large"
WITHIN = 60  # pixels from a box that still count as a look at it
CELL, DEGREE = 16, 2  # pixels of a cell of the map; cells of a degree, roughly
LONGEST, DRAWN = 30, 20  # looks of a path; paths drawn for a scene
LEARNED = 20  # looks of a path that are learned
STEPS, CHECKS, BATCH, RATE, WARM = {"small": 800, "large": 8000}, 10, 32, 1.5e-3, 50
METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "sequence score": sequence_score,
    "string edit": string_edit,
}
OWN, AGAINST = "OAT, drawn", ("pixel map, drawn", "any order, drawn")

EXPECTED = (
    "in scenes not trained on, by sequence score and by string editing, paths drawn from the network are more alike to "
    "people's than pixels drawn from a saliency map and than things in any order until the target: by two standard "
    "errors over scenes, each"
)


@dataclass(frozen=True, eq=False)
class Searched:
    """A scene, and how people searched it."""

    things: tuple[str, ...]
    boxes: NDArray[np.float32]
    size: tuple[int, int]
    target: int
    scanpaths: list[loaders.Scanpath]
    paths: list[list[int]]  # of things


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A transformer of objects beats the nearest object and a pixel map on scenes that it has not seen."""
    rng = np.random.default_rng(seed)
    scenes = _scenes()
    order = rng.permutation(len(scenes))
    fifth, eighth = len(scenes) // 5, len(scenes) // 8
    test, valid, train = ([scenes[i] for i in part] for part in np.split(order, [fifth, fifth + eighth]))
    kinds = sorted({kind for scene in train for kind in scene.things})
    model = _trained(train, valid, kinds, STEPS[scale], seed)

    seen = fixation_map([p for s in train for p in s.scanpaths], _shape(test[0]), sigma=DEGREE)
    ways: dict[str, Callable[[Searched], list[list[int]]]] = {
        "OAT, likeliest": lambda scene: model.generate(*_inputs([scene], kinds), longest=LONGEST, greedy=True),
        "OAT, drawn": partial(_drawn, model, kinds, generator=torch.Generator().manual_seed(seed)),
        "nearest thing": lambda scene: [_nearest(scene)],
        "pixel map, winner": lambda scene: [_pixels(scene, seen, None)],
        "any order, drawn": lambda scene: [_any(scene, rng) for _ in range(DRAWN)],
        "pixel map, drawn": lambda scene: [_pixels(scene, seen, rng) for _ in range(DRAWN)],
    }
    made = {name: [way(scene) for scene in test] for name, way in ways.items()}
    scores = {  # metric -> way -> [scene]
        metric: {name: _alike(paths, test, score) for name, paths in made.items()} | {"people": _people(test, score)}
        for metric, score in METRICS.items()
    }
    gains = {f"{name}, {other}": mean(of[OWN] - of[other]) for name, of in scores.items() for other in AGAINST}
    holds = all(gain.above() for gain in gains.values())
    room = {f"{name}, {other}": mean(of["people"] - of[other]) for name, of in scores.items() for other in AGAINST}
    least = min(room, key=lambda name: room[name].value)
    alike = Premise(
        "people are more alike to each other than baselines are to them",
        "by two standard errors, in both metrics",
        f"at least {room[least]:.3f} ({least})",
        all(difference.above() for difference in room.values()),
    )
    figures = "; ".join(
        f"{metric}: " + ", ".join(f"{name} {values.mean():.3f}" for name, values in of_way.items())
        for metric, of_way in scores.items()
    )
    looks = {"OAT": made["OAT, drawn"], "people": [scene.paths for scene in test]}
    lengths = ", ".join(f"{name} {np.mean([len(p) for of in ps for p in of]):.1f}" for name, ps in looks.items())
    more = ", ".join(f"{name} {gain:.3f}" for name, gain in gains.items())
    measured = f"{figures} ({len(test)} new scenes). {OWN}, above: {more}. Looks a path: {lengths}"
    return Finding(holds, measured, EXPECTED, seed, premises=[alike], draw=partial(_draw, test[0], made, scores))


def _scenes() -> list[Searched]:
    where = folder("gaze_search_hybrid")
    laid = {scene.image: scene for scene in loaders.search_scenes(where)}
    trials: dict[tuple[str, int], list[loaders.SearchTrial]] = defaultdict(list)
    for trial in loaders.visual_search(where):
        target = int(np.abs(laid[trial.image].boxes - trial.target_box).sum(1).argmin())
        trials[trial.image, target].append(trial)
    found = []
    for (image, target), of_scene in sorted(trials.items()):
        scene = laid[image]
        # Without the first fixation, which is in the middle, where every trial and every walk begins.
        looks = [loaders.Scanpath(t.fixations[1:], t.size) for t in of_scene]
        paths = [object_sequence(of_trial, scene.boxes, within=WITHIN) for of_trial in looks]
        kept = [(t.scanpath, path) for t, path in zip(of_scene, paths) if path]
        found.append(Searched(scene.things, scene.boxes, scene.size, target, *map(list, zip(*kept))))
    return found


def _inputs(scenes: Sequence[Searched], kinds: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, places and targets of scenes, all of sixteen things."""
    boxes = np.stack([scene.boxes for scene in scenes])
    size = np.array(scenes[0].size)
    kind = np.array([[[thing == kind for kind in kinds] for thing in scene.things] for scene in scenes], np.float32)
    extent = (boxes[..., 2:] - boxes[..., :2]) / 100
    places = (boxes[..., 2:] + boxes[..., :2]) / 2 / size
    features = np.concatenate([kind, extent], -1)
    target = torch.tensor([scene.target for scene in scenes])
    return torch.from_numpy(features).float(), torch.from_numpy(places).float(), target


def _trained(train: list[Searched], valid: list[Searched], kinds: list[str], steps: int, seed: int) -> OAT:
    torch.manual_seed(seed)
    config = OATConfig(
        features=len(kinds) + 2, dim=96, feedforward=128, encoder_layers=2, decoder_layers=2, longest=LONGEST + 20
    )
    model = OAT(config)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    inputs, of_scene = _inputs(train, kinds), [i for i, scene in enumerate(train) for _ in scene.paths]
    paths, lengths = padded([path for scene in train for path in scene.paths])
    people = _behaviour([scene.paths for scene in valid], valid)
    generator = torch.Generator().manual_seed(seed)
    best, least = deepcopy(model.state_dict()), float("inf")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM) * (1 + np.cos(np.pi * step / steps)) / 2
        rows = torch.randint(len(of_scene), (BATCH,), generator=generator)
        features, places, target = (x[torch.tensor(of_scene)[rows]] for x in inputs)
        longest = min(LEARNED, int(lengths[rows].max()))
        places = _moved(places, generator)
        model.loss(features, places, target, paths[rows, :longest], lengths[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // CHECKS) == 0:
            model.eval()
            drawn = [_drawn(model, kinds, scene, generator=generator) for scene in valid]
            model.train()
            unlike = float(np.abs(_behaviour(drawn, valid) / people - 1).mean())
            if unlike < least:
                best, least = deepcopy(model.state_dict()), unlike
    model.load_state_dict(best)
    return model.eval()


def _behaviour(paths: list[list[list[int]]], scenes: list[Searched]) -> NDArray[np.float64]:
    """How many paths end at the target, their looks, and the shares of looks that are new, stay and come back."""
    found = []
    for of_scene, scene in zip(paths, scenes):
        for path in of_scene:
            new, stay = len(set(path)) / len(path), sum(a == b for a, b in pairwise(path)) / len(path)
            found.append((path[-1] == scene.target, len(path), new, stay, 1 - new - stay))
    return np.array(found, float).mean(0)


def _moved(places: Tensor, generator: torch.Generator) -> Tensor:
    """Each scene mirrored left to right or not, stretched by up to 15% along each axis, and moved by up to 5%."""
    flip, stretch, shift = torch.rand(3, len(places), 1, 2, generator=generator)
    sign = torch.where(flip < 0.5, 1.0, -1.0) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1.0])
    return (places - 0.5) * sign * (0.85 + 0.3 * stretch) + 0.45 + 0.1 * shift


def _drawn(model: OAT, kinds: list[str], scene: Searched, *, generator: torch.Generator) -> list[list[int]]:
    inputs = [x.repeat_interleave(DRAWN, 0) for x in _inputs([scene], kinds)]
    return model.generate(*inputs, longest=LONGEST, generator=generator)


def _nearest(scene: Searched) -> list[int]:
    """From the middle to the nearest thing not yet looked at, and on, until the target."""
    middles = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
    at, left, path = np.array(scene.size) / 2, set(range(len(middles))), []
    while scene.target in left:
        path.append(min(left, key=lambda thing: float(np.linalg.norm(middles[thing] - at))))
        left.remove(path[-1])
        at = middles[path[-1]]
    return path


def _any(scene: Searched, rng: np.random.Generator) -> list[int]:
    """Things in any order, each once, until the target."""
    order = rng.permutation(len(scene.boxes)).tolist()
    return order[: order.index(scene.target) + 1]


def _shape(scene: Searched) -> tuple[int, int]:
    return scene.size[1] // CELL, scene.size[0] // CELL


def _pixels(scene: Searched, seen: NDArray[np.float64], rng: np.random.Generator | None) -> list[int]:
    """Pixels of a saliency map, each with its surroundings put out of play once it was looked at, until the target."""
    from scipy.ndimage import gaussian_filter

    salient = np.zeros(seen.shape)
    for left, top, right, bottom in (scene.boxes / CELL).round().astype(int):
        salient[top:bottom, left:right] = 1
    salient = gaussian_filter(salient, DEGREE) * seen
    row, column = np.indices(seen.shape)
    path: list[int] = []
    while salient.any() and len(path) < LONGEST and scene.target not in path:
        flat = salient.ravel()
        at = int(flat.argmax()) if rng is None else int(rng.choice(flat.size, p=flat / flat.sum()))
        y, x = divmod(at, seen.shape[1])
        salient[np.hypot(row - y, column - x) * CELL <= WITHIN] = 0
        middle = np.array([[x + 0.5, y + 0.5]]) * CELL
        path += object_sequence(loaders.Scanpath(middle, scene.size), scene.boxes, within=WITHIN)
    return path


def _alike(made: list[list[list[int]]], test: list[Searched], score: Callable[..., float]) -> NDArray[np.float64]:
    """Mean score of a scene's paths beside people's. [scene]"""
    return np.array(
        [np.mean([score(a[: len(b)], b) for a in paths for b in scene.paths]) for paths, scene in zip(made, test)]
    )


def _people(test: list[Searched], score: Callable[..., float]) -> NDArray[np.float64]:
    """Of each with ten others of the scene. [scene]"""
    return np.array(
        [
            np.mean(
                [
                    score(s.paths[(i + k) % len(s.paths)][: len(a)], a)
                    for i, a in enumerate(s.paths)
                    for k in range(1, 11)
                ]
            )
            for s in test
        ]
    )


def _draw(scene: Searched, made: dict[str, Any], scores: dict[str, dict[str, NDArray]], figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    middles = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
    for i, (a, b, c, d) in enumerate(scene.boxes):
        colour = "tab:red" if i == scene.target else "0.7"
        left.fill([a, c, c, a], [b, b, d, d], facecolor="none", edgecolor=colour, lw=2 if i == scene.target else 1)
    for paths, colour, name in (
        (scene.paths[:12], "tab:orange", "people"),
        (made["OAT, drawn"][0][:12], "tab:blue", "OAT"),
    ):
        for n, path in enumerate(paths):
            at = np.concatenate([[np.array(scene.size) / 2], middles[path]]) + (6 if name == "OAT" else -6)
            left.plot(*at.T, "-", color=colour, alpha=0.35, lw=1.2, label=None if n else name)
    left.set(xlim=(0, scene.size[0]), ylim=(scene.size[1], 0), aspect="equal", xticks=[], yticks=[])
    left.set_title("A new scene, its target red, twelve paths of each", fontsize=10)
    left.legend(frameon=False, loc="lower right")
    names = ["people", *made]
    for i, (metric, of_way) in enumerate(scores.items()):
        middle = [of_way[name].mean() for name in names]
        error = [2 * of_way[name].std(ddof=1) / len(of_way[name]) ** 0.5 for name in names]
        right.errorbar(middle, np.arange(len(names)) + 0.12 * (2 * i - 1), xerr=error, fmt="o", label=metric, capsize=3)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(title="Alike to people, new scenes", xlabel="mean over scenes, two standard errors")
    right.grid(axis="x", alpha=0.3)
    right.legend(frameon=False)
