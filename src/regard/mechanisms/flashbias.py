"""Attention with a bias that is never written out.

Wu et al., FlashBias: Fast Computation of Attention with Bias (arXiv:2505.12044), section 3: a bias of low rank,
bias = query_factor @ key_factor^T, is carried by a few more channels of queries and keys, so that any kernel for plain
attention does it. Exact factors for ALiBi and for squared distances, factors by singular values of a given bias, and
factors learned from what the bias depends on (the paper's three kinds).

ALiBi's bias is -slope * (i - j), as in Press et al.; the authors' example for it has factors of +slope * (i - j), the
other sign.

Deviations: scores are scale * query @ key + bias, so the queries' own channels are scaled before factors are appended.
Half precision is computed in float32, since positions have no room in fewer digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax, visible
from ._softmax import attend


class Factors(NamedTuple):
    """bias = query @ key^T; query [batch|1, head|1, query, rank], key [batch|1, head|kv_head|1, key, rank]."""

    query: Tensor
    key: Tensor

    def bias(self) -> Tensor:
        """The whole bias. [batch|1, head|1, query, key]"""
        return self.query @ self.key.mT


def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """Slope of each head, 2^(-8/heads) to 2^-8, in logits a token (Press et al., arXiv:2108.12409). [head]"""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))


def alibi(heads: int, n_query: int, n_key: int | None = None, *, device: torch.device | None = None) -> Factors:
    """Exact factors of rank 2 of -slope * (i - j), where the last query stands at the last key. Logits."""
    n_key = n_query if n_key is None else n_key
    slopes = alibi_slopes(heads, device)[:, None]
    queries = torch.arange(n_key - n_query, n_key, device=device, dtype=slopes.dtype).expand(heads, -1)
    keys = torch.arange(n_key, device=device, dtype=slopes.dtype)
    left = torch.stack([-slopes * queries, slopes.expand_as(queries)], -1)
    return Factors(left[None], torch.stack([torch.ones_like(keys), keys], -1)[None, None])


def squared_distance(query: Tensor, key: Tensor, *, weight: float = -1.0) -> Factors:
    """Exact factors of weight * |x_i - y_j|^2, of rank dimension + 2; query, key: places [..., position, dimension]."""
    one, other = torch.ones_like(query[..., :1]), torch.ones_like(key[..., :1])
    left = torch.cat([query.square().sum(-1, keepdim=True), one, -2 * query], -1) * weight
    right = torch.cat([other, key.square().sum(-1, keepdim=True), key], -1)
    return Factors(*(t[(None,) * (4 - t.ndim)] for t in (left, right)))


def low_rank(bias: Tensor, rank: int) -> Factors:
    """The closest factors of this rank, by singular values; bias: [batch|1, head|1, query, key]."""
    if bias.ndim != 4 or not 1 <= rank <= min(bias.shape[2:]):
        raise ValueError(f"a bias [batch, head, query, key] has rank 1 to {min(bias.shape[-2:])}; got {rank=}")
    left, sizes, right = torch.linalg.svd(bias, full_matrices=False)
    root = sizes[..., None, :rank].sqrt()
    return Factors(left[..., :rank] * root, right[..., :rank, :].mT * root)


class LearnedFactors(nn.Module):
    """Two small networks that factor a bias given what it depends on: places of queries and keys.

    features: how many numbers describe a position. Train with `loss` until the bias is met; then call it.
    """

    def __init__(self, features: int, heads: int, rank: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = (
            nn.Sequential(
                nn.Linear(features, hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, heads * rank),
            )
            for _ in range(2)
        )

    def forward(self, query: Tensor, key: Tensor) -> Factors:
        """Factors for positions described by [batch|1, position, features]."""
        both = zip((self.query, self.key), (query, key), strict=True)
        return Factors(*(net(places).unflatten(-1, (self.heads, -1)).transpose(1, 2) for net, places in both))

    def loss(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Mean squared difference to a bias [batch|1, head, query, key]."""
        return (self(query, key).bias() - bias).square().mean()


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    factors = knobs.get("factors") or alibi(query.shape[1], query.shape[2], key.shape[2], device=query.device)
    keys = factors.key if factors.key.shape[1] == 1 else by_head(factors.key, query.shape[1])
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    scores = scores + Factors(factors.query, keys).bias().to(query.dtype)
    return softmax(scores, visible(query, key, causal=causal, mask=mask))


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, rank: int = 2, **_: Any) -> Cost:
    operations = 2 * (2 * dim + rank) * pairs(n_query, n_key, causal)
    return Cost(operations, (2 * dim + rank) * (n_query + n_key))


@mechanism("causal", "full", "cross", mask="pairs", weights=_weights, cost=_cost)
def flashbias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """Softmax attention over scale * query @ key + bias, the bias given by its factors. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. factors: ALiBi's unless given (see
    `alibi`, `squared_distance`, `low_rank`, `LearnedFactors`), with gradients; key factors that differ between query
    heads of one key head make a copy of keys and values for each. mask: boolean, broadcasts to
    [batch, head, query, key]. Raises ValueError where factors do not fit.

        >>> x = torch.randn(1, 4, 300, 64)
        >>> flashbias(x, x, x, causal=True, factors=alibi(4, 300)).shape
        torch.Size([1, 4, 300, 64])
    """
    heads, n_query, n_key = query.shape[1], query.shape[2], key.shape[2]
    factors = alibi(heads, n_query, n_key, device=query.device) if factors is None else factors
    _check(factors, query, key)
    exact = torch.promote_types(query.dtype, torch.float32)
    if factors.key.shape[1] not in (1, key.shape[1]):
        key, value = by_head(key, heads), by_head(value, heads)
    output = attend(
        _joined(query.to(exact) * scale_of(query, scale), factors.query),
        _joined(key.to(exact), factors.key),
        value.to(exact),
        causal=causal,
        mask=mask,
        scale=1.0,
    )
    return output.to(query.dtype)


def _joined(tensor: Tensor, factor: Tensor) -> Tensor:
    return torch.cat([tensor, factor.to(tensor.dtype).expand(*tensor.shape[:3], -1)], -1)


def _check(factors: Factors, query: Tensor, key: Tensor) -> None:
    for name, factor, tensor in zip(Factors._fields, factors, (query, key), strict=True):
        heads = {1, query.shape[1], tensor.shape[1]}
        fits = factor.ndim == 4 and factor.shape[0] in (1, len(tensor)) and factor.shape[1] in heads
        if not fits or factor.shape[2] != tensor.shape[2] or factor.shape[-1] != factors.query.shape[-1]:
            raise ValueError(
                f"flashbias: the {name} factor is [batch|1, head|1, {name}, rank], for {list(tensor.shape)}; got "
                f"{list(factor.shape)}, beside a {'/'.join(Factors._fields)} pair of {list(factors.query.shape)} and "
                f"{list(factors.key.shape)}"
            )
