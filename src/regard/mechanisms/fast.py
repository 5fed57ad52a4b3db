"""Attention whose exponential is a polynomial: a full map in linear time, since a polynomial of a product factorises.

Gerami et al., FAST: Factorizable Attention for Speeding up Transformers (arXiv:2402.07901); forms and normalisation as
in armingerami/reproducing_fastmax_results. weight_ij = f(s_ij) / sum over visible j of f(s_ij), with f the Taylor
polynomial of exp, 1 + s or 1 + s + s^2 / 2. Sums of keys' monomials times values are all that a query needs of them.

f of order 2 is 1/2 or more, also where scores are far below 0: unlike softmax it grows again there, and adding a
constant to all scores changes the weights. f of order 1 is negative below -1.

Deviations: monomials that are the same in two orders are taken once; of the blocks of causal attention only sums are
kept between, and products inside are made as a map. The authors' default normalises queries and keys over all tokens,
which is not causal: here it is off unless asked for (`normalise`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, scale_of, visible
from ._scan import State, scan, tokens

NORMALISATIONS = ("none", "token")


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    if knobs.get("normalise", "none") == "token":
        query, key = normalised(query), normalised(key, mask)
    scores = query @ by_head(key, query.shape[1]).mT * _scale(query, scale, knobs.get("normalise", "none"))
    values, seen = _polynomial(scores, knobs.get("order", 2)), visible(query, key, causal=causal, mask=mask)
    values = values if seen is None else values.where(seen, 0.0)
    total = values.sum(-1, keepdim=True)
    return values / total.where(total != 0, 1.0)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, order: int = 2, block: int = 128, **_: Any):
    monomials = 1 + dim + (dim * (dim + 1) / 2 if order == 2 else 0)
    inside = 4 * dim * n_query * (min(block, n_query) + 1) / 2 if causal else 0
    return Cost(inside + 2 * monomials * (dim + 1) * (n_query + n_key), 2 * dim * (n_query + n_key))


def normalised(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    """Channels less their mean, over the largest length among a head's tokens that are there: at most 1 long."""
    tensor = tensor - tensor.mean(-1, keepdim=True)
    lengths = tensor.norm(dim=-1, keepdim=True)
    top = (lengths if mask is None else lengths.masked_fill(~mask.mT, 0.0)).amax(2, keepdim=True)
    return tensor / top.where(top > 0, 1.0)


def step(
    state: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, order: int = 2
) -> tuple[Tensor, Tensor]:
    """One token after another in constant memory: the output, and the state [batch, head, monomial, dim + 1].

    query: [batch, head, 1, dim]; key, value: [batch, kv_head, 1, dim]; state: None at the first token.
    """
    heads, exact = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    added = _monomials(by_head(key, heads).to(exact), order).mT @ _with_ones(by_head(value, heads).to(exact))
    state = added if state is None else state + added
    factors = _factors(state, query.shape[-1], scale_of(query, scale), order)
    return _divided(_monomials(query.to(exact), order) @ (factors * state)).to(value.dtype), state


@mechanism("causal", "full", "cross", mask="keys", weights=_weights, cost=_cost, step=step)
def fast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    order: int = 2,
    normalise: str = "none",
    block: int = 128,
) -> Tensor:
    """Attention by a polynomial of the scores instead of their exponential, in linear time. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last. Rows sum to 1; with order=1 weights can be negative, and a row whose sum is 0 gives zeros. Order 2 takes
    dim^2 / 2 monomials a token, so that it is faster than softmax only over more keys than that. mask: which keys
    there are, [batch, 1, 1, key]. scale: dim ** -0.5 unless given, 1 with normalise="token": `normalised` queries and
    keys, over all tokens, which is refused for causal attention. block: tokens taken at once, causal; any gives the
    same. Raises ValueError for other orders.

        >>> x = torch.randn(1, 4, 3000, 16)
        >>> fast(x, x, x, causal=True).shape
        torch.Size([1, 4, 3000, 16])
    """
    if order not in (1, 2) or normalise not in NORMALISATIONS or block < 1:
        raise ValueError(
            f"fast: order is 1 or 2, normalise one of {NORMALISATIONS}, and a block holds 1 token or more; got "
            f"{order=}, {normalise=}, {block=}"
        )
    scale = _scale(query, scale, normalise)
    if normalise == "token":
        if causal:
            raise ValueError("fast: normalise='token' looks at all tokens, later ones too: not for causal attention")
        query, key = normalised(query), normalised(key, mask)
    heads, dim, first = query.shape[1], query.shape[-1], key.shape[2] - query.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)

    def taken(key: Tensor, value: Tensor, *there: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, and values with a 1 that counts them; of keys that are not there, zeros."""
        values = _with_ones(by_head(value, heads).to(exact))
        return by_head(key, heads).to(exact), values.where(there[0], 0.0) if there else values

    def gather(state: State, *strip: Tensor) -> tuple[None, State]:
        key, values = taken(*strip)
        return None, (state[0] + _monomials(key, order).mT @ values,)

    def give(state: State, query: Tensor) -> tuple[Tensor, State]:
        return _divided(_monomials(query.to(exact), order) @ (factors * state[0])).to(value.dtype), state

    def past(state: State, query: Tensor, *strip: Tensor) -> tuple[Tensor, State]:
        query, (key, values) = query.to(exact), taken(*strip)
        inside = _polynomial(query @ key.mT * scale, order).tril() @ values
        before = _monomials(query, order) @ (factors * state[0])
        state = (state[0] + _monomials(key, order).mT @ values,) if n > block else state
        return _divided(inside + before).to(value.dtype), state

    n, there = query.shape[2], () if mask is None else (mask.mT,)
    monomials = 1 + dim + (dim * (dim + 1) // 2 if order == 2 else 0)
    held = (query.new_zeros(*query.shape[:2], monomials, value.shape[-1] + 1, dtype=exact),)
    factors, strip = _factors(held[0], dim, scale, order), max(64, tokens(query) * dim // monomials)
    strips = key, value, *there
    if not causal:
        held = scan(gather, held, strips, strip=strip)[1]
        return scan(give, held, (query,), strip=strip)[0]  # type: ignore[return-value]
    if first:
        held = scan(gather, held, [t[:, :, :first] for t in strips], strip=strip)[1]
    return scan(past, held, (query, *(t[:, :, first:] for t in strips)), strip=block)[0]  # type: ignore[return-value]


def _scale(query: Tensor, scale: float | None, normalise: str) -> float:
    return 1.0 if scale is None and normalise == "token" else scale_of(query, scale)


def _polynomial(scores: Tensor, order: int) -> Tensor:
    return 1 + scores if order == 1 else 1 + scores + scores * scores / 2


def _monomials(tensor: Tensor, order: int) -> Tensor:
    """1, the channels, and the products of two of them, each once. [batch, head, token, monomial]"""
    parts = [torch.ones_like(tensor[..., :1]), tensor]
    if order == 2:
        dim = tensor.shape[-1]
        parts += [tensor[..., i : i + 1] * tensor[..., i:] for i in range(dim)]
    return torch.cat(parts, -1)


def _factors(like: Tensor, dim: int, scale: float, order: int) -> Tensor:
    """What stands before each monomial: products of two different channels stand for two. [monomial, 1]"""
    factors = [1.0] + [scale] * dim
    if order == 2:
        factors += [scale**2 * (0.5 if i == j else 1.0) for i in range(dim) for j in range(i, dim)]
    return like.new_tensor(factors)[:, None]


def _with_ones(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def _divided(sums: Tensor) -> Tensor:
    total = sums[..., -1:]
    return sums[..., :-1] / total.where(total != 0, 1.0)
