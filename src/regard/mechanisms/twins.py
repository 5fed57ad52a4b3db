"""Attention inside windows of a picture, and from every token to a sub-sampled picture, in turns.

Chu et al., Twins: Revisiting the Design of Spatial Attention in Vision Transformers (arXiv:2104.13840), sections 3.1
and 3.2; details from the authors' code. Twins-SVT alternates locally grouped attention (even blocks, from 0) with
global sub-sampled attention (odd ones), whose keys and values come from a strided convolution and a norm of the layer's
input. Instead of absolute positions, each stage adds a depthwise convolution after its first block.

`twins` is the locally grouped operator, `LocallyGroupedAttention` and `GlobalSubSampledAttention` are the layers; the
models are in timm. Windows cost n, sub-sampled keys n^2 / ratio^2: linear only where the ratio grows with the picture,
as it does at the fixed sizes of the authors' stages. Deviation: where rows or columns do not divide by the window, the
last groups are smaller (the authors' classifiers refuse, their detectors pad zeros and mask them, which is the same);
where they do not divide by the ratio the picture is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import exchanged, fill, not_causal, square
from ._mechanism import Cost, mechanism, scale_of, softmax
from ._pictures import grid, group, ungroup
from .memory_efficient import fold, unfold


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    shape, window = grid("twins", knobs.get("shape"), key.shape[2]), knobs.get("window", 7)
    rows, columns = torch.meshgrid(*(torch.arange(n) // window for n in shape), indexing="ij")
    groups = (rows * -(-shape[1] // window) + columns).flatten()
    seen = (groups[:, None] == groups).to(query.device)[None, None]
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale_of(query, scale)
    return softmax(scores, seen if mask is None else seen & mask)


def _cost(
    n_query: int, n_key: int, dim: int, *, causal: bool = False, shape: Sequence[int] | None = None, window: int = 7
) -> Cost:
    pairs = math.prod((n // window) * window**2 + (n % window) ** 2 for n in grid("twins", shape, n_key))
    return Cost(4 * dim * pairs, 4 * dim * n_key)


def _sized(shape: tuple[int, ...]) -> dict[str, int]:
    """Several windows also in a short input."""
    return {"window": min(7, max(1, min(shape) // 2))}


@mechanism("full", mask="keys", weights=_weights, cost=_cost, sized=_sized)
def twins(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    window: int = 7,
) -> Tensor:
    """Softmax attention inside each window of a picture, without overlap or shift. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the tokens of `shape` (rows, columns), row
    by row; without shape, a line. window: rows and columns of a group. causal: must be False. mask: which keys there
    are, [batch, 1, 1, key]. Raises ValueError where shape and tokens do not fit.

        >>> x = torch.randn(1, 4, 14 * 14, 32)
        >>> twins(x, x, x, shape=(14, 14)).shape
        torch.Size([1, 4, 196, 32])
    """
    shape = grid("twins", shape, key.shape[2], window)
    heads, kv_heads = query.shape[1], key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    there = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask
    whole = mask is None and not any(n % window for n in shape)
    seen = None if whole else group(there.mT, shape, window).mT  # [batch * window, 1, 1, key]
    query, key, value = (group(t, shape, window) for t in (query, key, value))
    if seen is not None:
        seen = seen.repeat(len(query) // len(seen), 1, 1, 1)
    scores = unfold(fold(query.to(exact), kv_heads) @ key.to(exact).mT, heads) * scale_of(query, scale)
    output = unfold(fold(softmax(scores, seen), kv_heads) @ value.to(exact), heads)
    return ungroup(output, shape, window).to(value.dtype)


class LocallyGroupedAttention(nn.Module):
    """Self-attention inside windows: [batch, token, dim] to the same. `regard.record` sees each window as a sequence.

    >>> LocallyGroupedAttention(16, 2, window=3)(torch.randn(2, 54, 16), (6, 9)).shape
    torch.Size([2, 54, 16])
    """

    is_causal = False

    def __init__(self, dim: int, heads: int, *, window: int = 7, bias: bool = True) -> None:
        super().__init__()
        _shared("LocallyGroupedAttention", dim, heads)
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, shape: Sequence[int]) -> Tensor:
        """shape: rows and columns of the tokens."""
        shape = grid("twins", shape, hidden.shape[1], self.window)
        parts = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = (group(part, shape, self.window) for part in parts)
        seen = None
        if any(n % self.window for n in shape):
            seen = group(hidden.new_ones(1, 1, hidden.shape[1], 1), shape, self.window).mT.bool()
            seen = seen.repeat(len(hidden), 1, 1, 1)
        output = F.scaled_dot_product_attention(query, key, value, seen)
        return self.proj(ungroup(output, shape, self.window).transpose(1, 2).flatten(2))


class GlobalSubSampledAttention(nn.Module):
    """Attention of all tokens to a picture that a strided convolution made `ratio` times smaller: the same shape.

    ratio 1 is ordinary self-attention. Raises ValueError where rows or columns do not divide by the ratio.

    >>> GlobalSubSampledAttention(16, 2, ratio=2)(torch.randn(2, 48, 16), (8, 6)).shape
    torch.Size([2, 48, 16])
    """

    is_causal = False

    def __init__(self, dim: int, heads: int, *, ratio: int, bias: bool = True) -> None:
        super().__init__()
        _shared("GlobalSubSampledAttention", dim, heads)
        self.heads, self.ratio = heads, ratio
        self.q, self.kv, self.proj = (
            nn.Linear(dim, dim, bias=bias),
            nn.Linear(dim, 2 * dim, bias=bias),
            nn.Linear(dim, dim),
        )
        self.sr = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if ratio > 1 else None

    def forward(self, hidden: Tensor, shape: Sequence[int]) -> Tensor:
        shape = _divided(grid("twins", shape, hidden.shape[1]), self.ratio)
        seen = hidden
        if self.sr is not None and self.norm is not None:
            seen = self.norm(self.sr(hidden.mT.unflatten(-1, shape)).flatten(2).mT)
        query = self.q(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    @staticmethod
    def cost(n: int, dim: int, *, ratio: int) -> Cost:
        """Of one head of `n` tokens, without the convolution (2 channels^2 operations a token)."""
        return Cost(4 * dim * n * n / ratio**2, 2 * dim * (n + n / ratio**2))


class ConditionalPositions(nn.Module):
    """Positions from what stands around: x + a depthwise convolution of 3 x 3 of x. [batch, token, dim] to the same

    >>> ConditionalPositions(16)(torch.randn(2, 35, 16), (5, 7)).shape
    torch.Size([2, 35, 16])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, hidden: Tensor, shape: Sequence[int]) -> Tensor:
        shape = grid("twins", shape, hidden.shape[1])
        return hidden + self.proj(hidden.mT.unflatten(-1, shape)).flatten(2).mT


class _OnGrid(nn.Module):
    def __init__(self, attention: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.attention, self.shape = attention, shape

    def forward(self, hidden: Tensor) -> Tensor:
        return self.attention(hidden, self.shape)


def convert(model: nn.Module, *, shape: Sequence[int], window: int = 7, ratio: int = 2) -> Callable[[], None]:
    """Make attention of an encoder of pictures local in even layers and sub-sampled in odd ones; gives what undoes it.

    shape: rows and columns of its tokens, which have to be all of them: a class token has no place in a window.
    Queries, keys, values and outputs keep their weights. The new convolutions begin as means, so that the model starts
    from what it knew, and are to be trained with the rest. Raises ValueError where a layer has no such weights, and
    where shape and ratio, or the model's tokens, do not fit.

        undo = convert(model, shape=(14, 14), window=7, ratio=2)
        undo()
    """
    rows, columns = shape
    of = _divided(grid("twins", shape, rows * columns, window), ratio)
    layers = count()

    @torch.no_grad()
    def made(attention: nn.Module, dim: int) -> nn.Module:
        not_causal(attention, "twins")
        heads, (query, key, value, output) = square(attention, dim, "twins")
        bias = query.bias is not None
        if next(layers) % 2 == 0:
            local = LocallyGroupedAttention(dim, heads, window=window, bias=bias)
            fill(local.qkv, query, key, value)
            fill(local.proj, output)
            return _OnGrid(local, of)
        layer = GlobalSubSampledAttention(dim, heads, ratio=ratio, bias=bias)
        fill(layer.q, query)
        fill(layer.kv, key, value)
        fill(layer.proj, output)
        if layer.sr is not None and layer.sr.bias is not None:
            nn.init.zeros_(layer.sr.bias)
            layer.sr.weight.copy_(torch.eye(dim)[..., None, None] / ratio**2)
        return _OnGrid(layer, of)

    return exchanged(model, made, None, "twins")


def _divided(shape: tuple[int, int], ratio: int) -> tuple[int, int]:
    if ratio < 1 or any(n % ratio for n in shape):
        raise ValueError(
            f"twins: {shape[0]} rows and {shape[1]} columns do not divide by the ratio {ratio}; choose another one, or "
            f"pad the picture"
        )
    return shape


def _shared(name: str, dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{name}: {heads} heads do not share {dim} channels evenly")
