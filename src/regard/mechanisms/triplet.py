"""Three gates, each from a convolution over two of the three axes of a feature map.

Misra et al., Rotate to Attend: Convolutional Triplet Attention Module (arXiv:2010.03045), section 3.3. The largest
value and the mean over one axis are two planes over the other two; a convolution of both, batch norm and a sigmoid make
a gate that is the same along the axis pooled. The output is the mean of the three gated copies. A gate has 100
parameters whatever the number of channels; the block stands at the end of a residual block's body, before the sum.

Nothing in it is a softmax over tokens: `regard.record` finds no site in it; `gates` shows what is multiplied. The batch
norms' momentum is 0.01, as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._maps import checked, largest_and_mean
from ._mechanism import Cost
from ._modules import module

MOMENTUM = 0.01


class _Gate(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=MOMENTUM)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """The gate of a feature map, of length 1 along the axis that is pooled."""
        planes = torch.cat([pooled.transpose(1, axis) for pooled in largest_and_mean(x, axis)], 1)
        return self.norm(self.convolution(planes)).sigmoid().transpose(1, axis)


@module("full", takes="map")
class Triplet(nn.Module):
    """Feature maps [batch, channel, row, column] to the same: the mean of copies gated along each axis.

    kernel: width of the gates' convolutions, odd; spatial: whether the gate over row and column takes part.

    >>> Triplet()(torch.randn(2, 32, 14, 20)).shape
    torch.Size([2, 32, 14, 20])
    """

    def __init__(self, *, kernel: int = 7, spatial: bool = True) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"Triplet: kernel is odd, so that a gate keeps its size; got {kernel}")
        # Pooled over row, over column and over channel, in this order.
        self.over_row, self.over_column = _Gate(kernel), _Gate(kernel)
        self.over_channel = _Gate(kernel) if spatial else None

    def gates(self, x: Tensor) -> list[Tensor]:
        """What the copies are multiplied by: gates without rows, without columns, and without channels."""
        checked("Triplet", x)
        pooled = [(self.over_row, 2), (self.over_column, 3), (self.over_channel, 1)]
        return [gate(x, axis) for gate, axis in pooled if gate is not None]

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        return sum((x * gate for gate in gates[1:]), x * gates[0]) / len(gates)


def cost(rows: int, columns: int, channels: int, *, kernel: int = 7, spatial: bool = True) -> Cost:
    """Of one picture, forward: the convolutions of the planes, and the products with the map."""
    planes = channels * columns + rows * channels + rows * columns * spatial
    taken = (2 + spatial) * rows * columns * channels
    return Cost(4 * kernel**2 * planes + 2 * taken, taken + rows * columns * channels)
