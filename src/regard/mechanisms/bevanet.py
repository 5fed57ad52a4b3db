"""Large kernels as attention, split into a small one and two strips, and the choice between them.

Huang et al., BEVANet: Bilateral Efficient Visual Attention Network for Real-Time Semantic Segmentation
(arXiv:2508.07300), sections 3.2 to 3.4. Features are multiplied by a filtered copy of themselves. The large filter is a
small depthwise kernel and, both on what that gives, a dilated strip along the row and one along the column
(`SparseKernel`, the paper's SDLSKA); `KernelSelection` (CKS) weighs the three by channel and by position.
`SeparableKernel` (LSKA) is what it is compared with. `VisualBlock` (EVAN) is a block around the sparse one;
`LargeKernelPyramid` (DLKPPM) and `BoundaryFusion` (BGAF) end the two branches of the segmentation network, which is not
here.

As in the authors' code, the product has no sigmoid, the channel weights of the selection are a sigmoid of what a ReLU
gave, at least one half, and the three do not compete in a softmax; the pyramid's large kernel is a `SeparableKernel`.
Nothing here is a softmax over tokens: `regard.record` finds no site in it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import checked, depthwise, largest_and_mean, per_channel, pointwise
from ._mechanism import Cost
from ._modules import module

# Reach of a kernel: width of the small one, taps of the strips, and how far apart they are.
KERNELS = {7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3), 41: (5, 13, 3), 53: (5, 17, 3)}
SPARSE = 7, 11, 23, 35
START = 0.01  # of layer scales


def _parts(block: str, kernel: int, among: tuple[int, ...]) -> tuple[int, int, int]:
    if kernel not in among:
        raise ValueError(f"{block}: kernel is one of {', '.join(map(str, among))}; got {kernel}")
    return KERNELS[kernel]


class KernelSelection(nn.Module):
    """Three filtered maps [batch, channel, row, column] to one, weighed by channel and by position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 16, 32)
        self.reduce = _squeeze(channels, squeezed)
        self.expand = nn.ModuleList(_squeeze(squeezed, channels) for _ in range(3))
        self.places = nn.Conv2d(2, 3, 7, padding=3)

    def forward(self, *maps: Tensor) -> Tensor:
        if self.training and len(maps[0]) < 2:
            raise ValueError("KernelSelection: in training its norms need two pictures or more; or call eval()")
        together = sum(maps[1:], maps[0])
        squeezed = self.reduce(together.mean((2, 3), keepdim=True))
        largest, mean = largest_and_mean(together, 1)
        places = self.places(torch.cat([mean, largest], 1)).sigmoid().split(1, 1)
        small, along_row, along_column = [
            one * expand(squeezed).sigmoid() * place
            for one, expand, place in zip(maps, self.expand, places, strict=True)
        ]
        return small + along_row + along_column


class SparseKernel(nn.Module):
    """Feature maps [batch, channel, row, column] times what a small kernel and two dilated strips make of them.

    kernel: 7, 11, 23 or 35, how far the strips reach along row and column; corners beyond the small kernel are not
    seen by one layer, but for the selection, which sees the mean of the whole map.

    >>> SparseKernel(32)(torch.randn(2, 32, 16, 24)).shape
    torch.Size([2, 32, 16, 24])
    """

    def __init__(self, channels: int, *, kernel: int = 35) -> None:
        super().__init__()
        small, taps, apart = _parts("SparseKernel", kernel, SPARSE)
        self.channels = channels
        self.small = depthwise(channels, small)
        self.along_row = depthwise(channels, (1, taps), dilation=apart)
        self.along_column = depthwise(channels, (taps, 1), dilation=apart)
        self.select, self.mix = KernelSelection(channels), pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        checked("SparseKernel", x, self.channels)
        small = self.small(x)
        return x * self.mix(self.select(small, self.along_row(small), self.along_column(small)))


class SeparableKernel(nn.Module):
    """Feature maps times what four strips, one after another, make of them. kernel: 7, 11, 23, 35, 41 or 53."""

    def __init__(self, channels: int, *, kernel: int = 35) -> None:
        super().__init__()
        small, taps, apart = _parts("SeparableKernel", kernel, tuple(KERNELS))
        self.channels = channels
        self.strips = nn.Sequential(
            depthwise(channels, (1, small)),
            depthwise(channels, (small, 1)),
            depthwise(channels, (1, taps), dilation=apart),
            depthwise(channels, (taps, 1), dilation=apart),
        )
        self.mix = pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        checked("SeparableKernel", x, self.channels)
        return x * self.mix(self.strips(x))


class VisualAttention(nn.Module):
    """A large kernel between two pointwise convolutions, and the input added."""

    def __init__(self, channels: int, kernel: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.kernel = pointwise(channels, channels), pointwise(channels, channels), kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.kernel(F.gelu(self.first(x)))) + x


@module("full", takes="map")
class VisualBlock(nn.Module):
    """Feature maps [batch, channel, row, column] to the same: a sparse large kernel, then a convolutional MLP.

    kernel: as of `SparseKernel`; ratio: width of the MLP.
    """

    def __init__(self, channels: int, *, kernel: int = 35, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attention = VisualAttention(channels, SparseKernel(channels, kernel=kernel))
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(
            pointwise(channels, hidden), depthwise(hidden, 3), nn.GELU(), pointwise(hidden, channels)
        )
        self.scale, self.scale_mlp = (nn.Parameter(torch.full((channels,), START)) for _ in range(2))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # all of the block have one

    def forward(self, x: Tensor) -> Tensor:
        checked("VisualBlock", x, len(self.scale))
        x = x + per_channel(self.scale) * self.attention(self.norm(x))
        return x + per_channel(self.scale_mlp) * self.mlp(self.norm_mlp(x))


class LargeKernelPyramid(nn.Module):
    """Feature maps [batch, channel, row, column] with context of several sizes, to `out` channels.

    hidden: channels of each size.
    """

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        pools = (
            nn.Identity(),
            nn.AvgPool2d(5, 2, 2),
            nn.AvgPool2d(9, 4, 4),
            nn.AdaptiveAvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.channels = channels
        self.scales = nn.ModuleList(
            nn.Sequential(pool, *_projection(pointwise(channels, hidden, bias=False))) for pool in pools
        )
        self.norm, self.scale = nn.BatchNorm2d(hidden), nn.Parameter(torch.full((hidden,), START))
        self.attention = VisualAttention(hidden, SeparableKernel(hidden, kernel=35))
        self.joins = nn.ModuleList(  # of pools 5 and 9, the large kernel, pools to 2 and 1
            nn.Sequential(*_projection(nn.Conv2d(hidden, hidden, 3, padding=d, dilation=d, bias=False)))
            for d in (2, 2, 1, 1, 1)
        )
        self.compress = nn.Sequential(*_projection(pointwise(6 * hidden, out, bias=False)))
        self.shortcut = nn.Sequential(*_projection(pointwise(channels, out, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        checked("LargeKernelPyramid", x, self.channels)
        as_it_is, five, nine, two, one = (scale(x) for scale in self.scales)
        large = as_it_is + per_channel(self.scale) * self.attention(self.norm(as_it_is))
        found = [as_it_is]
        for join, seen in zip(self.joins, (five, nine, large, two, one), strict=True):
            if seen is not large:
                seen = F.interpolate(seen, size=x.shape[2:], mode="bilinear", align_corners=False)
            found.append(join(seen + found[-1]))
        return self.compress(torch.cat(found, 1)) + self.shortcut(x)


class BoundaryFusion(nn.Module):
    """Details and semantics [batch, channel, row, column] in one map: details where there are boundaries."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.of_detail, self.of_semantic, self.output = (
            nn.Sequential(*_projection(nn.Conv2d(channels, channels, 3, padding=1, bias=False))) for _ in range(3)
        )

    def forward(self, detail: Tensor, semantic: Tensor, boundary: Tensor) -> Tensor:
        for x in (detail, semantic, boundary):
            checked("BoundaryFusion", x, self.channels)
        return self.output(fused(self.of_detail(detail), self.of_semantic(semantic), boundary))


def fused(detail: Tensor, semantic: Tensor, boundary: Tensor) -> Tensor:
    """e detail + (1 - e) semantic + detail + semantic, with e the sigmoid of the boundary."""
    edge = boundary.sigmoid()
    return edge * detail + (1 - edge) * semantic + detail + semantic


def _squeeze(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(pointwise(channels, out), depthwise(out, 3), nn.BatchNorm2d(out), nn.ReLU())


def _projection(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(convolution.in_channels), nn.ReLU(), convolution


def cost(rows: int, columns: int, channels: int, *, kernel: int = 35) -> Cost:
    """Of one picture, forward, of a `SparseKernel`: filters, spatial weights of the selection, and the mixing."""
    small, taps, _ = _parts("bevanet.cost", kernel, SPARSE)
    places = rows * columns
    return Cost(2 * places * (channels * (small**2 + 2 * taps) + channels**2 + 6 * 49), 2 * places * channels)
