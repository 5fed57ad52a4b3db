"""Convolve some channels, attend to the others.

Huang et al., Partial Convolution Meets Visual Attention (arXiv:2503.03148), section 3. A partial convolution leaves
most channels untouched, which saves time; here those get attention, of one of three kinds. `PartialChannel`: a gate a
channel, from the mean and deviation of all of them. `PartialSpatial`, at the end of a block's MLP: a gate a position
on the first channels, a pointwise convolution of the last. `PartialSelf`: softmax attention with a bias by distance,
for the last stage. As in the authors' code, residuals are the block's, and the convolved channels are the first.

`regard.record` finds a site in `PartialSelf`, whose tokens are positions, row after row. The gates of the other two are
no softmax over tokens.

Deviation: `split=1` is the full form that partial ones are compared with: all channels convolved, then attended to.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import ChannelNorm, checked, pointwise, shared_out
from ._mechanism import Cost
from ._modules import module

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

NEAR, FAR, RATIO = 20, 40, 8  # distances of this many have buckets of their own; beyond, they are logarithmic


class _Partial(nn.Module):
    """Channels that are convolved, 3 x 3, and those left for attention; with split=1 all are both."""

    def __init__(self, channels: int, split: int) -> None:
        super().__init__()
        name = type(self).__name__
        if split < 1 or channels // split < 1:
            raise ValueError(f"{name}: split={split} leaves none of {channels} channels to convolve")
        self.channels, self.convolved = channels, channels // split
        self.attended = channels - self.convolved or channels
        self.convolution = _small(nn.Conv2d(self.convolved, self.convolved, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        checked(type(self).__name__, x, self.channels)
        if self.convolved == self.channels:
            return self.attend(self.convolution(x))
        first, rest = x.tensor_split([self.convolved], 1)
        return torch.cat([self.convolution(first), self.attend(rest)], 1)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@module("full", takes="map")
class PartialChannel(_Partial):
    """Feature maps [batch, channel, row, column] to the same: some convolved, the others gated channel by channel.

    split: one part in so many is convolved, the first; 1 is the full form. Needs two positions or more, of which there
    is a deviation.

    >>> PartialChannel(32)(torch.randn(2, 32, 14, 14)).shape
    torch.Size([2, 32, 14, 14])
    """

    def __init__(self, channels: int, *, split: int = 4) -> None:
        super().__init__(channels, split)
        self.mix = _small(nn.Conv2d(self.attended, self.attended, (1, 2), bias=False))
        self.norm_gate, self.norm = nn.BatchNorm2d(self.attended), nn.BatchNorm2d(self.attended)

    def gate(self, x: Tensor) -> Tensor:
        """What each channel of these is multiplied by, 0 to 1. [batch, channel, 1, 1]"""
        if x[0, 0].numel() < 2:
            raise ValueError(f"PartialChannel: one position has no deviation; got a feature map {list(x.shape)}")
        places = x.flatten(2)
        pooled = torch.stack([places.mean(2), places.std(2)], 2).unsqueeze(2)  # [batch, channel, 1, 2]
        return F.hardsigmoid(self.norm_gate(self.mix(pooled)))

    def attend(self, x: Tensor) -> Tensor:
        return self.norm(x * self.gate(x))


@module("full", takes="map")
class PartialSelf(_Partial):
    """Feature maps [batch, channel, row, column] to the same: some convolved, the others by self-attention.

    split: as of `PartialChannel`; heads: have to share out the channels that attend; dropout: of weights, in training.

    >>> PartialSelf(32)(torch.randn(2, 32, 7, 7)).shape
    torch.Size([2, 32, 7, 7])
    """

    def __init__(self, channels: int, *, split: int = 4, heads: int = 6, dropout: float = 0.1) -> None:
        super().__init__(channels, split)
        shared_out("PartialSelf", self.attended, heads, "heads")
        self.norm = ChannelNorm(self.attended, eps=1e-6)
        self.attention = DistanceAttention(self.attended, heads, dropout)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x).flatten(2).mT, x.shape[2:]).mT.unflatten(2, x.shape[2:])


class DistanceAttention(nn.Module):
    """Softmax attention of positions with a bias by their distance: [batch, token, dim] to the same."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = heads, dropout
        self.parts, self.output = _small(nn.Linear(dim, 3 * dim, bias=False)), _small(nn.Linear(dim, dim))
        self.bias = nn.Parameter(torch.zeros(heads, 2 * FAR + 1))

    def forward(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        query, key, value = self.parts(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[:, buckets(*shape).to(tokens.device)][None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


@module("full", takes="map")
class PartialSpatial(nn.Module):
    """Feature maps [batch, channel, row, column] to the same: the first gated by position, the last convolved 1 x 1.

    share: of the channels that are convolved; there have to be some of either.
    """

    def __init__(self, channels: int, *, share: float = 0.5) -> None:
        super().__init__()
        self.channels, self.convolved = channels, int(share * channels)
        self.gated = channels - self.convolved
        if not 0 < self.convolved < channels:
            raise ValueError(f"PartialSpatial: share={share} of {channels} channels leaves none for one of the parts")
        self.score = _small(pointwise(self.gated, 1, bias=False))
        self.convolution = _small(pointwise(self.convolved, self.convolved, bias=False))
        self.norm_gated, self.norm_convolved = nn.BatchNorm2d(self.gated), nn.BatchNorm2d(self.convolved)

    def forward(self, x: Tensor) -> Tensor:
        checked("PartialSpatial", x, self.channels)
        first, rest = x.tensor_split([self.gated], 1)
        gated = self.norm_gated(first * F.hardsigmoid(self.score(first)))
        return torch.cat([gated, self.convolution(self.norm_convolved(rest))], 1)


def buckets(rows: int, columns: int) -> Tensor:
    """The bucket of each pair's distance, rounded: exact up to 20, then logarithmic up to the last. [query, key]"""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").round()
    beyond = NEAR + (distance.clamp_min(NEAR) / NEAR).log() / math.log(RATIO) * (FAR - NEAR)
    return FAR + distance.where(distance <= NEAR, beyond.round().clamp_max(FAR)).long()


def _small(layer: Layer) -> Layer:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def cost(rows: int, columns: int, channels: int, *, kind: str = "channel", split: int = 4) -> Cost:
    """Of one picture, forward, of kind "channel" or "self"."""
    convolved, places = channels // split, rows * columns
    attended = channels - convolved or channels
    operations = 18 * places * convolved**2
    if kind == "channel":
        operations += 4 * attended**2 + 6 * places * attended
    elif kind == "self":
        operations += 8 * places * attended**2 + 4 * places**2 * attended
    else:
        raise ValueError(f"partial_attention.cost: kind is 'channel' or 'self'; got {kind!r}")
    return Cost(operations, 2 * places * channels)
