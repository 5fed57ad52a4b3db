"""Attention as a recurrent network: what one learned query sees of every prefix.

Feng et al., Attention as an RNN (arXiv:2405.13956), sections 3.1 to 3.3 and appendix A.

The query does not depend on the input, so the attention to every prefix follows from one scan over (maximum, sum of
weights, weighted sum of values), and from the last prefix to the next by a constant-memory step. Deviation: the paper
scans token by token (Hillis and Steele); we scan blocks, inside which prefixes are a product with a triangle, which
gives the same in fewer operations that touch memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._mechanism import Cost, by_head, scale_of, softmax


class State(NamedTuple):
    """What attention needs to know of a prefix; each of [batch, head, ...]."""

    top: Tensor  # the largest score
    total: Tensor  # the sum of exp(score - top)
    mixed: Tensor  # the sum of exp(score - top) * value; [batch, head, ..., dim]

    def then(self, other: State) -> State:
        """Of this prefix and what follows it. Associative."""
        top = torch.maximum(self.top, other.top).detach()  # any level gives the same, so it needs no gradient
        left, right = (torch.exp(s.top - top) for s in (self, other))
        total = self.total * left + other.total * right
        return State(top, total, self.mixed * left[..., None] + other.mixed * right[..., None])

    def output(self) -> Tensor:
        """[batch, head, ..., dim]; zeros where there was nothing."""
        seen = self.total > 0
        return (self.mixed / self.total.where(seen, 1.0)[..., None]).where(seen[..., None], 0.0)


def weights(query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """What it amounts to: row i is a softmax over keys 0 to i. [batch, head, key, key]"""
    n = key.shape[2]
    scores = (query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)).expand(-1, -1, n, -1)
    past = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()
    return softmax(scores, past if mask is None else past & mask)


def cost(n: int, dim: int, *, block: int = 64) -> Cost:
    """Of one head over `n` tokens."""
    return Cost(2 * dim * n * (min(block, n) + 1) / 2 + 2 * dim * n, 3 * dim * n)


def step(
    state: State | None, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> tuple[Tensor, State]:
    """One token more: the output [batch, head, 1, dim], and the state, whose size does not grow.

    query: [batch|1, head, 1, dim], the same at every token; key, value: [batch, kv_head, 1, dim]; state: None first.
    """
    now = _tokens(query, key, value, None, scale)
    state = now if state is None else state.then(now)
    return state.output().to(value.dtype), state


def aaren(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = 64,
) -> Tensor:
    """Attention of one query to every prefix of the keys, in linear time. [batch, head, key, dim]

    query: [batch|1, head, 1, dim], learned; key, value: [batch, kv_head, key, dim]. Output i mixes values 0 to i. mask:
    which keys there are, boolean [batch, 1, 1, key]; a prefix without any gives zeros. scale: dim ** -0.5 unless
    given. block: tokens taken at once; any gives the same. It is no attention implementation for transformers, whose
    layers bring a query for each token: use the layer `Aaren`. Raises ValueError for more than one query.

        >>> query, x = torch.randn(1, 4, 1, 64), torch.randn(2, 4, 300, 64)
        >>> aaren(query, x, x).shape
        torch.Size([2, 4, 300, 64])
    """
    _check(query, key, value, mask, block)
    return prefixes(_tokens(query, key, value, mask, scale), block).to(value.dtype)


def prefixes(tokens: State, block: int = 64) -> Tensor:
    """What softmax over every prefix of these tokens gives, each by itself so far. [batch, head, token, dim]"""
    top, n = tokens.top, tokens.top.shape[2]
    extra = -n % block
    # Blocks of the same length: what is added at the end is seen by nothing before it.
    top = F.pad(tokens.top, (0, extra), value=float("-inf")).unflatten(2, (-1, block))
    mixed = F.pad(tokens.mixed, (0, 0, 0, extra)).unflatten(2, (-1, block))
    level = top.detach().cummax(-1).values.clamp_min(torch.finfo(top.dtype).min)  # of each prefix of a block
    triangle = torch.exp((top[..., None, :] - level[..., None]).tril()).tril()
    inside = State(level, triangle.sum(-1), triangle @ mixed)
    before = _scan(State(*(t[:, :, :-1, -1] for t in inside)))
    before = State(
        F.pad(before.top, (1, 0), value=float(torch.finfo(top.dtype).min)),
        F.pad(before.total, (1, 0)),
        F.pad(before.mixed, (0, 0, 1, 0)),
    )
    whole = State(before.top[..., None], before.total[..., None], before.mixed[..., None, :]).then(inside)
    return whole.output().flatten(2, 3)[:, :, :n]


def _tokens(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> State:
    """Each token by itself."""
    exact, heads = torch.promote_types(key.dtype, torch.float32), query.shape[1]
    top = (by_head(key, heads).to(exact) @ query.to(exact).mT)[..., 0] * scale_of(query, scale)
    top = top if mask is None else top.masked_fill(~mask[:, :, 0], float("-inf"))
    return State(top, torch.ones_like(top), by_head(value, heads).to(exact).expand(len(top), -1, -1, -1))


def _scan(state: State) -> State:
    """The state of every prefix along the third axis, in log2 steps."""
    apart, n = 1, state.top.shape[2]
    while apart < n:
        later = State(*(t[:, :, :-apart] for t in state)).then(State(*(t[:, :, apart:] for t in state)))
        state = State(*(torch.cat([t[:, :, :apart], new], 2) for t, new in zip(state, later, strict=True)))
        apart *= 2
    return state


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, block: int) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not (query.ndim == key.ndim == value.ndim == 4) or query.shape[2] != 1:
        raise ValueError(f"aaren: takes one query [batch|1, head, 1, dim] for all tokens; got {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] not in (1, len(key)) or query.shape[1] % key.shape[1]:
        raise ValueError(f"aaren: key and value belong together, and to the query; got {shapes}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, 1, key.shape[2])):
        raise ValueError(
            f"aaren: a mask says which keys there are, boolean [batch|1, 1, 1, key={key.shape[2]}]; got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    if block < 1:
        raise ValueError(f"aaren: a block holds 1 token or more; got {block=}")


class Aaren(nn.Module):
    """The paper's layer in place of self-attention: [batch, token, dim] to the same, causal, with a learned query.

    >>> layer = Aaren(64, heads=4)
    >>> layer(torch.randn(2, 300, 64)).shape
    torch.Size([2, 300, 64])
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Aaren: {heads} heads do not share {dim} channels evenly")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.from_query, self.to_key, self.to_value, self.to_output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Every prefix at once. mask: which tokens there are, boolean [batch, token]."""
        mask = None if mask is None else mask[:, None, None]
        output = aaren(*self._parts(hidden), mask=mask)
        return self.to_output(output.transpose(1, 2).flatten(2))

    def step(self, state: State | None, hidden: Tensor) -> tuple[Tensor, State]:
        """One token [batch, 1, dim] more: the output, and the state."""
        output, state = step(state, *self._parts(hidden))
        return self.to_output(output.transpose(1, 2).flatten(2)), state

    def _parts(self, hidden: Tensor) -> tuple[Any, ...]:
        query = self.from_query(self.query)[None, None]
        parts = (query, self.to_key(hidden), self.to_value(hidden))
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
