"""Linear attention by normalising queries and keys apart.

Shen et al., Efficient Attention: Attention with Linear Complexities (arXiv:1812.01243), section 3.2, equations 3 to 5.

Each query is normalised over its channels and each channel of the keys over positions. Keys and values then meet first,
in a dim x dim context that does not grow with length. With `normalisation="scaling"`, both are divided by the square
root of the number of keys, which equals attention without softmax, divided by that number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism
from ._scan import State, scan, tokens
from .memory_efficient import fold, unfold

NORMALISATIONS = ("softmax", "scaling")


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, **knobs: Any) -> Tensor:
    query, key = _normalised(query, key, mask, knobs.get("scale"), knobs.get("normalisation", "softmax"))
    return query @ by_head(key, query.shape[1]).mT


def _cost(n_query: int, n_key: int, dim: int, **_: Any) -> Cost:
    return Cost(2 * dim * dim * (n_query + n_key), 2 * dim * (n_query + n_key) + 2 * dim * dim)


@mechanism("full", "cross", mask="keys", weights=_weights, cost=_cost, scaled=False)
def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    normalisation: str = "softmax",
) -> Tensor:
    """Attention whose weights are a product of normalised queries and keys, in linear time. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. Each row of the weights is 0 or more and
    sums to 1 with "softmax"; with "scaling" it need not. causal: must be False. mask: which keys there are,
    [batch, 1, 1, key]. scale: multiplies queries before they are normalised; the paper has none. Raises ValueError for
    causal attention and for masks of pairs.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> efficient_attention(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"efficient_attention: normalisation is one of {NORMALISATIONS}; got {normalisation!r}")
    exact, kv_heads = torch.promote_types(query.dtype, torch.float32), key.shape[1]
    there = () if mask is None else (mask.mT,)
    soft, lowest = normalisation == "softmax", torch.finfo(exact).min

    def context(state: State, key: Tensor, value: Tensor, *there: Tensor) -> tuple[None, State]:
        top, *sums = state
        key, value = key.to(exact), value.to(exact)
        if not soft:
            shares, higher = key if not there else key.where(there[0], 0.0), top
        else:
            key = key if not there else key.masked_fill(~there[0], float("-inf"))
            higher = torch.maximum(top, key.detach().amax(2, keepdim=True))
            shares, kept = torch.exp(key - higher), torch.exp(top - higher).mT
            sums = [s * kept for s in sums]
        return None, (higher, sums[0] + shares.sum(2)[..., None], sums[1] + shares.mT @ value)

    def outputs(state: State, query: Tensor) -> tuple[Tensor, State]:
        query = query.to(exact) if scale is None else query.to(exact) * scale
        query = fold(query.softmax(-1) if soft else query, kv_heads)
        return unfold(query @ state[0], heads).to(value.dtype), state

    heads, strip = query.shape[1], tokens(query)
    top = key.new_full((*key.shape[:2], 1, key.shape[3]), lowest, dtype=exact)
    nothing = top.mT, top.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])
    _, (_, total, mixed) = scan(
        context, (top, torch.zeros_like(nothing[0]), nothing[1]), (key, value, *there), strip=strip
    )
    count = key.shape[2] if mask is None else mask.sum(-1)[..., None, None].clamp_min(1)
    output, _ = scan(outputs, (mixed / (total.where(total > 0, 1.0) if soft else count),), (query,), strip=strip)
    return output  # type: ignore[return-value]


def _normalised(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, normalisation: str
) -> tuple[Tensor, Tensor]:
    query = query if scale is None else query * scale
    there = None if mask is None else mask.mT  # [batch, 1, key, 1]
    if normalisation == "softmax":
        # The lowest finite score: with -inf, a sequence without keys would have NaN for its gradient.
        key = key if there is None else key.masked_fill(~there, torch.finfo(key.dtype).min)
        query, key = query.softmax(-1), key.softmax(-2)
    else:
        count = key.shape[2] if there is None else there.sum(2, keepdim=True).clamp_min(1)
        query, key = query / count**0.5, key / count**0.5
    return query, key if there is None else key.where(there, 0.0)
