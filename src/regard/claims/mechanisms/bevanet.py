"""Huang et al. (arXiv:2508.07300): a kernel of 35 as a small one and two strips sees far, at the cost of a small one.

The receptive field is measured on four blocks in a row: the side of the smallest centred square that holds 95% of the
absolute gradient of the centre's output, with the mean that the selection takes of the whole map left out, since by it
every place reaches every other. What it is for: a picture holds a disc, and pixels are told apart by whether it stands
in their rows, 19 pixels or more away, where two blocks of kernel 7 cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.bevanet import KernelSelection, SeparableKernel, SparseKernel, VisualBlock
from .._measure import mean, seconds
from .._nets import bars, operations, size

SIDE, CHANNELS, BLOCKS = 81, 8, 4
PICTURE, WIDTH, STEPS, BATCH, RUNS = 40, 8, 150, 6, 3


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How far blocks see, what the sparse kernel costs beside others, and whether a task that needs it is learned."""
    expected = (
        "the receptive field of four blocks of kernel 35 at least 2 times as wide as of kernel 7, and without strips "
        "no more than 1.2 times; a map of 64 channels in 0.3 of the time of a dense depthwise 35 x 35, and in 1.5 of "
        "that of the separable kernel; intersection over union on pixels in a disc's rows 5 points higher than of "
        "kernel 7, by two standard errors, parameters within 2%"
    )
    torch.manual_seed(seed)
    noise = torch.randn(8, CHANNELS, SIDE, SIDE)
    wide = {name: _field(blocks, noise) for name, blocks in (("35", _blocks(35)), ("7", _blocks(7)))}
    wide["35 without strips"] = _field(_without_strips(_blocks(35)), noise)
    x = torch.randn(1, 64, 64, 128)
    layers = {
        "sparse": SparseKernel(64),
        "dense": nn.Conv2d(64, 64, 35, padding=17, groups=64),
        "separable": SeparableKernel(64),
    }
    times = dict(
        zip(layers, seconds(*(partial(torch.no_grad()(layer.eval()), x) for layer in layers.values())), strict=True)
    )
    counted = {name: operations(layer, x) for name, layer in layers.items()}
    found: dict[str, list[float]] = {"35": [], "7": []}
    bases = []
    for run in range(RUNS):
        generator = torch.Generator().manual_seed(RUNS * seed + run)
        data = _rows(600, generator), _rows(100, generator)
        bases.append(_union(torch.zeros_like(data[1][1]) + 1, data[1][1]))
        for kernel, of in found.items():
            of.append(_segmented(int(kernel), *data, seed=RUNS * seed + run))
    more = mean([a - b for a, b in zip(found["35"], found["7"], strict=True)])
    sizes = [size(_segmenter(kernel)) for kernel in (35, 7)]
    holds = wide["35"] >= 2 * wide["7"] and wide["35 without strips"] <= 1.2 * wide["7"]
    holds = holds and times["sparse"] <= 0.3 * times["dense"] and times["sparse"] <= 1.5 * times["separable"]
    holds = holds and more.value >= 0.05 and more.above() and abs(sizes[0] / sizes[1] - 1) <= 0.02
    least = mean(found["35"])
    premises = [
        Premise(
            "the task can be learned with kernel 35",
            "an intersection over union of 0.6",
            f"{least:.2f}",
            least.value >= 0.6,
        )
    ]
    measured = (
        f"receptive field {', '.join(f'{v:.0f} pixels ({k})' for k, v in wide.items())}; sparse kernel in "
        f"{times['sparse'] / times['dense']:.2f} of the time of the dense one and "
        f"{times['sparse'] / times['separable']:.2f} of the separable one (operations "
        f"{counted['sparse'] / counted['dense']:.2f} and {counted['sparse'] / counted['separable']:.2f}); intersection over union {least:.2f} with kernel 35, "
        f"{mean(found['7']):.2f} with 7, more by {more:.2f} (all pixels: {mean(bases).value:.2f}); "
        f"parameters {sizes[0]} and {sizes[1]}"
    )
    draw = partial(bars, values=found, ylabel="intersection over union", title="Pixels in a disc's rows, by kernel")
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _blocks(kernel: int) -> nn.Sequential:
    """With layer scales of 1, so that blocks count."""
    blocks = nn.Sequential(*(VisualBlock(CHANNELS, kernel=kernel) for _ in range(BLOCKS))).eval()
    for block in blocks:
        nn.init.ones_(block.scale)  # type: ignore[arg-type]  # a parameter
        nn.init.ones_(block.scale_mlp)  # type: ignore[arg-type]
    return blocks


def _without_strips(blocks: nn.Sequential) -> nn.Sequential:
    for layer in blocks.modules():
        if isinstance(layer, SparseKernel):
            for strip in (layer.along_row, layer.along_column):
                nn.init.zeros_(strip.weight)
    return blocks


@contextmanager
def _no_global_mean() -> Iterator[None]:
    """The selection's mean over the map is taken as it is, without a gradient."""

    def forward(self: Any, *maps: Tensor) -> Tensor:
        own = self.reduce.forward
        self.reduce.forward = lambda x: own(x.detach())
        try:
            return before(self, *maps)
        finally:
            del self.reduce.forward

    before = KernelSelection.forward
    KernelSelection.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelSelection.forward = before  # type: ignore[method-assign]


def _field(blocks: nn.Module, noise: Tensor) -> float:
    """Side of the smallest centred square that holds 95% of the gradient of the centre's output, mean over inputs."""
    x = noise.clone().requires_grad_()
    with _no_global_mean():
        blocks(x)[:, :, SIDE // 2, SIDE // 2].sum().backward()
    assert x.grad is not None
    grad = x.grad.abs().sum(1)
    sides = torch.arange(1, SIDE + 1, 2)
    held = torch.stack(
        [grad[:, (SIDE - n) // 2 : (SIDE + n) // 2, (SIDE - n) // 2 : (SIDE + n) // 2].sum((1, 2)) for n in sides], 1
    )
    return float(sides[(held >= 0.95 * held[:, -1:]).int().argmax(1)].double().mean())


def _segmenter(kernel: int) -> nn.Sequential:
    # where strips have fewer taps, the MLP has as many weights more
    blocks = [VisualBlock(WIDTH, kernel=kernel, ratio=3.125 if kernel == 7 else 2.0) for _ in range(2)]
    for block in blocks:
        nn.init.ones_(block.scale)
        nn.init.ones_(block.scale_mlp)
    return nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), *blocks, nn.Conv2d(WIDTH, 1, 1))


def _segmented(kernel: int, training: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], *, seed: int) -> float:
    torch.manual_seed(seed)
    model, (x, y) = _segmenter(kernel), training
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(STEPS):
        some = slice(BATCH * step % len(x), BATCH * step % len(x) + BATCH)
        loss = F.binary_cross_entropy_with_logits(model(x[some])[:, 0], y[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return _union((model.eval()(held[0])[:, 0] > 0).float(), held[1])


def _union(said: Tensor, truth: Tensor) -> float:
    return float((said * truth).sum() / torch.maximum(said, truth).sum())


def _rows(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A disc near the left border, and as what is asked the pixels in its rows, 20 or so beside it."""
    at = torch.arange(PICTURE)
    x, y = 0.1 * torch.randn(n, 1, PICTURE, PICTURE, generator=generator), torch.zeros(n, PICTURE, PICTURE)
    rows = torch.randint(4, PICTURE - 4, (n,), generator=generator)
    for i in range(n):
        row, column = int(rows[i]), 5
        x[i, 0] += ((at[:, None] - row) ** 2 + (at[None] - column) ** 2 <= 9).float()
        y[i, row - 3 : row + 4, column + 22 : column + 28] = 1
    return x, y
