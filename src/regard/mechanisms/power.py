"""Attention to blocks at distances that are powers of two.

Chen et al., PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention
(arXiv:2503.03588), section 3.3 and algorithm 1.

A block of queries sees the key blocks whose distance is a power of two, a window of the nearest ones and the first
ones. Any distance is a sum of powers of two, so after d layers a token has seen the 2^d blocks before it. Block size,
window and first blocks are those of the paper's experiments: at 32k tokens a row takes up about ten blocks.
Deviation: window and first blocks are counted in whole blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.native import Blocks
from ._blocks import attend, listed
from ._mechanism import Cost, by_head, mechanism, scale_of, softmax, visible


def pattern(n_block: int, *, window: int = 5, sink: int = 1) -> Tensor:
    """Which key blocks each block of queries sees. [query block, key block], boolean

    window: the nearest blocks, a block's own among them; sink: the first ones.
    """
    if window < 1 or sink < 0:
        raise ValueError(f"power: a block sees itself at least: window >= 1, sink >= 0; got {window=}, {sink=}")
    at = torch.arange(n_block)
    apart = at[:, None] - at
    return (apart >= 0) & ((apart & (apart - 1) == 0) | (apart < window) | (at < sink))


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    block, n_query, n_key = knobs.get("block", 256), query.shape[2], key.shape[2]
    blocks = pattern(-(-n_key // block), **{k: v for k, v in knobs.items() if k in ("window", "sink")})
    at = torch.arange(n_key) // block
    taken = blocks[at[n_key - n_query :]][:, at].to(query.device)
    seen = visible(query, key, causal=causal, mask=mask)
    return softmax(
        query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), taken if seen is None else taken & seen
    )


def _cost(
    n_query: int, n_key: int, dim: int, *, block: int = 256, window: int = 5, sink: int = 1, causal: bool = True
) -> Cost:
    counts = pattern(-(-n_key // block), window=window, sink=sink)[(n_key - n_query) // block :].sum(-1)
    taken = int(counts.sum())
    own = len(counts) * (block - 1) * block / 2  # of a block's own square, what lies in the future
    pairs = (taken * block * block - own) * n_query / (len(counts) * block)
    return Cost(4 * dim * pairs, 2 * dim * (n_query + taken * block))


def _sized(shape: tuple[int, ...]) -> dict[str, int]:
    return {"block": max(shape[0] // 16, 1), "window": 2}


@mechanism("causal", mask="pairs", weights=_weights, cost=_cost, sized=_sized)
def power(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = 256,
    window: int = 5,
    sink: int = 1,
) -> Tensor:
    """Causal softmax attention to blocks at power-of-two distances, in n log n. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last, so that decoding with a cache reads a few blocks of it. block: tokens; window, sink: blocks, the nearest
    and the first. Up to block * (window + 1) tokens or so it is full causal attention. mask: boolean, broadcasts to
    [batch, head, query, key]. Raises ValueError without causal=True.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> power(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    if block < 1:
        raise ValueError(f"power: a block holds 1 token or more; got {block=}")
    n_query, n_key = query.shape[2], key.shape[2]
    first = n_key - n_query  # position of the first query
    chosen = pattern(-(-n_key // block), window=window, sink=sink).to(query.device)
    # Blocks count from the first key, so queries that begin inside one are taken up to its end first.
    border = min(-(-first // block) * block, n_key)
    parts = []
    for a, b in ((first, border), (border, n_key)):
        if a < b:
            rows = chosen[a // block : -(-b // block), : -(-b // block)]
            blocks = Blocks(*listed(rows[None, None]), block, block)
            inside = None if mask is None else mask[..., :b] if mask.shape[-1] > 1 else mask
            if inside is not None and inside.shape[2] > 1:
                inside = inside[:, :, a - first : b - first]
            queries = query[:, :, a - first : b - first]
            parts.append(
                attend(
                    queries,
                    key[:, :, :b],
                    value[:, :, :b],
                    blocks,
                    causal=True,
                    mask=inside,
                    scale=scale_of(query, scale),
                )
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
