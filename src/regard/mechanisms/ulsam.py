"""One attention map for each subspace of channels.

Saini et al., ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks
(arXiv:2006.15102), section 3. Channels are split into groups; in each, a depthwise and a pointwise convolution with a
max pooling between them make one softmax map over all positions, which is multiplied onto the group and added to it.
Batch norms have the authors' momentum of 0.9: statistics are nearly those of the last batch, so that a pass over a
large one should come before evaluation. The module itself costs little; savings come from the layers that it replaces.

Its softmax weighs positions for a whole group, with no queries that would see keys: `regard.record` finds no site in
it; `maps` shows the weights. They sum to 1, so a position changes by a share of 1 / positions on average: on a large
map the block is nearly the identity. Logits pass a ReLU, so that a map whose logits are all negative is uniform and
has no gradient.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import checked, over_positions, shared_out
from ._mechanism import Cost
from ._modules import module

MOMENTUM = 0.9  # of the newest batch


@module("full", takes="map")
class ULSAM(nn.Module):
    """Feature maps [batch, channel, row, column] to the same, each group of channels weighed by a map of its own.

    groups: how many share out the channels; each takes consecutive ones. Raises ValueError where they do not divide.

    >>> import torch
    >>> ULSAM(32)(torch.randn(2, 32, 14, 14)).shape
    torch.Size([2, 32, 14, 14])
    """

    def __init__(self, channels: int, *, groups: int = 4) -> None:
        super().__init__()
        shared_out("ULSAM", channels, groups, "groups")
        self.channels, self.groups = channels, groups
        # The groups' layers side by side: a grouped convolution is one convolution for each group.
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.depthwise_norm = nn.BatchNorm2d(channels, momentum=MOMENTUM)
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups)
        self.pointwise_norm = nn.BatchNorm2d(groups, momentum=MOMENTUM)

    def maps(self, x: Tensor) -> Tensor:
        """The weights of positions, which sum to 1 over each map. [batch, group, row, column]"""
        checked("ULSAM", x, self.channels)
        features = F.relu(self.depthwise_norm(self.depthwise(x)))
        features = F.max_pool2d(features, 3, stride=1, padding=1)
        return over_positions(F.relu(self.pointwise_norm(self.pointwise(features))))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x).unsqueeze(2)
        by_group = x.unflatten(1, (self.groups, -1))
        return (maps * by_group + by_group).flatten(1, 2)


def cost(rows: int, columns: int, channels: int) -> Cost:
    """Of one picture, forward: a scale, a pointwise convolution to the groups' maps, and their product."""
    return Cost(6 * rows * columns * channels, 2 * rows * columns * channels)
