"""Where in a picture a shape is: what a helper model, that is no vision-language model, says to methods that ask one.

The helper is the zoo's lookout; a linear layer on its patches, as the one that it learned with, names the shape that
each shows. It is fitted here, on scenes that nothing is judged on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .. import zoo
from ..data.scenes import SHAPES, Scene, render, sample
from ..loading import Loaded
from ..zoo.recipes import lookout, viewer
from ..zoo.recipes.viewer import HELD_OUT, PATCH, SIZE
from ._shown import JUDGED, ROWS

SCENES = 400  # of each kind, that the layer is fitted on
KINDS = (viewer.SEVERAL, lookout.many(0.45), lookout.many(0.7))


def asked_shape(text: str) -> str:
    """The shape that a question names."""
    words = text.replace("?", " ").split()
    return next(shape for shape in SHAPES if shape in words)


def other_shape(scene: Scene, shape: str, seed: int) -> str:
    """Another shape that a scene has, at random; one that it lacks where it has none."""
    there = sorted({o.shape for o in scene.objects} - {shape})
    return np.random.default_rng(seed).choice(there or sorted(set(SHAPES) - {shape})).item()


def hit(place: NDArray[np.float64], x: float, y: float, *, within: float = 0.1) -> bool:
    """Whether the largest value of a map [row, column] is near a point of the picture, in shares of its sides."""
    row, column = np.unravel_index(place.argmax(), place.shape)
    return bool(abs((column + 0.5) / place.shape[1] - x) < within and abs((row + 0.5) / place.shape[0] - y) < within)


def located(image: Image.Image, shape: str) -> NDArray[np.float64]:
    """How likely each patch shows a shape, 0 to 1. [row, column]

    A picture of more pixels than the helper reads is read in windows, and is so many times finer.
    """
    times = max(1, image.width // SIZE)
    large = image.resize((times * SIZE, times * SIZE), Image.Resampling.BICUBIC)
    windows = [
        large.crop((x * SIZE, y * SIZE, (x + 1) * SIZE, (y + 1) * SIZE)) for y in range(times) for x in range(times)
    ]
    found = _probabilities(windows)[..., SHAPES.index(shape)]
    grid = found.view(times, times, ROWS, ROWS).transpose(1, 2).reshape(times * ROWS, times * ROWS)
    return grid.numpy().astype(np.float64)


@torch.no_grad()
def present(image: Image.Image, shape: str) -> float:
    """How likely a shape is in a picture, of whatever colour, 0 to 1."""
    model, processor = _helper()
    likely = model(**processor(images=[image], return_tensors="pt")).logits[0].sigmoid()
    return max(float(p) for p, pair in zip(likely, viewer.PAIRS) if pair.endswith(f" {shape}"))


@torch.no_grad()
def _probabilities(images: Sequence[Image.Image]) -> Tensor:
    """[picture, patch, shape and none]"""
    model, processor = _helper()
    read = _layer()
    return read(_states(model, processor(images=list(images), return_tensors="pt")["pixel_values"])).softmax(-1)


def _states(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the last layer but one gives of each patch. [picture, patch, dim]"""
    parts = [model(some, output_hidden_states=True).hidden_states[-2][:, 1:] for some in pixels.split(128)]
    return torch.cat(parts)


@cache
def _helper() -> Loaded:
    return zoo.load("lookout")


@cache
@torch.inference_mode(False)
def _layer() -> nn.Module:
    model = _helper().model
    states, shares = [], []
    for number, dials in enumerate(KINDS):
        scenes = [sample(dials, HELD_OUT + 20 * JUDGED + number, i) for i in range(SCENES)]
        pictures = render(scenes, SIZE)
        with torch.no_grad():
            states.append(_states(model, viewer.pixels(pictures)).flatten(0, 1))
        owner = torch.from_numpy(pictures.owner).long() + 1
        share = F.avg_pool2d(F.one_hot(owner, 16).movedim(-1, 1).float(), PATCH).flatten(2).mT  # [scene, patch, owner]
        shape = torch.full((len(scenes), 16), len(SHAPES))
        for row, scene in zip(shape, scenes):
            row[1 : 1 + len(scene.objects)] = torch.tensor([SHAPES.index(o.shape) for o in scene.objects])
        of = torch.zeros(*share.shape[:2], len(SHAPES) + 1)
        shares.append(of.scatter_add_(2, shape[:, None].expand_as(share), share).flatten(0, 1))
    x, y = torch.cat(states), torch.cat(shares)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        read = nn.Linear(x.shape[1], y.shape[1])
    optimiser = torch.optim.LBFGS(read.parameters(), max_iter=40)

    def close() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(read(x), y) + 1e-5 * read.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(close)
    return read.requires_grad_(False)
