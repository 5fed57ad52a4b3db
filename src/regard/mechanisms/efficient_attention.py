"""Linear attention by normalising queries and keys apart.

Shen et al., Efficient Attention: Attention with Linear Complexities (arXiv:1812.01243), section 3.2, equations 3 to 5.

Each query is normalised over its channels and each channel of the keys over positions. Keys and values then meet first,
in a dim x dim context that does not grow with length. With `normalisation="scaling"`, both are divided by the square
root of the number of keys, which equals attention without softmax, divided by that number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.derivatives import again, gradients, transformed
from ._mechanism import Cost, by_head, mechanism
from .memory_efficient import fold, unfold

NORMALISATIONS = ("softmax", "scaling")
_STRIP = 2**18  # numbers taken at once


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
    query = query if scale is None else query * scale
    if normalisation == "softmax" and not transformed(query, key, value):
        return _Stripwise.apply(query, key, value, mask)  # type: ignore[no-any-return]
    return _at_once(query, key, value, mask, normalisation)


def _at_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, normalisation: str) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key = _normalised(query.to(exact), key.to(exact), mask, None, normalisation)
    output = unfold(fold(query, key.shape[1]) @ (key.mT @ value.to(exact)), query.shape[1])
    return output.to(value.dtype)


class _Stripwise(torch.autograd.Function):
    """A strip of positions at a time: nothing as long as the sequence is made but the output and the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        hidden = key if mask is None else key.masked_fill(~mask.mT, float("-inf"))
        top = hidden.amax(2, keepdim=True).to(exact).clamp_min(torch.finfo(exact).min)
        total = torch.zeros_like(top)
        context = total.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
        for where in _strips(key):
            weights = _shares(key, top, mask, where)
            total += weights.sum(2, keepdim=True)
            context += weights.mT @ value[:, :, where].to(exact)
        total = total.where(total > 0, 1.0)
        context /= total.mT
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        for where in _strips(query):
            share = fold(query[:, :, where].to(exact).softmax(-1), key.shape[1])
            output[:, :, where] = unfold(share @ context, query.shape[1])
        ctx.save_for_backward(query, key, value, mask, top, total, context)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        query, key, value, mask, top, total, context = ctx.saved_tensors
        if again(grad):
            return gradients(partial(_at_once, normalisation="softmax"), grad, query, key, value, mask)
        d_query, d_key, d_value, d_context = (torch.empty_like(t) for t in (query, key, value, context))
        d_context.zero_()
        for where in _strips(query):
            share = query[:, :, where].to(context.dtype).softmax(-1)
            given = fold(grad[:, :, where].to(context.dtype), key.shape[1])
            d_context += fold(share, key.shape[1]).mT @ given
            d_share = unfold(given @ context.mT, query.shape[1])
            d_query[:, :, where] = share * (d_share - (d_share * share).sum(-1, keepdim=True))
        mean = (context * d_context).sum(-1)[:, :, None]  # of each channel over all keys
        for where in _strips(key):
            weights = _shares(key, top, mask, where).div_(total)
            d_value[:, :, where] = weights @ d_context
            d_key[:, :, where] = weights * (value[:, :, where].to(context.dtype) @ d_context.mT - mean)
        return d_query, d_key, d_value, None


def _strips(tensor: Tensor) -> Iterator[slice]:
    """Positions of a tensor [batch, head, position, dim] that fit the cache together."""
    batch, heads, n, dim = tensor.shape
    step = max(1, _STRIP // (batch * heads * dim))
    return (slice(a, a + step) for a in range(0, n, step))


def _shares(key: Tensor, top: Tensor, mask: Tensor | None, where: slice) -> Tensor:
    """exp(key - top), which after division by its sum is each key's share of a channel; 0 where there is no key."""
    weights = (key[:, :, where].to(top.dtype) - top).exp_()
    return weights if mask is None else weights.masked_fill_(~mask[..., where].mT, 0.0)


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
