"""Khoshsirat and Kambhamettu (arXiv:2309.11593): channels weighed by the question outline what it asks about.

Scenes of three shapes in the zoo's viewer, frozen: its maps after the second and the fifth layer, each through a
trained 1x1 convolution and a ReLU (alike in all arms). "What colour is the star?", as the mean of learned word vectors,
asks for the mask of the star. Arms: the block; none; the sentence added to the maps; squeeze-and-excitation by the
pooled picture. Control: the block, asked about another of the shapes. The loss is cross entropy. Settings were chosen
on seed 100, in two pilots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import SHAPES, Dials, Scene, render, sample, split
from ...models.sentence_attention import SentenceGrounding
from ...zoo.recipes import viewer
from .._measure import mean

SCALES = "small", "large"
TRAIN, HELD = {"small": 800, "large": 8000}, 300
STEPS, RUNS, BATCH, RATE = {"small": 220, "large": 4000}, 3, 32, 4e-3
DIALS = Dials(objects=(3, 3), sizes=("medium", "large"))
LAYERS, WIDTH, WORDS = (2, 5), 64, 32  # channels of a map, of a word
ARMS = "block", "none", "added", "picture"


class Added(nn.Module):
    """The sentence as a bias of the map."""

    def __init__(self, sentence_dim: int, channels: int) -> None:
        super().__init__()
        self.map = nn.Linear(sentence_dim, channels)

    def forward(self, maps: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.map(sentence)
        return maps + bias[:, :, None, None], bias


class Squeezed(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): channels weighed by the mean of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(channels, channels // 16), nn.ReLU(), nn.Linear(channels // 16, channels), nn.Sigmoid()
        )

    def forward(self, maps: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.score(maps.mean((2, 3)))
        return maps * weights[:, :, None, None], weights


class Plain(nn.Module):
    def forward(self, maps: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        return maps, torch.ones(maps.shape[:2])


class Asked(nn.Module):
    """Word vectors, the convolutions, and the model around them."""

    def __init__(self, arm: str, words: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, WORDS, mode="mean")
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(viewer.config().hidden_size, WIDTH, 1), nn.ReLU()) for _ in LAYERS
        )
        self.model = SentenceGrounding(WORDS, [WIDTH] * len(LAYERS))
        if arm != "block":
            made = {"none": Plain, "added": lambda: Added(WORDS, WIDTH), "picture": lambda: Squeezed(WIDTH)}[arm]
            self.model.blocks = nn.ModuleList(made() for _ in LAYERS)

    def forward(self, maps: Tensor, question: Tensor) -> Tensor:
        """maps [batch, layer, channel, row, column], question [batch, word] -> logits [batch, row, column]"""
        each = [part(maps[:, i]) for i, part in enumerate(self.maps)]
        logits = self.model(each, self.words(question), size=(viewer.SIZE,) * 2).logits
        return logits[:, 1] - logits[:, 0]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap of the mask of what is asked about with the true one, of four ways to let the question in."""
    expected = (
        "intersection over union of the block above that without by 0.15 or more and above the sentence added by 0.05 "
        f"or more, in each of {RUNS} trainings and by two standard errors; asked about another shape of the same "
        "picture it falls by half or more"
    )
    model, _ = zoo.load("viewer")
    scenes = _scenes(TRAIN[scale] + HELD, seed)
    maps, masks = _seen(model, scenes)
    order = sorted({word for shape in SHAPES for word in split(_question(shape))})
    asked = torch.tensor([[[order.index(w) for w in split(_question(o.shape))] for o in s.objects] for s in scenes])
    new = slice(TRAIN[scale], None)
    found: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    other, nets = [], {}
    for run in range(RUNS * seed, RUNS * (seed + 1)):
        for arm in ARMS:
            nets[arm] = _trained(arm, maps[: new.start], asked, masks, len(order), STEPS[scale], run)
            said = _said(nets[arm], maps[new], asked[new, 0])
            found[arm].append(_overlap(said, masks[new, 0]))
            if arm == "block":
                other.append(_overlap(_said(nets[arm], maps[new], asked[new, 1]), masks[new, 0]))
    each = {arm: torch.stack(of) for arm, of in found.items()}  # [run, scene]
    gains = {arm: (each["block"] - each[arm]).mean(1) for arm in ARMS[1:]}
    sure = {arm: mean((each["block"] - each[arm]).mean(0)) for arm in ARMS[1:]}
    wrong, right = mean(torch.stack(other).mean(0)), mean(each["block"].mean(0))
    holds = bool((gains["none"] >= 0.15).all() and (gains["added"] >= 0.05).all())
    holds = holds and sure["none"].above(0.15) and sure["added"].above(0.05) and wrong.value <= right.value / 2
    said = ", ".join(f"{arm} {mean(of.mean(0)):.3f}" for arm, of in each.items())
    apart = ", ".join(f"{arm} {sure[arm]:+.3f} (least {float(of.min()):+.3f})" for arm, of in gains.items())
    measured = f"overlap on {HELD} held out: {said}; block above {apart}; asked about another shape {wrong:.3f}"
    told, blind = _told(maps, masks, scenes, new.start), float(each["none"].mean())
    premises = [
        Premise("patches tell the shape", "a linear probe names 80% or more", f"{told:.1%}", told >= 0.8),
        Premise("the picture alone does not tell which is asked", "overlap 0.5 or less", f"{blind:.3f}", blind <= 0.5),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(3, 4)
        picked = list(range(new.start, new.start + 3))
        pictures = render([scenes[i] for i in picked], viewer.SIZE)
        for row, i in enumerate(picked):
            axes[row][0].imshow(np.asarray(pictures.image(row)))
            for k, thing in enumerate(scenes[i].objects):
                shown = _said(nets["block"], maps[i : i + 1], asked[i : i + 1, k]).sigmoid()[0]
                axes[row][k + 1].imshow(shown, vmin=0, vmax=1, cmap="gray")
                axes[row][k + 1].set_title(_question(thing.shape), fontsize=7)
            for axis in axes[row]:
                axis.set_axis_off()

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _question(shape: str) -> str:
    return f"what colour is the {shape}?"


def _scenes(count: int, seed: int) -> list[Scene]:
    drawn = (sample(DIALS, viewer.HELD_OUT + seed, i) for i in range(20 * count))
    kept = (s for s in drawn if len({o.shape for o in s.objects}) == len(s.objects))
    return [next(kept) for _ in range(count)]


@torch.no_grad()
def _seen(model: nn.Module, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Maps [scene, layer, channel, row, column]; masks of the objects [scene, object, row, column]."""
    maps, masks = [], []
    for at in range(0, len(scenes), 200):
        pictures = render(scenes[at : at + 200], viewer.SIZE)
        states = model(pixel_values=viewer.pixels(pictures), output_hidden_states=True).hidden_states
        maps.append(
            torch.stack([states[i][:, 1:].mT.unflatten(2, (viewer.SIZE // viewer.PATCH,) * 2) for i in LAYERS], 1)
        )
        masks += [torch.from_numpy(pictures.masks(i)) for i in range(len(scenes[at : at + 200]))]
    return torch.cat(maps), torch.stack(masks).bool()


def _trained(arm: str, maps: Tensor, asked: Tensor, masks: Tensor, words: int, steps: int, seed: int) -> Asked:
    """All arms of one seed see the same scenes and questions."""
    torch.manual_seed(seed)
    net, generator = Asked(arm, words), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(maps), (BATCH,), generator=generator)
        which = torch.randint(masks.shape[1], (BATCH,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(net(maps[some], asked[some, which]), masks[some, which].float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def _said(net: Asked, maps: Tensor, question: Tensor) -> Tensor:
    return torch.cat([net(*some) for some in zip(maps.split(100), question.split(100), strict=True)])


def _overlap(logits: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of each picture. [scene]"""
    said = logits > 0
    return (said & mask).sum((1, 2)) / (said | mask).sum((1, 2)).clamp_min(1)


def _told(maps: Tensor, masks: Tensor, scenes: list[Scene], train: int) -> float:
    """Share of held-out patches, half or more of one shape, that least squares on the finer layer names."""
    owned = F.avg_pool2d(masks.float(), viewer.PATCH)  # [scene, object, row, column]
    shape = torch.tensor([[SHAPES.index(o.shape) for o in s.objects] for s in scenes])
    at = (owned >= 0.5).nonzero()
    x = F.pad(maps[at[:, 0], -1, :, at[:, 2], at[:, 3]], (0, 1), value=1.0)
    y, known = shape[at[:, 0], at[:, 1]], at[:, 0] < train
    solved = torch.linalg.lstsq(x[known], F.one_hot(y[known], len(SHAPES)).float()).solution
    return float(((x[~known] @ solved).argmax(-1) == y[~known]).float().mean())
