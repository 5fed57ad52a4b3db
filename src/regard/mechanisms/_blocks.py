"""The engine of block-sparse mechanisms: softmax attention of each block of queries to a list of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.native import Blocks
from ..kernels.strips import cut
from ._mechanism import by_head, recomputed, softmax
from ._softmax import runs_native
from .memory_efficient import fold, unfold


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """counts and indices, as in `Blocks`, of a boolean [batch|1, head|1, query block, key block]."""
    counts = chosen.sum(-1, dtype=torch.int32)
    slots = max(int(counts.max()), 1)
    order = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    return counts, order.to(torch.int32)


def held(block: int, n_key: int) -> int:
    """Of a block of keys that is longer than all of them, as much as holds them, in what the kernel takes."""
    return min(block, -(-n_key // 32) * 32)


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention to the listed blocks only, at the cost of these. [batch, head, query, dim]

    causal: key j is visible to query i where j <= i + key - query. mask: boolean, of pairs.
    """
    rows = min(blocks.query_size, max(query.shape[2], 1))
    blocks = blocks._replace(query_size=rows, key_size=held(blocks.key_size, key.shape[2]))
    if runs_native(query) and blocks.key_size % 32 == 0:
        return native.attention(query, key, value, blocks=blocks, causal=causal, mask=mask, scale=scale)
    parts = []
    for i in range(blocks.counts.shape[2]):
        rows = slice(i * blocks.query_size, min((i + 1) * blocks.query_size, query.shape[2]))
        parts.append(recomputed(_rows, query, key, value, blocks, i, rows, causal, mask, scale))
    return torch.cat(parts, 2)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    i: int,
    rows: slice,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    n_query, n_key, heads = query.shape[2], key.shape[2], query.shape[1]
    counts = blocks.counts[:, :, i]  # [batch|1, head|1]
    slots = max(int(counts.max()), 1)
    at = blocks.indices[:, :, i, :slots, None].long() * blocks.key_size
    at = at + torch.arange(blocks.key_size, device=query.device)
    there = (torch.arange(slots, device=query.device)[:, None] < counts[..., None, None]) & (at < n_key)
    at, there = at.clamp_max(n_key - 1).flatten(2), there.flatten(2)  # [batch|1, head|1, taken]
    seen = there[:, :, None]
    if causal:
        last = torch.arange(rows.start, rows.stop, device=query.device) + n_key - n_query
        seen = seen & (at[:, :, None] <= last[:, None])
    if mask is not None:
        columns = cut(mask, rows.start, rows.stop, n_key).expand(-1, -1, -1, n_key)
        seen = seen & torch.take_along_dim(columns, at[:, :, None], -1)
    query = query[:, :, rows].to(exact)
    if at.shape[:2] == (1, 1):  # the same for all heads: those that share a key head stay together
        key, value = key[:, :, at[0, 0]], value[:, :, at[0, 0]]
    else:
        key, value = (torch.take_along_dim(by_head(t, heads), at[..., None], 2) for t in (key, value))
    weights = softmax(unfold(fold(query, key.shape[1]) @ key.to(exact).mT, heads) * scale, seen)
    return unfold(fold(weights, key.shape[1]) @ value.to(exact), heads).to(value.dtype)
