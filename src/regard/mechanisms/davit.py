"""Attention inside windows, and attention between channels, in turn.

Ding et al., DaViT: Dual Attention Vision Transformers (arXiv:2204.03645), sections 3.1 and 3.2. In a window block,
tokens attend to those of the same window. In a channel block, channels are what attends: in each group, a channel's
query and key are its values at all positions, so that one layer sees the whole picture, at a cost linear in positions.
Both blocks are as in timm's `davit`: a depthwise convolution for positions before attention and before the MLP, norms
before both, residuals around all; the map is padded with zeros after the norm, and padding takes part in a window.

`regard.record` finds a site in the window block; each window is a row of its batch. The channel block's weights are
between channels, [dim, dim] for each group, so there is no [query, key] map over tokens to record: it is no site.

Channel attention's inner products run over all positions but are scaled by dim ** -0.5, so that weights saturate on
large maps; `scaled_by="positions"` is timm's second version, by positions ** -0.5. Roles are the paper's: timm's
projections hold what it calls value, query and key, in this order, of the first version.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import checked, depthwise, shared_out
from ._mechanism import Cost
from ._modules import module

SCALES = ("dim", "positions")


def channel(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None):
    """Attention between channels: softmax(query^T key * scale) value^T, transposed. [batch, head, token, dim]

    query, key, value: [batch, head, token, dim], as many tokens of each; mask: which tokens there are, boolean
    [batch, 1, 1, token]; others are left out of the inner products and get zeros. scale: dim ** -0.5 unless given.
    """
    if query.ndim != 4 or query.shape != key.shape or query.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"channel: takes query, key and value [batch, head, token, dim] of the same tokens; got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape not in {(n, 1, 1, query.shape[2]) for n in (1, len(query))}
    ):
        raise ValueError(
            f"channel: mask says which tokens there are, boolean [batch, 1, 1, token]; got {mask.dtype} "
            f"{list(mask.shape)} (there are no pairs of tokens to mask, and no causal form)"
        )
    there = None if mask is None else mask.mT
    query = query if there is None else query.where(there, 0.0)
    weights = _weights(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    output = (weights @ value.mT).mT
    return output if there is None else output.where(there, 0.0)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[batch, head, dim, dim]"""
    return torch.softmax(scale * query.mT @ key, -1)


class ChannelAttention(nn.Module):
    """Tokens [batch, token, dim] to the same, mixed across the channels of each group."""

    def __init__(self, dim: int, heads: int, *, bias: bool = True, scaled_by: str = "dim") -> None:
        super().__init__()
        shared_out("ChannelAttention", dim, heads, "heads")
        if scaled_by not in SCALES:
            raise ValueError(f"ChannelAttention: scaled_by is one of {SCALES}; got {scaled_by!r}")
        self.heads, self.scaled_by = heads, scaled_by
        self.parts, self.output = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.parts(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = None if self.scaled_by == "dim" else tokens.shape[1] ** -0.5
        return self.output(channel(query, key, value, scale=scale).transpose(1, 2).flatten(2))


class WindowAttention(nn.Module):
    """Tokens of windows [window, token, dim] to the same. seen: which of them there are, boolean [window, token]."""

    def __init__(self, dim: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        shared_out("WindowAttention", dim, heads, "heads")
        self.num_heads = heads
        self.parts, self.output = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        query, key, value = self.parts(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None].expand(-1, -1, tokens.shape[1], -1)
        return self.output(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Feature maps [batch, channel, row, column] to the same; of which kind, says `attend`."""

    def __init__(self, channels: int, ratio: float, bent: bool) -> None:
        super().__init__()
        self.channels, self.bent = channels, bent
        self.place, self.place_again = depthwise(channels, 3), depthwise(channels, 3)
        self.norm, self.norm_mlp = nn.LayerNorm(channels), nn.LayerNorm(channels)
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        checked(type(self).__name__, x, self.channels)
        x = self._placed(x, self.place)
        x = x + self.attend(self.norm(x.movedim(1, -1))).movedim(-1, 1)
        x = self._placed(x, self.place_again)
        return x + self.mlp(self.norm_mlp(x.movedim(1, -1))).movedim(-1, 1)

    def attend(self, x: Tensor) -> Tensor:
        """[batch, row, column, channel] to the same."""
        raise NotImplementedError

    def _placed(self, x: Tensor, convolution: nn.Conv2d) -> Tensor:
        found = convolution(x)
        return x + (F.gelu(found) if self.bent else found)


@module("full", takes="map")
class ChannelBlock(_Block):
    """Feature maps [batch, channel, row, column] to the same, through attention between channels.

    heads: groups of channels; ratio: width of the MLP; bias: of the projections; bent: whether a GELU follows the
    convolutions for positions; scaled_by: "dim" or "positions".

    >>> ChannelBlock(32, 4)(torch.randn(2, 32, 14, 20)).shape
    torch.Size([2, 32, 14, 20])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        ratio: float = 4.0,
        bias: bool = True,
        bent: bool = False,
        scaled_by: str = "dim",
    ) -> None:
        super().__init__(channels, ratio, bent)
        self.attention = ChannelAttention(channels, heads, bias=bias, scaled_by=scaled_by)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


@module("full", takes="map", build=lambda dim, heads: WindowBlock(dim, heads, window=4))
class WindowBlock(_Block):
    """Feature maps [batch, channel, row, column] to the same, through attention inside windows.

    window: its rows and columns; padding: "zeros", which are attended to, or "masked"; the rest as of `ChannelBlock`.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        window: int = 7,
        ratio: float = 4.0,
        bias: bool = True,
        bent: bool = False,
        padding: str = "zeros",
    ) -> None:
        super().__init__(channels, ratio, bent)
        if window < 1 or padding not in ("zeros", "masked"):
            raise ValueError(
                f"WindowBlock: a window of 1 or more, padding 'zeros' or 'masked'; got {window}, {padding!r}"
            )
        self.window, self.padding = window, padding
        self.attention = WindowAttention(channels, heads, bias=bias)

    def attend(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        seen = None
        if self.padding == "masked" and (rows % self.window or columns % self.window):
            seen = self._windows(x.new_ones(x[..., :1].shape)).squeeze(-1) > 0
        windows = self._windows(x)
        down, across = -(-rows // self.window), -(-columns // self.window)
        mixed = self.attention(windows, seen).view(len(x), down, across, self.window, self.window, -1)
        return mixed.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]

    def _windows(self, x: Tensor) -> Tensor:
        """[batch * window, token, channel]"""
        w = self.window
        x = F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % w))
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def cost(rows: int, columns: int, channels: int, *, heads: int, window: int | None = None) -> Cost:
    """Of one picture, forward, projections apart: between channels, or inside windows where these are given."""
    places = rows * columns
    each = 2 * channels // heads if window is None else 2 * window**2
    return Cost(2 * places * channels * each, 4 * places * channels)
