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

from ._mechanism import Cost, by_head, kept, scale_of, softmax
from ._modules import module
from ._scan import State as Carried
from ._scan import scan, tokens


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


def cost(n: int, dim: int, *, block: int = 16) -> Cost:
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
    block: int = 16,
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
    exact, heads, lowest = torch.promote_types(key.dtype, torch.float32), query.shape[1], _lowest(key)
    asked = (query * scale_of(query, scale)).expand(len(key), -1, -1, -1).to(exact)
    top = asked.new_full(asked.shape[:2], lowest)
    there = () if mask is None else (mask.mT,)
    if there:
        key, value = (kept(t, there[0]) for t in (key, value))

    def step(held: Carried, key: Tensor, value: Tensor, *there: Tensor) -> tuple[Tensor, Carried]:
        query, *before = held
        scores = (by_head(key, heads).to(exact) @ query.mT)[..., 0]
        scores = scores.masked_fill(~there[0][..., 0], float("-inf")) if there else scores
        output, after = _prefixes(State(*before), scores, by_head(value, heads).to(exact), block)
        return output.to(value.dtype), (query, *after)

    held = asked, top, torch.zeros_like(top), top.new_zeros(*top.shape, value.shape[-1])
    output, _ = scan(step, held, (key, value, *there), strip=tokens(asked.expand(-1, -1, key.shape[2], -1), block))
    return output  # type: ignore[return-value]


def prefixes(scores: Tensor, value: Tensor, *, block: int = 64) -> Tensor:
    """What softmax over every prefix of scores [batch, head, key] makes of values. [batch, head, key, dim]"""
    top = scores.new_full(scores.shape[:2], _lowest(scores))
    start = State(top, torch.zeros_like(top), top.new_zeros(*top.shape, value.shape[-1]))
    return _prefixes(start, scores, value, block)[0]


def _prefixes(before: State, scores: Tensor, value: Tensor, block: int) -> tuple[Tensor, State]:
    """The output at each of some tokens, [batch, head, key, dim], and the state after the last."""
    n, lowest = scores.shape[2], _lowest(scores)
    extra = -n % block
    # Blocks of the same length: what is added at the end is seen by nothing before it.
    top = F.pad(scores, (0, extra), value=float("-inf"))
    mixed = F.pad(torch.cat([value, torch.ones_like(value[..., :1])], -1), (0, 0, 0, extra)).unflatten(2, (-1, block))
    level = torch.cat([before.top[..., None], top.detach()], -1).cummax(-1).values.clamp_min(lowest)
    top, level, at = (t.unflatten(2, (-1, block)) for t in (top, level[..., 1:], level[..., :-1]))
    last, start = level[..., -1], at[..., 0]  # the level at the end of a block, and before it
    # What each block adds, and the state at its start: levels only rise, so that no factor is above 1.
    added = torch.exp(top - last[..., None])[..., None, :] @ mixed
    joined = torch.cat([torch.cat([before.mixed, before.total[..., None]], -1)[:, :, None], added[..., 0, :]], 2)
    levels = torch.cat([before.top[..., None], last], -1)
    carried = torch.exp((levels[..., None, :] - levels[..., None]).tril()).tril() @ joined
    inside = torch.exp((top[..., None, :] - level[..., None]).tril()).tril() @ mixed
    whole = inside + torch.exp(start[..., None] - level)[..., None] * carried[:, :, :-1, None]
    output = _state(level.flatten(2), whole.flatten(2, 3)).output()[:, :, :n]
    return output, _state(levels[..., -1], carried[:, :, -1])


def _state(top: Tensor, sums: Tensor) -> State:
    """With the total in the last channel of the sums."""
    return State(top, sums[..., -1], sums[..., :-1])


def _lowest(like: Tensor) -> float:
    return torch.finfo(torch.promote_types(like.dtype, torch.float32)).min


def _tokens(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> State:
    """Each token by itself."""
    exact, heads = torch.promote_types(key.dtype, torch.float32), query.shape[1]
    top = (by_head(key, heads).to(exact) @ query.to(exact).mT)[..., 0] * scale_of(query, scale)
    top = top if mask is None else top.masked_fill(~mask[:, :, 0], float("-inf"))
    return State(top, torch.ones_like(top), by_head(value, heads).to(exact).expand(len(top), -1, -1, -1))


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


@module("causal")
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
