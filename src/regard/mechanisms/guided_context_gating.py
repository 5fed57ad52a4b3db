"""A gate on positions, guided by the context of the whole picture.

Cherukuri et al., Guided Context Gating: Learning to leverage salient lesions in retinal fundus images
(arXiv:2406.13126), section 2: context formulation (positions are weighed and summed to one vector), channel correlation
(the vector passes a bottleneck and is added to every position) and guided gating (the features and those with context
make an additive gate, one number a position, onto the features as they came).

Deviation: the paper weighs positions by a softmax, which is the default. The authors' code takes the softmax along an
axis of length 1, so that positions are summed with weights of 1, and a model is tied to its resolution:
`pool="sum"`. There is no code of a backbone or a classifier here.

The softmax pools positions once for a picture, with no queries: `regard.record` finds no site in it; `gate` and
`context` show what it does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import ChannelNorm, checked, over_positions, per_channel, pointwise
from ._mechanism import Cost
from ._modules import module

POOLS = ("softmax", "sum")


@module("full", takes="map")
class GuidedContextGating(nn.Module):
    """Feature maps [batch, channel, row, column] to the same, each position switched on or off by one number.

    reduction: by which the bottleneck has fewer channels; pool: how positions are weighed, "softmax" or "sum";
    activation: of what the bottleneck adds, none as in the paper.

    >>> GuidedContextGating(32)(torch.randn(2, 32, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self, channels: int, *, reduction: int = 8, pool: str = "softmax", activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"GuidedContextGating: pool is one of {POOLS}; got {pool!r}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"GuidedContextGating: a bottleneck of {channels} / {reduction} channels has none")
        self.channels, self.pool, self.activation = channels, pool, activation or nn.Identity()
        self.score = pointwise(channels, 1, bias=False)
        self.squeeze = pointwise(channels, channels // reduction, bias=False)
        self.widen = pointwise(channels // reduction, channels, bias=False)
        self.local, self.guide = pointwise(channels, channels), pointwise(channels, channels)
        self.offset = nn.Parameter(torch.zeros(channels))
        self.norm = ChannelNorm(channels, eps=1e-3)
        self.switch = pointwise(channels, 1)  # the authors add a second bias to its own, which changes nothing
        for layer in (self.score, self.squeeze, self.widen):
            nn.init.kaiming_normal_(layer.weight)
        for layer in (self.local, self.guide, self.switch):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # they have one

    def context(self, x: Tensor) -> Tensor:
        """The features with the context of the picture added. [batch, channel, row, column]"""
        checked("GuidedContextGating", x, self.channels)
        weighed = x * over_positions(self.score(x)) if self.pool == "softmax" else x
        return x + self.activation(self.widen(F.relu(self.squeeze(weighed.sum((2, 3), keepdim=True)))))

    def gate(self, x: Tensor) -> Tensor:
        """What each position is multiplied by, 0 to 1. [batch, 1, row, column]"""
        context = self.context(x)
        guided = F.relu(self.local(x)) + F.relu(self.guide(context))
        return self.switch(self.norm(F.relu(guided + per_channel(self.offset)))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def cost(rows: int, columns: int, channels: int, *, reduction: int = 8) -> Cost:
    """Of one picture, forward."""
    places = rows * columns
    return Cost(4 * places * channels**2 + 8 * places * channels + 4 * channels**2 // reduction, 2 * places * channels)
