"""A branch with attention and one without, weighed for each picture.

Chen, Gu and Zhang, Attention in Attention Network for Image Super-Resolution (arXiv:2104.09497), section 3.2. After a
pointwise convolution, a branch with pixel attention and a plain convolution run side by side; a squeeze network gives
the picture two weights that sum to 1, and what comes of both is added to the input. Temperature and slopes are those of
the authors' code, which divides by 30: weights begin close to one half. `plain=1` is the lighter A2N-M.

The one softmax is over the two branches, not over tokens: `regard.record` finds no site in it; `branch_weights` shows
the weights. The network around the block is that of the paper's figure 2, and not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import checked, pointwise, shared_out
from ._mechanism import Cost
from ._modules import module

SLOPE = 0.2


@module("full", takes="map")
class AttentionInAttention(nn.Module):
    """Feature maps [batch, channel, row, column] to the same: the paper's block, with its residual.

    reduction: by which the squeeze network has fewer channels; temperature: its logits are divided by it; plain: width
    of the branch without attention; slope: of the leaky ReLUs. ValueError where channels do not divide by reduction.

    >>> AttentionInAttention(40)(torch.randn(2, 40, 24, 24)).shape
    torch.Size([2, 40, 24, 24])
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 4,
        temperature: float = 30.0,
        plain: int = 3,
        slope: float = SLOPE,
    ) -> None:
        super().__init__()
        if temperature <= 0 or plain < 1 or plain % 2 == 0:
            raise ValueError(
                f"AttentionInAttention: temperature is above 0 and plain odd; got {temperature=}, {plain=}"
            )
        squeezed = shared_out("AttentionInAttention", channels, reduction, "reduction")
        self.channels, self.temperature, self.slope = channels, temperature, slope
        self.first, self.last = pointwise(channels, channels, bias=False), pointwise(channels, channels, bias=False)
        self.squeeze = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, 2, bias=False)
        )
        self.before, self.inside, self.after = (_convolution(channels, 3) for _ in range(3))
        self.pixel = pointwise(channels, channels)
        self.plain = _convolution(channels, plain)

    def branch_weights(self, x: Tensor) -> Tensor:
        """Of the branch with attention and of the one without; they sum to 1. [batch, 2]"""
        return self._weights(self._begin(x))

    def forward(self, x: Tensor) -> Tensor:
        features = self._begin(x)
        with_attention, without = self._weights(features).mT[..., None, None, None]
        gate = self.pixel(self._bent(self.before(features))).sigmoid()
        attended = self.after(self.inside(features) * gate)
        return x + self.last(self._bent(with_attention * attended + without * self.plain(features)))

    def _begin(self, x: Tensor) -> Tensor:
        checked("AttentionInAttention", x, self.channels)
        return self._bent(self.first(x))

    def _weights(self, features: Tensor) -> Tensor:
        return _shares(self.squeeze(features.mean((2, 3))) / self.temperature)

    def _bent(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)


def _convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, width, padding=width // 2, bias=False)


def _shares(logits: Tensor) -> Tensor:
    # not in a method: the seam takes a class called attention whose methods name a softmax for one over keys
    return torch.softmax(logits, -1)


def cost(rows: int, columns: int, channels: int, *, plain: int = 3) -> Cost:
    """Of one picture, forward; the squeeze network, once a picture, is left out."""
    places = rows * columns
    return Cost(2 * (30 + plain**2) * places * channels**2, 2 * places * channels)
