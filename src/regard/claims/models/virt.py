"""Li et al. (arXiv:2410.07169): a picture of the outcome tells a policy more than words, and a closer look helps.

A table seen from above: four things of different colours and shapes, each with a notch at one of its sides, drawn in
black. A gripper starts anywhere; it is to go to the thing that it is told and stop at the notch. Told by a picture of
the outcome in another episode (the same kind of thing, with its notch elsewhere, alone on the table), by two words
learned from scratch, or not at all; picture and words with and without a crop around the thing, by its colour as in
the authors' code. Five moves of 0.05 at most are decided at once, 30 in all. The backbone is the zoo's viewer,
frozen: born with sight, but without words. Demonstrations go straight from random places; four pairs of colour and
shape are never instructed. Control: the crop of another thing. One pilot, on another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import Dials, Scene, render, sample
from ...models.virt import Virt, gaze_crop, virt
from ...zoo.recipes import viewer
from .._measure import mean
from .._nets import bars

SCALES = "small", "large"
STEPS = {"small": 250, "large": 10_000}
TRAIN, HELD, BATCH, RATE, THINGS = 500, 150, 64, 2e-3, 4
CHUNK, MOVES, FARTHEST, NEAR, FACTOR, REACH = 5, 30, 0.05, 0.05, 1.5, 0.8
COLOURS, SHAPES = ("red", "yellow", "green", "blue"), ("circle", "square", "diamond", "heart")
UNSEEN = {(colour, shape) for colour, shape in zip(COLOURS, SHAPES, strict=True)}
DIALS = Dials(objects=(THINGS, THINGS), shapes=SHAPES, colours=COLOURS, sizes=("small",))
SIDES = torch.tensor([[0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
WAYS: dict[str, dict[str, Any]] = {
    "picture": {"goal": True},
    "words": {"words": len(COLOURS) + len(SHAPES)},
    "nothing": {},
    "picture, gaze": {"goal": True, "gaze": True},
    "words, gaze": {"words": len(COLOURS) + len(SHAPES), "gaze": True},
}
SEEN_MORE, GAZE_MORE = 0.05, 0.10


class Table:
    """Episodes, as tokens of the backbone: scene, crop, crop of another thing, outcome; words, boxes, where to stop."""

    def __init__(self, backbone: Any, n: int, seed: int, *, unseen: bool) -> None:
        rng = np.random.default_rng((seed, int(unseen)))
        scenes = [_varied(sample(DIALS, seed + unseen * 2**20, i), rng, unseen) for i in range(n)]
        others = [_varied(sample(DIALS, seed + unseen * 2**20, n + i), rng, unseen) for i in range(n)]
        alone = [
            Scene((other.objects[0],), variation=other.variation).but(
                0, colour=scene.objects[0].colour, shape=scene.objects[0].shape
            )
            for scene, other in zip(scenes, others, strict=True)
        ]
        pictures, self.stop, self.shown = _drawn(scenes, rng)
        outcome, stop, _ = _drawn(alone, rng)
        for picture, (x, y) in zip(outcome, stop.tolist(), strict=True):  # the gripper, at rest
            _dot(picture, x, y, 1.0)
        radius = scenes[0].radius(0)
        middle = torch.tensor([[[o.x, o.y] for o in scene.objects] for scene in scenes])
        boxes = torch.cat([middle - radius, middle + radius], -1).clamp(0, 1)
        self.boxes, self.wrong = boxes[:, :1], boxes[:, 1:2]
        self.seen = _tokens(backbone, pictures)[:, None]
        self.near, self.off = (
            _tokens(backbone, gaze_crop(pictures, of[:, 0], factor=FACTOR))[:, None] for of in (self.boxes, self.wrong)
        )
        self.outcome = _tokens(backbone, outcome)
        self.words = torch.tensor(
            [[COLOURS.index(s.objects[0].colour), len(COLOURS) + SHAPES.index(s.objects[0].shape)] for s in scenes]
        )

    def decide(self, model: Virt, some: Tensor, at: Tensor, *, wrong: bool = False) -> Any:
        """What the model would do in these episodes with the gripper there. at: [batch, 2]"""
        c = model.config
        return model.decide(
            self.seen[some],
            [at[:, None]],
            outcome=self.outcome[some] if c.goal else None,
            near=(self.off if wrong else self.near)[some] if c.gaze else None,
            boxes=(self.wrong if wrong else self.boxes)[some] if c.gaze else None,
            words=self.words[some] if c.words else None,
        )


def _varied(scene: Scene, rng: np.random.Generator, unseen: bool) -> Scene:
    """Four things of different colours and shapes; the first is to be handled, and its pair is instructed or not."""
    while True:
        colours, shapes = rng.permutation(COLOURS).tolist(), rng.permutation(SHAPES).tolist()
        if ((colours[0], shapes[0]) in UNSEEN) == unseen:
            break
    for k in range(THINGS):
        scene = scene.but(k, colour=colours[k], shape=shapes[k])
    return scene


def _drawn(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures as the backbone takes them, where the first thing's notch is, in widths, and the pictures as drawn."""
    pictures = viewer.pixels(render(scenes, viewer.SIZE))
    stops = []
    for picture, scene in zip(pictures, scenes, strict=True):
        for k, thing in enumerate(scene.objects):
            x, y = (torch.tensor([thing.x, thing.y]) + REACH * scene.radius(k) * SIDES[rng.integers(4)]).tolist()
            _dot(picture, x, y, -1.0)
            if not k:
                stops.append([x, y])
    return pictures, torch.tensor(stops), (pictures / 2 + 0.5).clamp(0, 1)


def _dot(picture: Tensor, x: float, y: float, value: float) -> None:
    column, row = (max(0, min(viewer.SIZE - 4, round(v * viewer.SIZE) - 2)) for v in (x, y))
    picture[:, row : row + 4, column : column + 4] = value


@torch.no_grad()
def _tokens(backbone: Any, pictures: Tensor) -> Tensor:
    """Patches of the last layer but one, which say what they show. [picture, patch, channel]"""
    found = [
        backbone(pixel_values=some, output_hidden_states=True).hidden_states[-2][:, 1:] for some in pictures.split(100)
    ]
    every = torch.cat(found)
    return every / every.std()


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Five policies, judged by how often they stop at the notch, for pairs that were instructed and that were not."""
    expected = (
        f"of things whose pair was never instructed, the policy told by a picture reaches {SEEN_MORE:.0%} more than "
        f"that told by words, by two standard errors; with gaze it reaches {GAZE_MORE:.0%} more than without; gaze on "
        "another thing is worse than none"
    )
    backbone: Any = zoo.load("viewer")[0]
    table = Table(backbone, TRAIN + HELD, seed, unseen=False)
    fresh = Table(backbone, HELD, seed, unseen=True)
    seen, unseen, models = {}, {}, {}
    for name, parts in WAYS.items():
        torch.manual_seed(seed)
        model = virt(
            torch.nn.Identity(),
            **{"visual": table.seen.shape[-1], "patches": table.seen.shape[2], "dim": 64, "heads": 4, "layers": 2},
            **{"hidden": 128, "dropout": 0.0, "actions": 2, "chunk": CHUNK, "states": (2,), "past": 1},
            **parts,
        )
        models[name] = _train(model, table, STEPS[scale], seed)
        seen[name] = _reached(model, table, torch.arange(TRAIN, TRAIN + HELD), seed)
        unseen[name] = _reached(model, fresh, torch.arange(HELD), seed)
    off = _reached(models["picture, gaze"], fresh, torch.arange(HELD), seed, wrong=True)
    told = mean(unseen["picture"] - unseen["words"])
    closer, misled = mean(unseen["picture, gaze"] - unseen["picture"]), mean(off - unseen["picture"])
    holds = (
        told.value >= SEEN_MORE and told.above() and closer.value >= GAZE_MORE and closer.above() and misled.value < 0
    )
    measured = (
        "; ".join(f"{name}: {mean(seen[name]):.1%} instructed, {mean(unseen[name]):.1%} never" for name in WAYS)
        + f"; picture above words by {told:.1%}, gaze adds {closer:.1%}, gaze on another thing {misled:.1%}"
    )
    blind, words = float(seen["nothing"].mean()), float(seen["words"].mean())
    premises = [
        Premise(
            "the table does not say which",
            f"told nothing, {1 / THINGS + 0.1:.0%} or less",
            f"{blind:.1%}",
            blind <= 1 / THINGS + 0.1,
        ),
        Premise("words can be learned", "50% of instructed pairs", f"{words:.1%}", words >= 0.5),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subfigures(1, 2)
        axes = left.subplots()
        axes.imshow(fresh.shown[0].permute(1, 2, 0), extent=(0, 1, 1, 0))
        for name in ("picture", "picture, gaze"):
            path = _path(models[name], fresh, torch.tensor([0]), torch.tensor([[0.1, 0.1]]))
            axes.plot(path[:, 0, 0], path[:, 0, 1], ".-", label=name)
        axes.plot(*fresh.stop[0].tolist(), "wx", markersize=10, label="to stop at")
        axes.set(xlim=(0, 1), ylim=(1, 0))
        axes.legend(fontsize=8)
        bars(right, {name: [float(of.mean())] for name, of in unseen.items()}, ylabel="reached, pairs never instructed")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _moves(at: Tensor, stop: Tensor) -> Tensor:
    """The next moves straight to the place to stop at. [batch, step, 2]"""
    found = []
    for _ in range(CHUNK):
        way = stop - at
        move = way * (FARTHEST / way.norm(dim=-1, keepdim=True).clamp_min(FARTHEST))
        found.append(move)
        at = at + move
    return torch.stack(found, 1)


def _train(model: Virt, table: Table, steps: int, seed: int) -> Virt:
    lots = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        some = torch.randint(TRAIN, (BATCH,), generator=lots)
        start, share = torch.rand(BATCH, 2, generator=lots), torch.rand(BATCH, 1, generator=lots)
        stop = table.stop[some]
        at = start + share * (stop - start) + 0.02 * torch.randn(BATCH, 2, generator=lots)
        optimiser.zero_grad()
        # in units of the farthest move
        table.decide(model, some, at).loss(_moves(at, stop) / FARTHEST).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _path(model: Virt, table: Table, some: Tensor, at: Tensor, *, wrong: bool = False) -> Tensor:
    """Where the gripper goes. [move, batch, 2]"""
    path = [at]
    for _ in range(MOVES // CHUNK):
        moves = FARTHEST * table.decide(model, some, at, wrong=wrong).actions
        moves = moves * (FARTHEST / moves.norm(dim=-1, keepdim=True).clamp_min(FARTHEST))
        for step in range(CHUNK):
            at = at + moves[:, step]
            path.append(at)
    return torch.stack(path)


def _reached(model: Virt, table: Table, some: Tensor, seed: int, *, wrong: bool = False) -> Tensor:
    """Which episodes end near the place to stop at, two starts each."""
    lots, found = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        at = torch.rand(len(some), 2, generator=lots)
        end = _path(model, table, some, at, wrong=wrong)[-1]
        found.append(((end - table.stop[some]).norm(dim=-1) <= NEAR).float())
    return torch.stack(found).mean(0)
