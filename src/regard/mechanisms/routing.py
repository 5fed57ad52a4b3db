"""Attention inside clusters that queries and keys are routed to by learned means.

Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers (arXiv:2003.05997), section 4; details
as in a public reimplementation.

Each head has means of clusters, unit vectors. A cluster takes the `window` queries and the `window` keys that are
nearest to its mean by angle, and softmax attention runs inside; a query in several clusters gets the mean of what they
give, one in none gets zeros. Means follow by a moving average of the vectors nearest to each, and a loss draws vectors
to their means. The choice has no gradient.

The choice is over all tokens, so with causal=True which keys a query meets depends on later ones, also in the paper,
though no later value reaches it: no model with it can be decoded token by token. With shared queries and keys a key is
its query normalised, and sees itself only where it sees nothing else.
Deviations: masked tokens are taken last, where the reimplementation takes them like others. Without memory keys, a
causal query whose cluster holds no earlier key gets zeros of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.mechanisms import alone
from ._layers import own
from ._mechanism import Cost, by_head, mechanism, recomputed, scale_of, softmax, visible

EPSILON = 1e-5  # of the count that outputs are divided by
ITSELF = -5e4  # the score of a shared key with itself


def _knobs(query: Tensor, n_key: int, means: Tensor | None, window: int | None, shared: bool) -> tuple[Tensor, int]:
    """Means [head, cluster, dim] and tokens of a cluster."""
    heads, n, dim = query.shape[1:]
    if means is None:
        shape = heads, max(1, round(max(n, n_key) ** 0.5)), dim
        means = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        means = F.normalize(means, dim=-1).to(query)
    if means.ndim != 3 or means.shape[0] != heads or means.shape[2] != dim:
        raise ValueError(f"routing: means are [head={heads}, cluster, dim={dim}]; got {list(means.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"routing: a cluster takes 1 token or more; got {window=}")
    if shared and n != n_key:
        raise ValueError(f"routing: shared queries and keys are as many; got {n} and {n_key}")
    return means.to(query), window or max(1, round(max(n, n_key) / means.shape[1]))


@torch.no_grad()
def members(tensor: Tensor, means: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Tokens of each cluster, those that are there first. [batch, head, cluster, token]"""
    exact = torch.promote_types(tensor.dtype, torch.float32)
    near = F.normalize(tensor.to(exact), dim=-1) @ means.to(exact).mT
    if mask is not None:
        near = near.masked_fill(~mask.mT, -2.0)  # less than any cosine
    return near.mT.topk(min(window, tensor.shape[2]), dim=-1).indices


def _chosen(
    query: Tensor, key: Tensor, mask: Tensor | None, means: Tensor, window: int, shared: bool, last: bool
) -> tuple[Tensor, Tensor]:
    mask = mask if last else None
    of_queries = mask if query.shape[2] == key.shape[2] else None
    at = members(query, means, window, of_queries)
    return at, at if shared else members(key, means, window, mask)


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    """Without memory keys."""
    key, shared = by_head(key, query.shape[1]), knobs.get("shared", False)
    means, window = _knobs(query, key.shape[2], knobs.get("means"), knobs.get("window"), shared)
    n_query, n_key = query.shape[2], key.shape[2]
    rows, columns = _chosen(query, key, mask, means, window, shared, knobs.get("masked_last", True))
    seen = visible(query, key, causal=causal, mask=mask)
    asked = F.normalize(query, dim=-1) if shared else key
    scores = query @ asked.mT * scale_of(query, scale)
    if shared:
        scores = scores.masked_fill(torch.eye(n_query, dtype=torch.bool), ITSELF)
    total, count = torch.zeros_like(scores), torch.zeros_like(scores[..., 0])
    for c in range(means.shape[1]):
        row = torch.zeros(*scores.shape[:3], dtype=torch.bool).scatter_(-1, rows[:, :, c], True)
        column = torch.zeros(*scores.shape[:2], n_key, dtype=torch.bool).scatter_(-1, columns[:, :, c], True)
        inside = row[..., None] & column[:, :, None]
        total = total + softmax(scores, inside if seen is None else inside & seen)
        count = count + row
    return total / (count + EPSILON)[..., None]


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool = False,
    means: Tensor | None = None,
    window: int | None = None,
    **_: Any,
) -> Cost:
    n = max(n_query, n_key)
    clusters = max(1, round(n**0.5)) if means is None else means.shape[1]
    window = min(window or max(1, round(n / clusters)), n)
    taken = clusters * window * min(window, n_key)
    return Cost(4 * dim * taken + 2 * dim * clusters * (n_query + n_key), 6 * dim * n + 4 * dim * clusters * window)


@mechanism("full", "causal", "cross", mask="keys", weights=_weights, cost=_cost, whole=True, ahead=True, peeks=True)
def routing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    means: Tensor | None = None,
    window: int | None = None,
    shared: bool = False,
    memory: tuple[Tensor, Tensor] | None = None,
    masked_last: bool = True,
) -> Tensor:
    """Softmax attention inside clusters, averaged over those a query is in, in n^1.5. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. means: [head, cluster, dim], unit vectors,
    as `Routing` learns them; unless given, about sqrt(n) random directions, the same ones in each call. window: tokens
    that a cluster takes, about n / clusters unless given. shared: keys are the queries, normalised, and `key` is not
    looked at. memory: keys and values [head, cluster, slot, dim] that every query of a cluster sees. mask: which keys
    there are, [batch, 1, 1, key]; masked_last: the others are in a cluster only where nothing else is left. A query of
    no cluster gets zeros. Raises ValueError for causal attention through a cache: the choice is over all tokens.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> routing(x, x, x).shape
        torch.Size([1, 4, 3000, 64])
    """
    means, window = _knobs(query, key.shape[2], means, window, shared)
    shape = means.shape[0], means.shape[1]
    if memory is not None and (memory[0].shape[:2] != shape or memory[1].shape[:3] != memory[0].shape[:3]):
        raise ValueError(
            f"routing: memory is keys and values [head, cluster, slot, dim] of {shape[0]} heads and {shape[1]} "
            f"clusters; got {[list(m.shape) for m in memory]}"
        )
    key, value = (by_head(t, query.shape[1]) for t in (key, value))
    rows, columns = _chosen(query, key, mask, means, window, shared, masked_last)
    more = memory or (None, None)
    return recomputed(_inside, query, key, value, rows, columns, mask, causal, shared, scale_of(query, scale), *more)


def _inside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    mask: Tensor | None,
    causal: bool,
    shared: bool,
    scale: float,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
) -> Tensor:
    exact, n = torch.promote_types(query.dtype, torch.float32), query.shape[2]

    def take(tensor: Tensor, at: Tensor) -> Tensor:
        spot = at.flatten(2)[..., None].expand(-1, -1, -1, tensor.shape[-1])
        return tensor.gather(2, spot).unflatten(2, at.shape[2:]).to(exact)

    q, v = take(query, rows), take(value, columns)
    k = F.normalize(q, dim=-1) if shared else take(key, columns)
    scores = q @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen & (columns[..., None, :] <= rows[..., None] + key.shape[2] - n)
    if mask is not None:
        there = mask[:, :, 0, None].expand(len(query), query.shape[1], rows.shape[2], -1)
        seen = seen & there.gather(-1, columns)[..., None, :]
    if shared:
        scores = scores.masked_fill(torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device), ITSELF)
    if memory_key is not None and memory_value is not None:
        scores = torch.cat([q @ memory_key.to(exact).mT * scale, scores], -1)
        seen = F.pad(seen, (memory_key.shape[2], 0), value=True)
        v = torch.cat([memory_value.to(exact).expand(len(v), -1, -1, -1, -1), v], -2)
    found = softmax(scores, seen) @ v
    at = rows.flatten(2)
    spot = at[..., None].expand(-1, -1, -1, v.shape[-1])
    total = found.new_zeros(*query.shape[:3], v.shape[-1]).scatter_add(2, spot, found.flatten(2, 3))
    count = found.new_zeros(query.shape[:3]).scatter_add(2, at, torch.ones_like(at, dtype=exact))
    return (total / (count + EPSILON)[..., None]).to(value.dtype)


class Routing(nn.Module):
    """Attention by learned means; takes query, key and value, and moves its means in training.

    dim: of a head; window: tokens of a cluster, about n / clusters unless given; decay: of the moving average;
    commitment: weight of `loss`, which is that of the last forward pass. The first batch in training makes the means,
    by `rounds` of k-means from random tokens of it. Call `update` after each step of the optimiser.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        clusters: int,
        *,
        window: int | None = None,
        shared: bool = False,
        decay: float = 0.999,
        commitment: float = 1e-4,
        rounds: int = 10,
    ) -> None:
        super().__init__()
        self.window, self.shared, self.decay, self.commitment = window, shared, decay, commitment
        self.rounds = rounds
        self.register_buffer("means", F.normalize(torch.randn(heads, clusters, dim), dim=-1))
        self.register_buffer("begun", torch.tensor(False))
        self.loss: Tensor | None = None
        self._next: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, **how: Any) -> Tensor:
        means: Tensor = self.means  # type: ignore[assignment]
        parts = [(query, mask if query.shape[2] == key.shape[2] else None)]
        parts += [] if self.shared else [(by_head(key, query.shape[1]), mask)]
        vectors = torch.cat([F.normalize(t, dim=-1) for t, _ in parts], 2)
        there = (
            None
            if mask is None
            else torch.cat(
                [
                    torch.ones_like(t[:, :1, :, 0], dtype=torch.bool)
                    if m is None
                    else m[:, :, 0].expand(len(t), -1, -1)
                    for t, m in parts
                ],
                2,
            )
        )
        if self.training:
            if not self.begun:
                at = torch.randint(vectors.shape[2], means.shape[:2])
                means.copy_(vectors.detach()[0].gather(1, at[..., None].expand(-1, -1, vectors.shape[3])))
                for _ in range(self.rounds):
                    means.copy_(nearest_means(vectors, means, there))
                self.begun.fill_(True)  # type: ignore[operator]
            self._next = nearest_means(vectors, means, there)
        self.loss = self.commitment * commitment(vectors, means, there)
        run = partial(routing, means=means, window=self.window, shared=self.shared, **how)
        return alone(run, [query], [key, value], mask, itself=query.shape[2] == key.shape[2], ahead=True)

    @torch.no_grad()
    def update(self) -> None:
        """Move the means towards those of the last batch."""
        if self._next is not None:
            means: Tensor = self.means  # type: ignore[assignment]
            means.mul_(self.decay).add_(self._next, alpha=1 - self.decay)
            self._next = None


def _assigned(vectors: Tensor, means: Tensor) -> Tensor:
    return (vectors.detach() @ means.mT).argmax(-1)


@torch.no_grad()
def nearest_means(vectors: Tensor, means: Tensor, there: Tensor | None = None) -> Tensor:
    """Normalised sums of the unit vectors [batch, head, token, dim] nearest to each mean; its own where there is none.

    there: which tokens there are, [batch, 1, token].
    """
    near = F.one_hot(_assigned(vectors, means), means.shape[1]).to(vectors)
    near = near if there is None else near * there[..., None]
    sums = torch.einsum("bhnc,bhnd->hcd", near, vectors)
    return torch.where(near.sum((0, 2))[..., None] > 0, F.normalize(sums, dim=-1), means)


def commitment(vectors: Tensor, means: Tensor, there: Tensor | None = None) -> Tensor:
    """Mean squared difference of the unit vectors and their nearest means; the gradient is that of the vectors. []"""
    heads = torch.arange(means.shape[0], device=means.device)[:, None]
    off = (vectors - means[heads, _assigned(vectors, means)]).square()
    return off.mean() if there is None else off.masked_select(there[..., None].expand_as(off)).mean()


def convert(model: nn.Module, *, clusters: int, window: int | None = None) -> Callable[[], None]:
    """Route every attention of a model by means of its own; gives the function that undoes it.

    Means are made by the first batch in training, and moved by `update` of each module. Add the sum of their `loss`.

        undo = convert(model, clusters=16)
        ...
        undo()
    """
    return own(model, routing, lambda dim, heads, _: Routing(dim, heads, clusters, window=window))
