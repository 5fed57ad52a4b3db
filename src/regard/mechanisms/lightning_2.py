"""Causal linear attention with decay, in blocks: products inside a block, a running state between blocks.

Qin et al., Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models
(arXiv:2401.04695), section 3, algorithms 1 and 2; slopes and block size as in OpenNLPLab/lightning-attention.

output_i = sum over j <= i of exp(-slope * (i - j)) * (query_i . key_j) * value_j. Deviations: blocks are taken by all
heads together in plain torch, not one by one on a chip. Activation, normalisation and gate around the operator belong
to TransNormerLLM's layer and are not done here, so in another model the output is larger than that of softmax.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.derivatives import again, gradients, transformed
from ._mechanism import Cost, by_head, mechanism, visible


def slopes(heads: int) -> Tensor:
    """Rate at which each head forgets, per token: ALiBi's slopes, steepest first. [head]"""
    whole = 2 ** math.floor(math.log2(heads))
    found = [2.0 ** (-8.0 * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-4.0 * i / whole) for i in range(1, 2 * whole + 1, 2)]
    return torch.tensor(found + between[: heads - whole])


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    n_query, n_key, heads = query.shape[2], key.shape[2], query.shape[1]
    at = torch.arange(n_key - n_query, n_key, device=query.device)[:, None]
    apart = (at - torch.arange(n_key, device=query.device)).clamp_min(0)
    decay = torch.exp(-_rates(knobs.get("decay"), query)[:, None, None] * apart)
    seen = visible(query, key, causal=causal, mask=mask)
    scores = query @ by_head(key, heads).mT * decay * (1.0 if scale is None else scale)
    return scores if seen is None else scores.where(seen, 0.0)


def _cost(n_query: int, n_key: int, dim: int, *, block: int = 64, **_: Any) -> Cost:
    inside = 4 * dim * n_query * (min(block, n_query) + 1) / 2  # of the square of a block, one half
    return Cost(inside + 2 * dim * dim * (n_query + n_key), 2 * dim * (n_query + n_key))


def step(
    state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another in constant memory: the output, and the state [batch, head, dim, dim] for the next.

    query: [batch, head, 1, dim]; key, value: [batch, kv_head, 1, dim]; state: None at the first token.
    """
    heads, exact = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    pair = by_head(key, heads).mT.to(exact) @ by_head(value, heads).to(exact)
    state = pair if state is None else state * torch.exp(-_rates(decay, query))[:, None, None] + pair
    return (query.to(exact) @ state * (1.0 if scale is None else scale)).to(query.dtype), state


@mechanism("causal", mask="keys", weights=_weights, cost=_cost, step=step, scaled=False)
def lightning_2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    decay: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Causal linear attention whose weights decay with distance, in linear time. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last. Weights have any sign, and rows do not sum to 1. mask: which keys there are, [batch, 1, 1, key]; masked
    ones still count as distance. scale: multiplies the output; 1 unless given. decay: rate of forgetting of each head,
    per token, [head], 0 for none; ALiBi's slopes unless given; it gets no gradient. block: tokens taken at once; any
    gives the same. Raises ValueError where the decay does not fit.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> lightning_2(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    if block < 1:
        raise ValueError(f"lightning_2: a block holds 1 token or more; got {block=}")
    heads, first = query.shape[1], key.shape[2] - query.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    rates = _rates(decay, query)
    value = value if mask is None else value.where(mask.mT, 0.0)
    key, value = by_head(key, heads), by_head(value, heads)
    # Keys before the first query meet no query of their own: they are a state to start from.
    weight = torch.exp(-rates[:, None] * torch.arange(first - 1, -1, -1, device=query.device))[..., None]
    state = (key[:, :, :first].to(exact) * weight).mT @ value[:, :, :first].to(exact)
    query = query if scale is None else query * scale
    arguments = query, key[:, :, first:], value[:, :, first:], state, rates, block
    return _forward(*arguments) if transformed(query, key, value) else _Blockwise.apply(*arguments)  # type: ignore[no-any-return]


def _rates(decay: Tensor | None, query: Tensor) -> Tensor:
    if decay is None:
        decay = slopes(query.shape[1])
    elif decay.shape != query.shape[1:2] or decay.requires_grad or (decay < 0).any():
        raise ValueError(
            f"lightning_2: decay is a rate of 0 or more for each of {query.shape[1]} heads, which is not learned; got "
            f"{list(decay.shape)}{', with requires_grad' if decay.requires_grad else ''}"
        )
    return decay.to(query.device, torch.promote_types(query.dtype, torch.float32))


class _Decay(NamedTuple):
    """Factors inside a block of one length."""

    inside: Tensor  # [head, query, key]: from key to query
    into: Tensor  # [head, query, 1]: from the state to a query
    out: Tensor  # [head, key, 1]: from a key to the next state
    over: Tensor  # [head, 1, 1]: from state to state


def _decays(rates: Tensor, length: int) -> _Decay:
    at = torch.arange(length, device=rates.device)
    apart = at[:, None] - at
    by = -rates[:, None, None]
    return _Decay(
        torch.exp(by * apart.clamp_min(0)).tril(),
        torch.exp(by * (at[:, None] + 1)),
        torch.exp(by * (length - 1 - at[:, None])),
        torch.exp(by * length),
    )


class _Blocks:
    """The blocks of a sequence, and the decay inside each."""

    def __init__(self, rates: Tensor, block: int, n: int) -> None:
        self.places = [slice(a, min(a + block, n)) for a in range(0, n, block)]
        self.dtype = rates.dtype
        self.decays = {length: _decays(rates, length) for length in {p.stop - p.start for p in self.places}}

    def take(self, where: slice, *tensors: Tensor) -> tuple[Any, ...]:
        decay = self.decays[where.stop - where.start]
        return decay, *(t[:, :, where].to(self.dtype) for t in tensors)


def _forward(query: Tensor, key: Tensor, value: Tensor, state: Tensor, rates: Tensor, block: int) -> Tensor:
    blocks, outputs = _Blocks(rates, block, query.shape[2]), []
    for where in blocks.places:
        decay, q, k, v = blocks.take(where, query, key, value)
        outputs.append(((q @ k.mT * decay.inside) @ v + q @ state * decay.into).to(query.dtype))
        state = state * decay.over + (k * decay.out).mT @ v
    return torch.cat(outputs, 2)


class _Blockwise(torch.autograd.Function):
    """Nothing is kept but the inputs: the backward pass makes the states again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, state: Tensor, rates: Tensor, block: int
    ) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(query, key, value, state, rates)
        return _forward(query, key, value, state, rates, block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        query, key, value, state, rates = ctx.saved_tensors
        if again(grad):
            return *gradients(partial(_forward, block=ctx.block), grad, query, key, value, state, rates), None
        blocks, held = _Blocks(rates, ctx.block, query.shape[2]), state
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        for where in blocks.places:
            decay, k, v, g = blocks.take(where, key, value, grad)
            d_query[:, :, where] = (g @ v.mT).mul_(decay.inside) @ k + (g @ held.mT).mul_(decay.into)
            held = held * decay.over + (k * decay.out).mT @ v
        d_state = torch.zeros_like(held)
        for where in reversed(blocks.places):
            decay, q, k, v, g = blocks.take(where, query, key, value, grad)
            d_key[:, :, where] = (v @ g.mT).mul_(decay.inside.mT) @ q + (v @ d_state.mT).mul_(decay.out)
            d_value[:, :, where] = (k @ q.mT).mul_(decay.inside.mT) @ g + (k @ d_state).mul_(decay.out)
            d_state = d_state * decay.over + (q * decay.into).mT @ g
        return d_query, d_key, d_value, d_state, None, None
