"""A gate that mixes tokens in place of attention: a linear map of each token times what an MLP-Mixer makes of all.

Abdullah and Aydin, NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function
(arXiv:2403.02411), section 3; details from the authors' code: the gate has no activation, both MLPs of the mixer have
the same width, and the block's two norms are one.

The weights along tokens belong to positions, so the number of tokens is fixed, other orders give other outputs, and
there is nothing to mask. Beside attention of the same width with its projections, 8 n dim^2 + 4 n^2 dim operations,
the gate is cheaper only where 8 hidden < 6 dim + 4 n: with the authors' widths (hidden 512, dim 256, 64 tokens) it
costs 2.1 times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from ._layers import exchanged, not_causal
from ._mechanism import Cost
from ._modules import module


def _mlp(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
    )


class Mixer(nn.Module):
    """One block of an MLP-Mixer: along tokens, then along channels, each added to its input."""

    def __init__(self, dim: int, tokens: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.token_norm, self.token_mlp = nn.LayerNorm(dim), _mlp(tokens, hidden, dropout)
        self.channel_norm, self.channel_mlp = nn.LayerNorm(dim), _mlp(dim, hidden, dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.token_mlp(self.token_norm(hidden).mT).mT
        return hidden + self.channel_mlp(self.channel_norm(hidden))


@module("full", build=lambda dim, shape: GatingUnit(dim, tokens=math.prod(shape), hidden=dim))
class GatingUnit(nn.Module):
    """What takes attention's place: [batch, token, dim] to the same, for exactly `tokens` tokens.

    hidden: width of both MLPs. Raises ValueError for another number of tokens or channels.

    >>> import torch
    >>> GatingUnit(16, tokens=9, hidden=32)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(self, dim: int, *, tokens: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = tokens, dim
        self.proj, self.mixer = nn.Linear(dim, dim), Mixer(dim, tokens, hidden, dropout=dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[1:] != self.size:
            raise ValueError(
                f"ninformer: built for [batch, {self.size[0]} tokens, {self.size[1]} channels], which its weights "
                f"belong to; got {list(hidden.shape)}. Build one for this size"
            )
        return self.proj(hidden) * self.mixer(hidden)


class NiNBlock(nn.Module):
    """The authors' block: gate and feed-forward layer, each added to its input, after one and the same norm.

    >>> import torch
    >>> NiNBlock(16, tokens=9, hidden=32)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(self, dim: int, *, tokens: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.unit = GatingUnit(dim, tokens=tokens, hidden=hidden, dropout=dropout)
        self.ffn = _mlp(dim, hidden, dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.unit(self.norm(hidden))
        return hidden + self.ffn(self.norm(hidden))


def ninformer(
    model: nn.Module, *, tokens: int, hidden: int | None = None, dropout: float = 0.0, projection: str | None = None
) -> Callable[[], None]:
    """Put new gates, to be trained, where every attention of an encoder is; gives the function that undoes it.

    tokens: how many the model has, a class token among them. hidden: width of the gates' MLPs, twice the channels
    unless given, as in the authors' script (which drops half of them in training: dropout 0.5). projection: name of
    attention's output projection, where it is none of the usual ones. Raises ValueError where no attention module is
    found, for causal ones, and when the model brings a mask or another number of tokens.

        undo = ninformer(model, tokens=197)
        undo()
    """

    def made(attention: nn.Module, dim: int) -> GatingUnit:
        not_causal(attention, "ninformer")
        return GatingUnit(dim, tokens=tokens, hidden=hidden or 2 * dim, dropout=dropout)

    return exchanged(model, made, projection, "ninformer")


convert = ninformer


def cost(n: int, dim: int, *, hidden: int) -> Cost:
    """Of the gate of one sequence."""
    weights = dim**2 + 2 * hidden * (n + dim)
    return Cost(2 * n * dim**2 + 8 * n * hidden * dim, 2 * n * dim + weights)


def attention_cost(n: int, dim: int) -> Cost:
    """Of self-attention of this width with its projections, to hold beside it."""
    return Cost(8 * n * dim**2 + 4 * n**2 * dim, 2 * n * dim + 4 * dim**2)
