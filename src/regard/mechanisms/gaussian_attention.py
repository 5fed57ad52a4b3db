"""Features weighted by learned Gaussian densities over their own values, and how much each feature counts.

Ioannides et al., Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple
Modalities (arXiv:2401.11143), sections 3.1 to 3.3, as in gioannides/Gaussian-Adaptive-Attention. An axis is cut into as
many parts as heads, the last one taking the rest. With mean and deviation of a part, each head multiplies each of its
features by the product of its Gaussians of (feature - mean - offset) / deviation, made to sum to 1 over the part.

A product of Gaussians is one Gaussian, and one that looks at values only: it cannot know a feature by its place, so
that importance goes to features whose values differ from the others'. Deviations: products are made of their
logarithms; the authors' formula of the importance factor was not at hand, so it is the mean weight of each feature,
scaled to 0 to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEAST = 1e-8  # added to variances; also the least sum of densities that is divided by


class GaussianAttention(nn.Module):
    """Multiplies each feature by its weight: of any shape, along one axis.

    heads: parts of the axis; gaussians: of each head, whose offsets (in units of the features) and widths are learned.

    >>> GaussianAttention(4, 3)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, heads: int, gaussians: int, axis: int = -1) -> None:
        super().__init__()
        if heads < 1 or gaussians < 1:
            raise ValueError(f"GaussianAttention: takes 1 or more of each; got {heads=}, {gaussians=}")
        self.heads, self.axis = heads, axis
        self.offsets = nn.Parameter(torch.zeros(heads, gaussians))
        self.widths = nn.Parameter(torch.randn(heads, gaussians).exp())

    def weights(self, features: Tensor) -> Tensor:
        """What each feature is multiplied by: 0 or more, and in each part of the axis of sum 1, or less."""
        size = features.shape[self.axis]
        if size < 2 * self.heads:
            raise ValueError(
                f"GaussianAttention: {self.heads} heads of 2 or more features each need an axis of {2 * self.heads}; "
                f"axis {self.axis} of {list(features.shape)} has {size}"
            )
        own = size // self.heads
        sizes = [own] * (self.heads - 1) + [size - own * (self.heads - 1)]
        moved = features.movedim(self.axis, -1)
        parts = [self._part(part, head) for head, part in enumerate(moved.split(sizes, -1))]
        return torch.cat(parts, -1).movedim(-1, self.axis)

    def _part(self, part: Tensor, head: int) -> Tensor:
        offsets, widths = self.offsets[head], self.widths[head]
        mean, deviation = part.mean(-1, keepdim=True), (part.var(-1, keepdim=True) + LEAST).sqrt()
        apart = (part - mean)[..., None] - offsets
        logs = -((apart / deviation[..., None] / widths).square() / 2).sum(-1)
        logs = logs - (2 * math.pi * widths.square()).log().sum() / 2
        # As their sum is where it is large enough to be divided by, and else less than that.
        short = (logs.logsumexp(-1, keepdim=True) - math.log(LEAST)).clamp_max(0)
        return logs.softmax(-1) * short.exp()

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weights(features)


def importance(weights: Tensor) -> Tensor:
    """The importance factor: mean weight of each feature, the last axis, from 0, the least, to 1, the most. [feature]

    0 everywhere where all count alike.
    """
    mean = weights.flatten(0, -2).mean(0) if weights.ndim > 1 else weights
    spread = mean.amax() - mean.amin()
    return (mean - mean.amin()) / spread.where(spread > 0, 1.0)


def cost(features: int, heads: int, gaussians: int) -> tuple[int, int]:
    """Densities of one vector of features, and numbers that are learned."""
    return features * gaussians, 2 * heads * gaussians
