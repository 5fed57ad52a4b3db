"""Attention to places by two strips, one along rows and one along columns.

Xu and Wan, ELA: Efficient Local Attention for Deep Convolutional Neural Networks (arXiv:2403.01123), section 3.2: the
mean over columns is a strip along rows, the mean over rows a strip along columns; each goes through a one-dimensional
convolution, group norm and a sigmoid, and the map is multiplied by both. Sizes are the paper's: kernel, groups of the
convolution and of the norm are 5, channels, 32 (T); 7, channels, 16 (B); 5, channels / 8, 16 (S); 7, channels / 8, 16
(L). The authors have published no code; as in modules of others, one convolution and norm serve both strips, with
`shared=False` each strip has its own, as the paper's formulas may be read.

Nothing in it is a softmax over tokens: `regard.record` finds no site in it; `maps` shows what the map is multiplied by.
"""

from __future__ import annotations

from torch import Tensor, nn

from ._maps import checked
from ._mechanism import Cost
from ._modules import module

SIZES = {"T": (5, None, 32), "B": (7, None, 16), "S": (5, 8, 16), "L": (7, 8, 16)}  # kernel, channels a group, norm


@module("full", takes="map")
class ELA(nn.Module):
    """Feature maps [batch, channel, row, column] to the same, weighed by a number a row and one a column.

    size: "T", "B", "S" or "L"; shared: whether one convolution and norm serve both strips. Channels have to divide by
    32 for "T", by 16 for the others; ValueError otherwise.

    >>> import torch
    >>> ELA(32)(torch.randn(2, 32, 14, 20)).shape
    torch.Size([2, 32, 14, 20])
    """

    def __init__(self, channels: int, *, size: str = "B", shared: bool = True) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"ELA: size is one of {', '.join(SIZES)}; got {size!r}")
        kernel, each, norms = SIZES[size]
        if channels < 1 or channels % norms:
            fits = [name for name, (*_, of) in SIZES.items() if channels > 0 and channels % of == 0]
            raise ValueError(
                f"ELA: size {size!r} needs a multiple of {norms} channels; got {channels}"
                + (f", which size {fits[0]!r} takes" if fits else ", which no size takes")
            )
        self.channels = channels
        strips = [
            nn.Sequential(
                nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels // (each or 1), bias=False),
                nn.GroupNorm(norms, channels),
                nn.Sigmoid(),
            )
            for _ in range(1 if shared else 2)
        ]
        self.rows, self.columns = strips[0], strips[-1]

    def maps(self, x: Tensor) -> Tensor:
        """What each place is multiplied by, 0 to 1. [batch, channel, row, column]"""
        checked("ELA", x, self.channels)
        return self.rows(x.mean(3)).unsqueeze(3) * self.columns(x.mean(2)).unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.maps(x)


def cost(rows: int, columns: int, channels: int, *, size: str = "B") -> Cost:
    """Of one picture, forward: two means, two convolutions of strips, and the products with the map."""
    kernel, each, _ = SIZES[size]
    strips = 2 * kernel * channels * (each or 1) * (rows + columns)
    return Cost(4 * rows * columns * channels + strips, 2 * rows * columns * channels)
