"""Xu et al. (arXiv:1502.03044): attention lands on the object that a word names, learned softly or by draws.

Scenes of two objects, of different colours and shapes; captions of four words, such as "red circle blue ring", in
random order of mention, so that the number of a word does not say where to look. As in the paper the network of the
places is frozen: 8 x 8 of them, told first which colour and shape they show. (Patches of the viewer, tried before, tell
of the whole picture wherever one looks.) Judged on the model's own captions of scenes held out, at the words that name
an object there: whether the place of the highest weight has its centre in the box of the object that is named, or in
that of the other. The controls: weights that are all the same, and the hard way without REINFORCE's gradient. Five
pilots on other seeds chose the places' network, four colours and shapes, the steps, and the weight of the penalty: 1
spread the attention of four words out. Words know of the one before them only after they have looked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import Dials, Pictures, Scene, render, sample
from ...models.show_attend_tell import Captioner, show_attend_tell
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
STEPS, TOLD = {"small": 900, "large": 5000}, {"small": 400, "large": 2000}
TRAIN, HELD, BATCH, RATE, PENALTY, SIZE, SIDE = 3000, 300, 64, 4e-3, 0.1, 32, 8
SHAPES = ("circle", "square", "triangle", "ring")
DIALS = Dials(objects=(2, 2), shapes=SHAPES, colours=("red", "yellow", "green", "blue"))
PARTS = ("colour", DIALS.colours), ("shape", SHAPES)
WORDS = ("", *DIALS.colours, *SHAPES)  # word 0 ends a caption


class Blind(Captioner):
    """Looks at all places alike."""

    def _weights(self, places: Tensor, hidden: Tensor) -> Tensor:
        return torch.full(places.shape[:2], 1 / places.shape[1])


@dataclass
class Seen:
    """What a captioner says of held-out scenes, and where it looks."""

    exact: Tensor  # whether both objects are named, and nothing else [scene]
    named: Tensor  # share of the two objects that are named, colour with shape [scene]
    own: Mean  # share of words that name an object whose place lies in its box, error over scenes
    other: Mean
    weights: Tensor  # [scene, word, place]
    words: Tensor  # [scene, word]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Four captioners, equal steps: soft, hard, blind, and hard whose draws get no gradient."""
    expected = (
        "of two objects in scenes held out, both named in 80% or more of the captions, softly and by draws; the place "
        "of the highest weight lies in the named object's box at 70% or more of the words, and 3 times as often as in "
        "the other's; without the draws' gradient within 10 points of the boxes' area"
    )
    scenes = [_distinct(seed, i) for i in range(TRAIN + HELD)]
    pictures = render(scenes[TRAIN:], SIZE)
    torch.manual_seed(seed)
    grid = _places(scenes, render(scenes, SIZE).tensor() * 2 - 1, TOLD[scale])
    ways = {
        "soft": ("soft", {"penalty": PENALTY}),
        "hard": ("hard", {}),
        "blind": ("soft", {"penalty": 0.0}),
        "hard, no gradient": ("hard", {"reinforce": 0.0, "entropy": 0.0}),
    }
    found = {}
    for name, (attention, knobs) in ways.items():
        torch.manual_seed(seed)
        model = show_attend_tell(
            len(WORDS), dim=grid.shape[-1], hidden=96, embedding=48, attention=attention, dropout=0.0, **knobs
        )
        if name == "blind":
            model.__class__ = Blind
        _train(model, grid[:TRAIN], scenes[:TRAIN], STEPS[scale], seed)
        found[name] = _judge(model.eval(), grid[TRAIN:], scenes[TRAIN:], pictures)
    area = float(torch.stack([_inside(pictures, i).float().mean() for i in range(HELD)]).mean())
    soft, hard, blind, undirected = found.values()
    need = mean(soft.named - blind.named)
    holds = all(
        mean(way.exact).value >= 0.8 and way.own.value >= 0.7 and way.own.value >= 3 * way.other.value
        for way in (soft, hard)
    )
    holds = holds and abs(undirected.own.value - area) <= 0.1
    measured = "; ".join(
        f"{name}: both named in {mean(of.exact):.1%}, at the named object {of.own:.1%}, at the other {of.other:.1%}"
        for name, of in found.items()
        if name != "blind"
    )
    measured += f"; boxes are {area:.1%} of the places; blind: both named in {mean(blind.exact):.1%}"
    looking = Premise(
        "looking is needed",
        "objects named by the soft way 20 points above the same without a choice of places",
        f"{mean(soft.named):.1%} and {mean(blind.named):.1%}, {need:.1%} apart",
        need.value >= 0.2 and need.above(),
    )

    def draw(figure: Any) -> None:
        panels = figure.subplots(4, 5)
        for row, (way, name) in enumerate(((soft, "soft"), (soft, ""), (hard, "hard"), (hard, ""))):
            at = row % 2
            panels[row, 0].imshow(pictures.pixels[at])
            panels[row, 0].set_ylabel(name)
            for word, axes in enumerate(panels[row, 1:]):
                axes.imshow(pictures.pixels[at], alpha=0.4, extent=(0, SIDE, SIDE, 0))
                axes.imshow(
                    way.weights[at, word].view(SIDE, SIDE), cmap="inferno", alpha=0.7, extent=(0, SIDE, SIDE, 0)
                )
                axes.set_title(WORDS[int(way.words[at, word])], fontsize=9)
            for axes in panels[row]:
                axes.set_xticks([])
                axes.set_yticks([])

    return Finding(holds, measured, expected, seed, premises=[looking], draw=draw)


def _distinct(seed: int, index: int) -> Scene:
    """A scene whose two objects share neither colour nor shape."""
    scene = sample(DIALS, seed, index)
    first, second = scene.objects
    lot = index % 3 + 1
    for what, names in PARTS:
        if getattr(first, what) == getattr(second, what):
            other = names[(names.index(getattr(first, what)) + lot) % len(names)]
            scene = scene.but(1, **{what: other})
    return scene


def _places(scenes: list[Scene], pixels: Tensor, steps: int) -> Tensor:
    """What a convolutional network makes of each place, after it was told what the places show. [scene, place, dim]"""
    parts: list[nn.Module] = []
    for i, (channels, out) in enumerate(pairwise((3, 24, 48, 48))):
        parts += [*_nets.normed(channels, out, 2 if i < 2 else 1), nn.ReLU()]
    body, read = nn.Sequential(*parts), nn.Conv2d(48, len(WORDS) + 1, 1)
    shown = _shown(scenes)
    optimiser = torch.optim.AdamW([*body.parameters(), *read.parameters()], 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(TRAIN, (BATCH,))
        colour, shape = read(body(pixels[some])).split([len(DIALS.colours) + 1, len(SHAPES) + 1], 1)
        wanted = shown[some]
        optimiser.zero_grad()
        (F.cross_entropy(colour, wanted[:, 0]) + F.cross_entropy(shape, wanted[:, 1])).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([body.eval()(some) for some in pixels.split(500)]).flatten(2).mT
    at = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)
    where = torch.cat([F.one_hot(axis, SIDE).float() for axis in at], 1)
    return torch.cat([found / found.std(), where.expand(len(found), -1, -1)], -1)


def _shown(scenes: list[Scene]) -> Tensor:
    """The number of the colour and of the shape at the middle of each place, 0 for none. [scene, 2, row, column]"""
    middle = (torch.arange(SIDE) * SIZE) // SIDE + SIZE // SIDE // 2
    owner = torch.from_numpy(render(scenes, SIZE).owner).long()[:, middle][:, :, middle] + 1
    kinds = torch.tensor(
        [
            [[0, *(names.index(getattr(o, what)) + 1 for o in scene.objects)] for what, names in PARTS]
            for scene in scenes
        ]
    )
    return kinds.gather(2, owner.flatten(1)[:, None].expand(-1, 2, -1)).unflatten(2, (SIDE, SIDE))


def _train(model: Captioner, grid: Tensor, scenes: list[Scene], steps: int, seed: int) -> None:
    """Models of one seed see the same scenes, and captions in the same order."""
    named = torch.tensor([[[WORDS.index(o.colour), WORDS.index(o.shape)] for o in scene.objects] for scene in scenes])
    lots, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        some = torch.randint(len(grid), (BATCH,), generator=lots)
        swap = torch.rand(BATCH, generator=lots) < 0.5
        words = torch.where(swap[:, None, None], named[some].flip(1), named[some]).flatten(1)
        optimiser.zero_grad()
        model.loss(grid[some], words, generator=draws).backward()
        optimiser.step()
        schedule.step()


def _inside(pictures: Pictures, i: int) -> Tensor:
    """Which places have their centre in the box of each object of picture `i`. [object, place]"""
    centre = (torch.arange(SIDE) + 0.5) * SIZE / SIDE
    boxes = torch.as_tensor(pictures.boxes(i)[:2])
    across = (boxes[:, :1] <= centre) & (centre < boxes[:, 2:3])
    down = (boxes[:, 1:2] <= centre) & (centre < boxes[:, 3:])
    return (down[:, :, None] & across[:, None]).flatten(1)


@torch.no_grad()
def _judge(model: Captioner, grid: Tensor, scenes: list[Scene], pictures: Pictures) -> Seen:
    words, weights = model.generate(grid, 4)
    words = F.pad(words, (0, 4 - words.shape[1]))
    exact, named, own, other = [], [], [], []
    for i, scene in enumerate(scenes):
        said = [WORDS[word] for word in words[i].tolist()]
        true = [(o.colour, o.shape) for o in scene.objects]
        exact.append(float(sorted([tuple(said[:2]), tuple(said[2:])]) == sorted(true)))
        named.append(sum(pair in (tuple(said[:2]), tuple(said[2:])) for pair in true) / 2)
        inside = _inside(pictures, i)
        hits = []
        for word, name in enumerate(said):
            at = int(weights[i, word].argmax()) if word < weights.shape[1] else 0
            hits += [
                (inside[k, at], inside[1 - k, at]) for k, o in enumerate(scene.objects) if name in (o.colour, o.shape)
            ]
        if hits:
            pointed = torch.tensor(hits).float().mean(0)
            own.append(float(pointed[0]))
            other.append(float(pointed[1]))
    return Seen(torch.tensor(exact), torch.tensor(named), mean(own), mean(other), weights, words)
