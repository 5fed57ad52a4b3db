"""A small convolutional network that names the colours in generated scenes, for claims on attribution to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..catalog import Premise
from ..data.scenes import COLOURS, Dials, Scene, render, sample
from ..zoo.recipes import viewer

SIZE = viewer.SIZE  # pixels
TRAINING = Dials(objects=(1, 3), textures=("plain", "grain"))
ALONE = Dials(objects=(1, 1), textures=("plain", "grain"))
PAIR = Dials(objects=(2, 2), textures=("plain", "grain"))
STEPS, BATCH, RATE = 400, 48, 4e-3
HELD = 10**6  # added to the seed of scenes that a network is not trained on
NAMES = tuple(COLOURS)


@cache
def network(seed: int) -> nn.Module:
    """A ResNet of two stages, trained for about half a minute. Its last maps have 8 x 8 places."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 48],
            depths=[2, 2],
            layer_type="basic",
            id2label=dict(enumerate(NAMES)),
            label2id={name: i for i, name in enumerate(NAMES)},
            problem_type="multi_label_classification",
        )
    )
    return trained(
        model, TRAINING, lambda logits, some: binary_cross_entropy_with_logits(logits, labels(some)), seed, STEPS, RATE
    )


def trained(
    model: nn.Module, dials: Dials, loss: Callable[[Tensor, list[Scene]], Tensor], seed: int, steps: int, rate: float
) -> nn.Module:
    """A network after steps of `BATCH` new scenes each. loss: of logits and the scenes that they are of."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for step in range(steps):
        some = [sample(dials, seed, step * BATCH + i) for i in range(BATCH)]
        optimiser.zero_grad()
        loss(model(pixels(some)).logits, some).backward()
        optimiser.step()
        schedule.step()
    model.zero_grad()
    return model.eval()


def held_out(dials: Dials, n: int, seed: int, *, distinct: bool = False) -> list[Scene]:
    """Scenes that no network was trained on; with `distinct`, of objects of different colours."""
    drawn = (sample(dials, HELD + seed, i) for i in range(20 * n))
    kept = (s for s in drawn if not distinct or len({o.colour for o in s.objects}) == len(s.objects))
    return [next(kept) for _ in range(n)]


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """[batch, channel, row, column]"""
    return viewer.pixels(render(scenes, SIZE))


def labels(scenes: Sequence[Scene]) -> Tensor:
    """1 for the colours that are there. [batch, colour]"""
    found = torch.zeros(len(scenes), len(NAMES))
    for row, scene in zip(found, scenes):
        row[[NAMES.index(o.colour) for o in scene.objects]] = 1
    return found


def colour_of(scenes: Sequence[Scene], which: int) -> list[int]:
    """The class of object number `which` of each scene."""
    return [NAMES.index(scene.objects[which].colour) for scene in scenes]


def boxes(scenes: Sequence[Scene], which: int) -> NDArray[np.bool_]:
    """The pixels of the box around what is seen of object number `which`. [batch, row, column]"""
    found = np.zeros((len(scenes), SIZE, SIZE), bool)
    for mask, (left, top, right, bottom) in zip(found, render(scenes, SIZE).boxes(slice(None))[:, which]):
        mask[top:bottom, left:right] = True
    return found


def forgetful(model: nn.Module, seed: int) -> nn.Module:
    """The same network with weights as they were drawn, for controls."""
    torch.manual_seed(seed)
    return type(model)(model.config).eval()


def learned(model: nn.Module, scenes: Sequence[Scene]) -> Premise:
    right = accuracy(model, scenes)
    return Premise("the network names the colours", "all of 80% of the scenes", f"{right:.0%}", right >= 0.8)


@torch.no_grad()
def accuracy(model: nn.Module, scenes: Sequence[Scene]) -> float:
    """Share of the scenes whose colours are all named, and no other."""
    said = model(pixels(scenes)).logits > 0
    return float((said == labels(scenes).bool()).all(1).float().mean())
