"""The engine of mechanisms that choose pairs one by one: softmax attention over a list of them, at their cost."""

from __future__ import annotations

import torch
from torch import Tensor

from ._mechanism import by_head, recomputed

SPACE = 2**22  # numbers of keys, and as many of values, that are gathered at once


def attend(query: Tensor, key: Tensor, value: Tensor, row: Tensor, column: Tensor, *, scale: float) -> Tensor:
    """Attention over pairs; zeros where a query has none. [batch, head, query, dim]

    row: of each pair, in order, its query, counted over [batch, head, query]; column: its key, over [batch, head, key].
    """
    shape, heads = query.shape[:3], query.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (by_head(t, heads).flatten(0, 2).to(exact) for t in (query, key, value))
    held = torch.bincount(row, minlength=len(query)).cumsum(0)
    parts, first, limit = [], 0, max(SPACE // max(key.shape[-1], value.shape[-1]), 1)
    while first < len(query):
        before = int(held[first - 1]) if first else 0
        last = max(int(torch.searchsorted(held, before + limit, right=True)), first + 1)
        of = slice(before, int(held[last - 1]))
        parts.append(recomputed(_part, query[first:last], key, value, row[of] - first, column[of], scale))
        first = last
    found = torch.cat(parts) if parts else query.new_zeros(0, value.shape[-1])
    return found.unflatten(0, shape)


def _part(query: Tensor, key: Tensor, value: Tensor, row: Tensor, column: Tensor, scale: float) -> Tensor:
    scores = (query.index_select(0, row) * key.index_select(0, column)).sum(-1) * scale
    top = scores.new_full(query.shape[:1], float("-inf")).scatter_reduce(0, row, scores.detach(), "amax")
    weights = (scores - top.index_select(0, row)).exp()
    total = scores.new_zeros(query.shape[:1]).index_add(0, row, weights)
    mixed = value.new_zeros(len(query), value.shape[-1])
    mixed = mixed.index_add(0, row, weights[:, None] * value.index_select(0, column))
    return mixed / total.where(total > 0, 1.0)[:, None]
