"""Softmax attention in memory that does not grow with length.

Rabe and Staats, Self-attention Does Not Need O(n^2) Memory (arXiv:2112.05682), sections 2, 3 and 6, figure 1.

Chunks of keys are met one after the other, with a running maximum and running sums, for one chunk of queries at a time.
Deviations: the paper's backward pass differentiates each chunk anew (checkpointing); ours computes a chunk's weights
anew from the log-sum-exp of each row, which is the same gradient without a second set of running sums. Key chunks that
causality hides are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.derivatives import again, gradients, transformed
from ..kernels.strips import cut
from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax, visible


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **_: Any) -> Tensor:
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    return softmax(scores, visible(query, key, causal=causal, mask=mask))


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, query_chunk: int = 1024, **_: Any) -> Cost:
    turns = -(-n_query // query_chunk)
    taken_up = pairs(turns, turns, causal) / turns * n_key if n_query == n_key else turns * n_key
    return Cost(4 * dim * pairs(n_query, n_key, causal), 2 * dim * (n_query + taken_up))


@mechanism("causal", "full", "cross", mask="pairs", weights=_weights, cost=_cost)
def memory_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
) -> Tensor:
    """Exact softmax attention, chunk by chunk, forward and backward. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. mask: boolean, broadcasts to
    [batch, head, query, key]. scale: dim ** -0.5 unless given. query_chunk, key_chunk: positions taken at once; beside
    input and output, memory holds a few times batch x head x query_chunk x key_chunk scores, at any length; a
    second derivative holds the map. Raises ValueError where the shapes do not fit.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> memory_efficient(x, x, x, causal=True).shape
        torch.Size([1, 4, 3000, 64])
    """
    if query_chunk < 1 or key_chunk < 1:
        raise ValueError(f"memory_efficient: chunks hold 1 position or more; got {query_chunk=}, {key_chunk=}")
    arguments = query, key, value, mask, causal, scale_of(query, scale), query_chunk, key_chunk
    return _whole(*arguments) if transformed(query, key, value) else _Chunked.apply(*arguments)  # type: ignore[no-any-return]


def _whole(query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, scale: float, *_: Any) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = _weights(query.to(exact), key.to(exact), causal=causal, mask=mask, scale=scale)
    return (weights @ by_head(value, query.shape[1]).to(exact)).to(query.dtype)


class _Chunks:
    """Scores of one chunk of queries and one of keys, and where they belong."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, causal: bool, scale: float, rows: int, columns: int):
        self.query, self.key, self.mask, self.causal, self.scale = query, key, mask, causal, scale
        self.rows, self.columns = rows, columns
        self.dtype = torch.promote_types(query.dtype, torch.float32)

    def queries(self) -> Iterator[slice]:
        n = self.query.shape[2]
        return (slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows))

    def keys(self, rows: slice) -> Iterator[slice]:
        n = self.key.shape[2]
        last = rows.stop + n - self.query.shape[2] if self.causal else n
        return (slice(a, min(a + self.columns, last)) for a in range(0, last, self.columns))

    def take(self, tensor: Tensor, where: slice) -> Tensor:
        return tensor[:, :, where].to(self.dtype)

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """[batch, head, row, column]; -inf where not visible."""
        query, key = self.take(self.query, rows), self.take(self.key, columns)
        scores = fold(query, key.shape[1]) @ key.mT
        scores = unfold(scores, query.shape[1]).mul_(self.scale)
        if self.mask is not None:
            scores.masked_fill_(~_block(self.mask, rows, columns), float("-inf"))
        first = rows.start + self.key.shape[2] - self.query.shape[2]  # the newest key that the first row sees
        if self.causal and columns.stop > first + 1:
            past = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(first - columns.start)
            scores.masked_fill_(~past, float("-inf"))
        return scores


def _block(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    mask = cut(mask, rows.start, rows.stop, mask.shape[-1])
    return mask[..., columns] if mask.shape[-1] > 1 else mask


def fold(tensor: Tensor, kv_heads: int) -> Tensor:
    """Query heads that share a key head become more rows: keys are never copied. [batch, kv_head, rows, dim]"""
    return tensor.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def unfold(tensor: Tensor, heads: int) -> Tensor:
    """Undo `fold`. [batch, head, rows, dim]"""
    return tensor.unflatten(2, (heads // tensor.shape[1], -1)).flatten(1, 2)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *settings: Any) -> Tensor:
        chunks = _Chunks(query, key, mask, *settings)
        kv_heads, heads = key.shape[1], query.shape[1]
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=chunks.dtype)
        for rows in chunks.queries():
            count = rows.stop - rows.start
            top = lse.new_full((*query.shape[:2], count, 1), float("-inf"))
            total, mixed = torch.zeros_like(top), lse.new_zeros(*query.shape[:2], count, value.shape[-1])
            for columns in chunks.keys(rows):
                scores = chunks.scores(rows, columns)
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                level = higher.clamp_min(torch.finfo(lse.dtype).min)  # -inf where nothing was visible yet
                weights = scores.sub_(level).exp_()
                shrink = (top - level).exp()
                total = total * shrink + weights.sum(-1, keepdim=True)
                mixed = mixed * shrink + unfold(fold(weights, kv_heads) @ chunks.take(value, columns), heads)
                top = higher
            seen = total > 0
            output[:, :, rows] = mixed / total.where(seen, 1.0)
            lse[:, :, rows] = (top + total.where(seen, 1.0).log())[..., 0]
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, mask, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        query, key, value, mask, output, lse = ctx.saved_tensors
        if again(grad):
            return *gradients(lambda *inputs: _whole(*inputs, *ctx.settings), grad, query, key, value, mask), *[
                None
            ] * 4
        chunks = _Chunks(query, key, mask, *ctx.settings)
        kv_heads, heads = key.shape[1], query.shape[1]
        d_query = torch.zeros_like(query, dtype=chunks.dtype)
        d_key, d_value = (torch.zeros_like(t, dtype=chunks.dtype) for t in (key, value))
        level = lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]
        for rows in chunks.queries():
            given = chunks.take(grad, rows)
            mean = (given * chunks.take(output, rows)).sum(-1, keepdim=True)
            asked = fold(chunks.take(query, rows), kv_heads)
            for columns in chunks.keys(rows):
                weights = chunks.scores(rows, columns).sub_(level[:, :, rows]).exp_()
                d_value[:, :, columns] += fold(weights, kv_heads).mT @ fold(given, kv_heads)
                d_weights = unfold(fold(given, kv_heads) @ chunks.take(value, columns).mT, heads)
                d_scores = fold(d_weights.sub_(mean).mul_(weights).mul_(chunks.scale), kv_heads)
                d_query[:, :, rows] += unfold(d_scores @ chunks.take(key, columns), heads)
                d_key[:, :, columns] += d_scores.mT @ asked
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), *[None] * 5
