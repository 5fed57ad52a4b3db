"""Convolution with a kernel of its own at each position, made by looking at the whole picture first.

Lou and Yu, OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels
(arXiv:2502.20087), section 3.3. Each position is compared with a 7 x 7 overview of the picture; a pointwise convolution
makes a small and a large kernel of these 49 affinities, which a softmax and a bias by offset turn into weights of the
position's neighbours. One half of the channels is mixed by the small kernel, the other by the large one; windows are
shifted inside at borders. `ContextMix` is that operator, `ContextMixBlock` the authors' block around it.

The overview is that of the map itself, or of a `context` map that a coarser branch made: the paper's top-down guidance,
of which the network is not here. Values are projected as in the authors' stand-alone block.

Kernels are softmax weights over neighbours made without their keys, and each position's are other places:
`regard.record` finds no site in it; `ContextMix.kernels` shows the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import ChannelNorm, checked, depthwise, pointwise, shared_out
from ._mechanism import Cost, recomputed
from ._modules import module

OVERVIEW = 7  # rows and columns
# Dilated kernels beside a large one: widths and dilations.
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
ROWS = 2**22  # numbers of windows that are laid out at once


@module("full", takes="map")
class ContextMix(nn.Module):
    """Feature maps [batch, channel, row, column] to the same, by kernels made from an overview.

    kernel, small: widths of the large and small kernels, odd; heads: half as many as the groups of channels that have
    kernels of their own. Maps smaller than the kernel are enlarged for the mixing. ValueError where channels do not
    divide by four times the heads.

    >>> ContextMix(32, kernel=7)(torch.randn(2, 32, 14, 20)).shape
    torch.Size([2, 32, 14, 20])
    """

    def __init__(self, channels: int, *, kernel: int = 17, small: int = 5, heads: int = 2) -> None:
        super().__init__()
        if min(kernel, small) < 1 or kernel % 2 == 0 or small % 2 == 0 or small > kernel:
            raise ValueError(f"ContextMix: kernels are odd, and the small one no larger; got {kernel=}, {small=}")
        shared_out("ContextMix", channels, 4 * heads, "4 * heads")
        self.channels, self.kernel, self.small, self.groups = channels, kernel, small, 2 * heads
        self.query, self.key = (_normed(channels, channels // 2) for _ in range(2))
        self.value = _normed(channels, channels)
        self.make = pointwise(OVERVIEW**2, small**2 + kernel**2)
        self.offsets_small = nn.Parameter(torch.empty(self.groups, 2 * small - 1, 2 * small - 1))
        self.offsets = nn.Parameter(torch.empty(self.groups, 2 * kernel - 1, 2 * kernel - 1))
        for offsets in (self.offsets_small, self.offsets):
            nn.init.trunc_normal_(offsets, std=0.02)

    def logits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Of the small and then the large kernels, before the bias. [batch, kernel place, group, position]"""
        query = self.query(x) * (self.channels / self.groups) ** -0.5
        overview = F.adaptive_avg_pool2d(x if context is None else context, OVERVIEW)
        query, key = (t.flatten(2).unflatten(1, (self.groups, -1)) for t in (query, self.key(overview)))
        return self.make((query.mT @ key).permute(0, 3, 1, 2))

    def kernels(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights of the small and the large windows, which sum to 1. [batch, group, row, column, place]"""
        shape, found = x.shape[2:], self.logits(x, context).permute(0, 2, 3, 1)
        parts = found.tensor_split([self.small**2], -1)
        of = zip(parts, (self.offsets_small, self.offsets), (self.small, self.kernel), strict=True)
        small, large = (
            torch.softmax(part.unflatten(2, shape) + _by_offset(table, width, *shape), -1) for part, table, width in of
        )
        return small, large

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """context: a map of as many channels, of any size, that the overview is taken of instead."""
        checked("ContextMix", x, self.channels)
        if context is not None:
            checked("ContextMix", context, self.channels)
        rows, columns = x.shape[2:]
        least = min(rows, columns)
        if least < self.kernel:  # by the same factor both ways, as the authors round it
            size = [self.kernel if n == least else int(self.kernel / least * n) for n in (rows, columns)]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        halves = self.value(x).chunk(2, 1)
        mixed = [
            mix(half, weights, width)
            for half, weights, width in zip(halves, self.kernels(x, context), (self.small, self.kernel), strict=True)
        ]
        output = torch.cat(mixed, 1)
        return F.adaptive_avg_pool2d(output, (rows, columns)) if least < self.kernel else output


def mix(value: Tensor, weights: Tensor, width: int) -> Tensor:
    """Weighted sums over windows, those at a border shifted inside. [batch, channel, row, column]

    value: [batch, channel, row, column]; weights: [batch, group, row, column, width * width].
    """
    rows, columns = (_starts(n, width).to(value.device) for n in value.shape[2:])
    step = max(1, ROWS // (len(value) * value.shape[1] * len(columns) * width**2))
    parts = []
    for some, of in zip(rows.split(step), weights.split(step, 2), strict=True):
        parts.append(recomputed(_mixed, value, of, some, columns, width))
    return torch.cat(parts, 2)


def _mixed(value: Tensor, weights: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    groups = weights.shape[1]
    windows = value.unfold(2, width, 1).unfold(3, width, 1)[:, :, rows][:, :, :, columns]
    windows = windows.flatten(4).unflatten(1, (groups, -1))  # [batch, group, channel, row, column, place]
    return (windows * weights.unsqueeze(2)).sum(-1).flatten(1, 2)


def _starts(length: int, width: int) -> Tensor:
    if length < width:
        raise ValueError(f"overlock.mix: an axis of {length} holds no window of {width}")
    return (torch.arange(length) - width // 2).clamp(0, length - width)


def _by_offset(table: Tensor, width: int, rows: int, columns: int) -> Tensor:
    """The bias of each window place by its offset. [group, row, column, place]"""
    at = [
        _starts(n, width)[:, None] + torch.arange(width) - torch.arange(n)[:, None] + width - 1 for n in (rows, columns)
    ]
    down, across = (t.to(table.device) for t in at)
    return table[:, down[:, None, :, None], across[None, :, None, :]].flatten(3)


class ContextMixBlock(nn.Module):
    """Feature maps [batch, channel, row, column] to the same: the authors' block around `ContextMix`.

    kernel: 5, 7, 9, 13 or 17, for which there are dilated kernels; ratio: width of the MLP; scale: where given, the
    residuals pass a learned factor a channel that starts here, and an offset.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = 17,
        small: int = 5,
        heads: int = 2,
        ratio: float = 4.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            raise ValueError(f"ContextMixBlock: kernel is one of {', '.join(map(str, sorted(BRANCHES)))}; got {kernel}")
        self.place, self.place_again = depthwise(channels, 3), depthwise(channels, 3)
        self.norm, self.norm_mlp = ChannelNorm(channels, eps=1e-6), ChannelNorm(channels, eps=1e-6)
        self.gate = nn.Sequential(*_normed(channels, channels), nn.SiLU())
        self.local, self.local_norm = _Dilated(channels, kernel), nn.BatchNorm2d(channels)
        self.mix, self.fuse = ContextMix(channels, kernel=kernel, small=small, heads=heads), _normed(channels, channels)
        squeezed = max(16, channels // 8)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            pointwise(channels, squeezed),
            nn.GELU(),
            pointwise(squeezed, channels),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(nn.BatchNorm2d(channels), pointwise(channels, channels))
        self.mlp = _Mlp(channels, int(channels * ratio))
        self.scale, self.scale_mlp = (_scale(channels, scale) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        checked("ContextMixBlock", x, self.mix.channels)
        x = x + self.place(x)
        normed = self.norm(x)
        mixed = self.fuse(self.mix(normed, context)) + self.local_norm(self.local(normed))
        mixed = self.gate(normed) * (mixed * self.squeeze(mixed))
        x = self.scale(x) + self.project(mixed)
        x = x + self.place_again(x)
        return self.scale_mlp(x) + self.mlp(self.norm_mlp(x))


class _Dilated(nn.Module):
    """A large depthwise kernel with dilated smaller ones beside it, each with its norm; the sum of all."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(depthwise(channels, width, dilation=apart, bias=False), nn.BatchNorm2d(channels))
            for width, apart in ((kernel, 1), *BRANCHES[kernel])
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class _Mlp(nn.Module):
    """Pointwise, GELU, a depthwise convolution added, a norm by what a channel holds of the whole map, pointwise."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.place, self.last = (
            pointwise(channels, hidden),
            depthwise(hidden, 3),
            pointwise(hidden, channels),
        )
        self.gain, self.offset = (nn.Parameter(torch.zeros(hidden, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = x + self.place(x)
        size = x.norm(dim=(2, 3), keepdim=True)
        return self.last(self.gain * (x * (size / (size.mean(1, keepdim=True) + 1e-6))) + self.offset + x)


def _normed(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(pointwise(channels, out, bias=False), nn.BatchNorm2d(out))


def _scale(channels: int, start: float | None) -> nn.Module:
    if start is None:
        return nn.Identity()
    scale = depthwise(channels, 1)
    nn.init.constant_(scale.weight, start)
    nn.init.zeros_(scale.bias)  # type: ignore[arg-type]  # it has one
    return scale


def cost(rows: int, columns: int, channels: int, *, kernel: int = 17, small: int = 5, heads: int = 2) -> Cost:
    """Of one picture, forward, of a `ContextMix`: affinities, kernels, mixing and projections."""
    places, taps = rows * columns, small**2 + kernel**2
    operations = places * (channels * OVERVIEW**2 + 4 * heads * OVERVIEW**2 * taps + channels * taps + 3 * channels**2)
    return Cost(operations, places * (2 * channels + 2 * heads * taps))
