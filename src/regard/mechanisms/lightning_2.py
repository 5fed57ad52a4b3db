"""Causal linear attention with decay, in blocks: products inside a block, a running state between blocks.

Qin et al., Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models
(arXiv:2401.04695), section 3, algorithms 1 and 2; slopes and block size as in OpenNLPLab/lightning-attention.

output_i = sum over j <= i of exp(-slope * (i - j)) * (query_i . key_j) * value_j. Deviations: blocks are taken by all
heads together in plain torch, not one by one on a chip. Activation, normalisation and gate around the operator belong
to TransNormerLLM's layer and are not done here, so in another model the output is larger than that of softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism, visible
from ._scan import Product, State, scan, tokens


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
    product = Product(rates, block)

    def step(state: State, query: Tensor, key: Tensor, value: Tensor, *there: Tensor) -> tuple[Tensor, State]:
        value = value.where(there[0], 0.0) if there else value
        asked = query.to(exact) if scale is None else query.to(exact) * scale
        output, held = product(state[0], asked, *(by_head(t, heads).to(exact) for t in (key, value)))
        return output.to(query.dtype), (held,)

    # Keys before the first query meet no query of their own: they are a state to start from.
    before = value[:, :, :first] if mask is None else value[:, :, :first].where(mask.mT[:, :, :first], 0.0)
    weight = torch.exp(-rates[:, None] * torch.arange(first - 1, -1, -1, device=query.device))[..., None]
    held = (by_head(key[:, :, :first], heads).to(exact) * weight).mT @ by_head(before, heads).to(exact)
    there = () if mask is None else (mask.mT,)
    later = (t[:, :, first:] for t in (key, value, *there))
    output, _ = scan(step, (held,), (query, *later), strip=tokens(query, block))
    return output  # type: ignore[return-value]


def _rates(decay: Tensor | None, query: Tensor) -> Tensor:
    if decay is None:
        decay = slopes(query.shape[1])
    elif decay.shape != query.shape[1:2] or decay.requires_grad or (decay < 0).any():
        raise ValueError(
            f"lightning_2: decay is a rate of 0 or more for each of {query.shape[1]} heads, which is not learned; got "
            f"{list(decay.shape)}{', with requires_grad' if decay.requires_grad else ''}"
        )
    return decay.to(query.device, torch.promote_types(query.dtype, torch.float32))
