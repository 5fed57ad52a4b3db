"""Attention of each query to the few key blocks whose mean key it likes best.

Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv:2502.13189), section 2.2, equations 5 to 8.

The gate of a block is the product of the query with the mean of the block's keys. A query always sees its own block, as
far as causality lets it, and no block after it; of the others before it, the best. Block and number of blocks are those
of the paper's scaling experiments. The gate chooses and gets no gradient, as in the paper.
Deviation: the mean of a block that holds padding is over the keys that are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._mechanism import Cost, by_head, mechanism, scale_of, softmax, visible
from ._routed import attend


def gate(query: Tensor, key: Tensor, *, mask: Tensor | None = None, block: int = 512, top: int = 3) -> Tensor:
    """Which key blocks each query takes, its own among the `top`. [batch, head, query, key block], boolean

    query: [batch, head, query, dim], the last of the keys; key: [batch, kv_head, key, dim]; mask: which keys there are.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    others, count = choice(query, key, mask=mask, block=block, top=top), -(-n_key // block)
    own = torch.arange(n_key - n_query, n_key, device=query.device)[:, None] // block
    taken = torch.zeros(*query.shape[:3], count + 1, dtype=torch.bool, device=query.device)
    return taken.scatter_(-1, others.where(others >= 0, count), True)[..., :-1].scatter(
        -1, own.expand(*query.shape[:3], 1), True
    )


@torch.no_grad()
def choice(query: Tensor, key: Tensor, *, mask: Tensor | None, block: int, top: int) -> Tensor:
    """The best of the blocks before each query's own. [batch, head, query, top - 1] numbers of blocks; -1: none"""
    if block < 1 or top < 1:
        raise ValueError(
            f"moba: blocks hold 1 key or more, and a query sees its own: block, top >= 1; got {block=}, {top=}"
        )
    n_query, n_key = query.shape[2], key.shape[2]
    block = min(block, n_key)
    extra, exact = -n_key % block, torch.promote_types(query.dtype, torch.float32)
    there = torch.ones(1, 1, n_key, 1, dtype=torch.bool, device=key.device) if mask is None else mask.mT
    held = F.pad(key.where(there, 0.0), (0, 0, 0, extra)).unflatten(2, (-1, block)).sum(3, dtype=exact)
    number = F.pad(there, (0, 0, 0, extra)).unflatten(2, (-1, block)).sum(3)
    scores = query.to(exact) @ by_head(held / number.clamp_min(1), query.shape[1]).mT
    own = torch.arange(n_key - n_query, n_key, device=key.device)[:, None] // block
    at = torch.arange(scores.shape[-1], device=key.device)
    scores.masked_fill_((at >= own) | (number.mT == 0), float("-inf"))
    best = scores.topk(min(top, len(at)) - 1, dim=-1)
    return best.indices.where(best.values > float("-inf"), -1)


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    block = min(knobs.get("block", 512), key.shape[2])
    chosen = gate(query, key, mask=mask, **knobs).repeat_interleave(block, -1)[..., : key.shape[2]]
    seen = visible(query, key, causal=causal, mask=mask)
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    return softmax(scores, chosen if seen is None else chosen & seen)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = True, block: int = 512, top: int = 3) -> Cost:
    own = torch.arange(n_key - n_query, n_key)
    taken = float((own % block + 1 + (own // block).clamp_max(top - 1) * block).sum())
    gates = 2 * dim * n_query * -(-n_key // block)
    return Cost(4 * dim * taken + gates, 2 * dim * (n_query + n_key) + 2 * dim * taken)


def _sized(shape: tuple[int, ...]) -> dict[str, int]:
    return {"block": max(shape[0] // 8, 1)}


@mechanism("causal", mask="keys", weights=_weights, cost=_cost, sized=_sized)
def moba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = 512,
    top: int = 3,
) -> Tensor:
    """Causal softmax attention of each query to `top` blocks of keys, its own and the best. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last. block: keys; top: blocks a query. With top * block keys or fewer it is full causal attention, and a
    model can change between both at any time. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError
    without causal=True.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> moba(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    others = choice(query, key, mask=mask, block=block, top=top)
    return attend(query, key, value, others, block=block, mask=mask, scale=scale_of(query, scale))
