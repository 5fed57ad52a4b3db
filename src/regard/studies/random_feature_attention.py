"""One attention layer with random, frozen queries and keys: what its values can learn, and from how few samples.

Fu, Guo, Bai and Mei, What can a Single Attention Layer Learn? A Study Through the Random Features Lens
(arXiv:2307.11353). One query and several keys; each head weighs keys by relu of their score and averages over them: no
softmax. The function does not depend on the order of keys, and is linear in the values, which ridge regression finds.
Against it stand as many random features of query and keys laid end to end, which know of no order either.

Only the paper's abstract was at hand. Variances are ours, chosen such that features have a mean square of about 1 on
points of length 1, as is the bias of 4: a multiple of the identity that it adds to a head's matrix favours keys that
are like the query.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class RandomFeatureAttention:
    """Heads with frozen query-key matrices [head, dim + 1, dim + 1]; a coordinate of 1 is added to every token.

    Entries are normal, of variance 1/4. bias adds that multiple of the identity, not of the last coordinate: scores
    are then also bias * query . key.

    >>> import torch
    >>> layer = RandomFeatureAttention(1, 1)
    >>> layer.matrix = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])  # scores are query * key
    >>> layer(torch.ones(1, 1), torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.5000])
    """

    def __init__(self, dim: int, heads: int, *, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        if dim < 1 or heads < 1:
            raise ValueError(f"a layer has one dimension and one head or more, got {dim} and {heads}")
        self.dim = dim
        same = torch.eye(dim + 1)
        same[-1, -1] = 0
        self.matrix = torch.randn(heads, dim + 1, dim + 1, generator=generator) / 2 + bias * same

    def features(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over keys of relu(score) * key, of each head, which values weigh. [batch, head * (dim + 1)]

        query [batch, dim], key [batch, key, dim], mask boolean [batch, key], True where a key is there. ValueError
        where a query has no key.
        """
        for name, given, axes in (("query", query, "batch"), ("key", key, "batch, key")):
            if given.ndim != axes.count(",") + 2 or given.shape[-1] != self.dim:
                raise ValueError(f"{name} is [{axes}, {self.dim}], got {list(given.shape)}")
        there = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device) if mask is None else mask
        if not there.any(1).all():
            raise ValueError("a query has no key to look at")
        query, key = F.pad(query, (0, 1), value=1.0), F.pad(key, (0, 1), value=1.0)
        score = torch.einsum("bd,hde,bke->bhk", query, self.matrix.to(query), key)
        return (score.relu() * there[:, None] @ key / there.sum(1)[:, None, None]).flatten(1)

    def __call__(self, query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output for these values [head, dim + 1], which also hold its projection. [batch]"""
        return self.features(query, key, mask) @ values.flatten()


def ridge(features: Tensor, target: Tensor, penalty: float | Sequence[float]) -> Tensor:
    """Weights [feature] of least mean squared error plus penalty * their squared norm; features [batch, feature].

    Of several penalties [penalty, feature]. Solved in double precision, by samples where these are fewer than features.

    >>> import torch
    >>> ridge(torch.eye(2), torch.tensor([1.0, 2.0]), 0.5)
    tensor([0.5000, 1.0000])
    """
    every = torch.as_tensor(penalty, dtype=torch.float64, device=features.device)
    if not (every > 0).all():
        raise ValueError(f"a penalty is above 0, got {penalty}")
    x, y = features.double(), target.double()
    dual = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.mT if dual else x.mT @ x)
    known = vectors.mT @ (y if dual else x.mT @ y)
    found = known / (values.clamp(min=0) + len(x) * every[..., None]) @ vectors.mT
    return (found @ x if dual else found).to(features.dtype)


def random_features(x: Tensor, weight: Tensor) -> Tensor:
    """relu of products with x [batch, dim] and a coordinate of 1; weight [dim + 1, feature]. [batch, feature]"""
    return (F.pad(x, (0, 1), value=1.0) @ weight).relu()


def mean_power(key: Tensor, beta: Tensor, power: int) -> Tensor:
    """A target without the query: mean over keys of (beta . key)^power; key [batch, key, dim], beta [dim]. [batch]"""
    return (key @ beta).pow(power).mean(1)


def correlation(query: Tensor, key: Tensor, beta: Tensor, power: int) -> Tensor:
    """A target that compares: mean over keys of (query . key)^power (beta . key); query [batch, dim]. [batch]"""
    return ((key @ query[:, :, None])[..., 0].pow(power) * (key @ beta)).mean(1)


def kernel(query: Tensor, key: Tensor, other_query: Tensor, other_key: Tensor) -> Tensor:
    """What two samples' features have in common, for a head, where heads without bias are endless. [query, other query]

    query [query, dim], key [query, key, dim]. The mean over pairs of keys of key . key' E relu(a) relu(b), with a and b
    their scores, which are jointly normal: the arc-cosine kernel.
    """
    query, key, other_query, other_key = (
        F.pad(t.double(), (0, 1), value=1.0) for t in (query, key, other_query, other_key)
    )
    product = torch.einsum("ikd,jld->ijkl", key, other_key)
    # Scores have variances of 1/4 of squared sizes, and a covariance of 1/4 (query . query') (key . key').
    sizes = torch.einsum("ik,jl->ijkl", _sizes(query, key), _sizes(other_query, other_key))
    cosine = (product * (query @ other_query.mT)[..., None, None] / sizes).clamp(-1, 1)
    both = sizes / 4 * ((1 - cosine.square()).sqrt() + (torch.pi - cosine.acos()) * cosine) / (2 * torch.pi)
    return (both * product).mean((-2, -1))


def _sizes(query: Tensor, key: Tensor) -> Tensor:
    return query.norm(dim=-1)[:, None] * key.norm(dim=-1)
