"""Huang et al. (arXiv:2508.07300): a kernel of 35 as a small one and two strips sees far, at the cost of a small one.

The receptive field is measured on four blocks in a row: the side of the smallest centred square that holds 95% of the
absolute gradient of the centre's output, with the mean that the selection takes of the whole map left out, since by it
every place reaches every other. The control has the same blocks without their strips. Cost is that of one layer on a
map of 64 channels, beside a dense depthwise convolution of the same reach and the separable kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.bevanet import KernelSelection, SeparableKernel, SparseKernel, VisualBlock
from .._measure import mean, seconds
from .._nets import bars, operations

SIDE, CHANNELS, BLOCKS = 81, 8, 4


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How far blocks see, and what the sparse kernel costs beside others."""
    expected = (
        "the receptive field of four blocks of kernel 35 at least 2 times as wide as of kernel 7, by two standard "
        "errors of the inputs, and without strips no more than 1.2 times; a map of 64 channels in 0.3 of the time of a "
        "dense depthwise 35 x 35, and in 1.5 of that of the separable kernel"
    )
    torch.manual_seed(seed)
    noise = torch.randn(8, CHANNELS, SIDE, SIDE)
    stacks = {"35": _blocks(35), "7": _blocks(7), "35 without strips": _without_strips(_blocks(35))}
    fields = {name: _fields(blocks, noise) for name, blocks in stacks.items()}
    wider, control = (mean(fields[name] / fields["7"]) for name in ("35", "35 without strips"))
    x = torch.randn(1, 64, 64, 128)
    layers = {
        "sparse": SparseKernel(64),
        "dense": nn.Conv2d(64, 64, 35, padding=17, groups=64),
        "separable": SeparableKernel(64),
    }
    runs = [partial(torch.no_grad()(layer.eval()), x) for layer in layers.values()]
    times = dict(zip(layers, seconds(*runs), strict=True))
    counted = {name: operations(layer, x) for name, layer in layers.items()}
    over = {name: (times["sparse"] / times[name], counted["sparse"] / counted[name]) for name in ("dense", "separable")}
    holds = wider.value >= 2 and wider.above(2) and control.value <= 1.2
    holds = holds and over["dense"][0] <= 0.3 and over["separable"][0] <= 1.5
    premise = Premise(
        "the map holds the receptive field",
        f"below {SIDE} pixels for every input",
        f"{float(fields['35'].max()):.0f} at most",
        float(fields["35"].max()) < SIDE,
    )
    measured = (
        f"receptive field {', '.join(f'{mean(of):.0f} pixels ({name})' for name, of in fields.items())}: {wider:.2f} "
        f"times that of kernel 7, without strips {control:.2f}; time {over['dense'][0]:.2f} of the dense kernel's "
        f"(operations {over['dense'][1]:.2f}) and {over['separable'][0]:.2f} of the separable one's "
        f"({over['separable'][1]:.2f})"
    )
    values = {name: of.tolist() for name, of in fields.items()}
    draw = partial(bars, values=values, ylabel="pixels", title="Receptive field of four blocks, by kernel")
    return Finding(holds, measured, expected, seed, premises=[premise], draw=draw)


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


def _fields(blocks: nn.Module, noise: Tensor) -> Tensor:
    """Of each input, the side of the smallest centred square that holds 95% of the gradient of the centre's output."""
    x = noise.clone().requires_grad_()
    with _no_global_mean():
        blocks(x)[:, :, SIDE // 2, SIDE // 2].sum().backward()
    assert x.grad is not None
    grad, at = x.grad.abs().sum(1), (torch.arange(SIDE) - SIDE // 2).abs()
    far = torch.maximum(at[:, None], at[None])
    held = torch.stack([(grad * (far <= r)).sum((1, 2)) for r in range(SIDE // 2 + 1)], 1)
    return 2.0 * (held >= 0.95 * held[:, -1:]).int().argmax(1) + 1
