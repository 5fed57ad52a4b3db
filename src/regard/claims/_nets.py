"""Small convolutional networks and how they are trained, for claims on blocks that stand in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .. import zoo
from ..data.loaders.pictures import mnist
from ..data.scenes import Scene, render
from ..zoo.recipes import viewer
from ._data import folder

Block = Callable[[int], nn.Module]  # of so many channels
Net = TypeVar("Net", bound=nn.Module)


class Residual(nn.Module):
    """Two convolutions with a block at the end of them, and the input added."""

    def __init__(self, channels: int, out: int, stride: int, block: Block | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*normed(channels, out, stride), nn.ReLU(), *normed(out, out, 1))
        self.block = nn.Identity() if block is None else block(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*normed(channels, out, stride, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(self.body(x)) + self.shortcut(x))


class Network(nn.Module):
    """A stem, residual blocks of which each halves the map, and a linear reading of the mean over positions."""

    def __init__(self, widths: Sequence[int], classes: int, block: Block | None = None, *, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*normed(channels, widths[0], 2), nn.ReLU())
        self.stages = nn.ModuleList(Residual(a, b, 2, block) for a, b in pairwise(widths))
        self.read = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.read(x.mean((2, 3)))


def normed(channels: int, out: int, stride: int, width: int = 3) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels, out, width, stride, width // 2, bias=False)
    return convolution, nn.BatchNorm2d(out)


def pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """[batch, channel, row, column]"""
    return viewer.pixels(render(scenes, size))


@torch.no_grad()
def viewed(scenes: Sequence[Scene], size: int, blocks: int) -> Tensor:
    """Tokens after the first blocks of the zoo's viewer, the class token first. [scene, token, dim]"""
    vit: Any = zoo.load("viewer").model.vit
    states = []
    for at in range(0, len(scenes), 200):
        x = vit.embeddings(pixels(scenes[at : at + 200], size))
        for layer in vit.layers[:blocks]:
            x = layer(x)
        states.append(x)
    return torch.cat(states)


def digits(n: int, held: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits [digit, 1, 14, 14] with their classes, `n` to train on and `held` to be judged by."""
    images, labels = _digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    some, others = order[:n], order[n : n + held]
    return images[some], labels[some], images[others], labels[others]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    found = mnist(folder("mnist_t10k"))
    images = torch.tensor(found.images)[:, None].float() / 255
    return F.avg_pool2d(images, 2), torch.tensor(found.labels).long()


def train(
    model: Net,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    rate: float = 4e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Net:
    """The model, trained in place; models of one seed see the same batches. Left in evaluation mode."""
    model.train()
    fit(model.parameters(), lambda some: loss(model(x[some]), y[some]), len(x), steps, seed, batch=batch, rate=rate)
    settle(model, x)
    return model.eval()


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    count: int,
    steps: int,
    seed: int,
    *,
    batch: int = 32,
    rate: float = 1e-3,
    decay: float = 0.01,
) -> None:
    """In place, by the loss of items whose numbers, below `count`, are drawn anew in each step."""
    optimiser, draws = torch.optim.AdamW(parameters, rate, weight_decay=decay), torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(torch.randint(count, (batch,), generator=draws)).backward()
        optimiser.step()
        schedule.step()


def on_digits(
    network: Callable[[str], nn.Module],
    ways: Sequence[str],
    *,
    training: int,
    held_out: int,
    steps: int,
    runs: int,
    seed: int,
) -> dict[str, list[Tensor]]:
    """Which digits held out each way gets right, of each run: all ways of a run see the same pictures and batches."""
    hits: dict[str, list[Tensor]] = {way: [] for way in ways}
    for at in range(runs * seed, runs * (seed + 1)):
        x, y, held, held_y = digits(training, held_out, at)
        for way, found in hits.items():
            torch.manual_seed(at)
            found.append(right(train(network(way), x, y, steps=steps, seed=at), held, held_y))
    return hits


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Batch norms take the statistics of one large batch: with a momentum such as ULSAM's, of little else anyway."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(x[:256])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether each picture's class is the one that scores highest."""
    return torch.cat([model(some).argmax(-1) for some in x.split(250)]) == y


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def operations(model: nn.Module, x: Tensor) -> int:
    """Of convolutions and matrix products, a multiply-add counting two."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops()


def bars(figure: Any, values: Mapping[str, Sequence[float]], **labels: str) -> None:
    """Mean of each arm, and the runs that it is of."""
    axes = figure.subplots()
    axes.bar(range(len(values)), [sum(v) / len(v) for v in values.values()], color="lightgrey")
    for i, runs in enumerate(values.values()):
        axes.plot([i] * len(runs), list(runs), "o", color="C0", markersize=4)
    axes.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in values], fontsize=8)
    low = min(min(v) for v in values.values())
    axes.set(ylim=(max(0.0, low - 0.2 * abs(low)), None), **labels)
