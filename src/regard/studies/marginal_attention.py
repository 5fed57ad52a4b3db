"""Attention as the probability that an edge is there: the marginals of a random graph between queries and keys.

Singh and Buckley, Attention: Marginal Probability is All You Need? (arXiv:2304.04556), and its successor, Attention as
Implicit Structural Inference. An edge from query i to key j has a potential exp(scores[i, j]); which graphs are
allowed, and how likely they are before, makes the kind of attention:

- "one_key": each query has one key. Softmax over keys; a prior over keys is a mask or a position bias.
- "any": edges are independent. A sigmoid.
- "k_keys": each query has k keys. Ratios of elementary symmetric polynomials.
- "one_query": each key has one query. Softmax over queries, the shares of slot attention before its weighted mean.
- "one_to_one": each query has one key, and no two the same. Ratios of permanents: neither a softmax nor Sinkhorn's.

The last has no form of a product over queries or keys, and is there to show where the reading ends. Where queries are
unknown too, and keys lie around them, alternating between edges and queries is expectation maximisation (`iterate`).
The papers' texts were not at hand; "k_keys", "one_to_one" and the precisions of `iterate` are ours.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Edges = Literal["one_key", "any", "k_keys", "one_query", "one_to_one"]
EDGES: tuple[Edges, ...] = ("one_key", "any", "k_keys", "one_query", "one_to_one")
MATCHED = 8  # keys that "one_to_one" takes at most
GRAPHS = 2**21  # that are enumerated at most


def marginal_attention(scores: Tensor, *, prior: Tensor | None = None, edges: Edges = "one_key", k: int = 1) -> Tensor:
    """Probability of each edge given all scores, 0 to 1, in double precision. [..., query, key]

    scores [..., query, key]; prior broadcasts to them, 0 and up: the probability of each edge for "any", at most 1 and
    1/2 if not given; else a factor of each edge, 1 if not given. A prior of 0 gives exactly 0, and rows (for
    "one_query" columns) with no graph that is possible are 0.

    >>> import torch
    >>> scores = torch.tensor([[0.0, 3.0]], dtype=torch.float64).log1p()  # 0 and log 4
    >>> marginal_attention(scores), marginal_attention(scores, edges="any")
    (tensor([[0.2000, 0.8000]], dtype=torch.float64), tensor([[0.5000, 0.8000]], dtype=torch.float64))
    """
    log_weight = _log_weights(scores, prior, edges, k)
    if edges == "any":
        return log_weight.sigmoid()
    if edges == "k_keys":
        return _chosen(log_weight, k)
    if edges == "one_to_one":
        if log_weight.shape[-1] > MATCHED:
            raise ValueError(
                f"one_to_one goes through every matching, of at most {MATCHED} keys: got {scores.shape[-1]}"
            )
        return enumerate_marginals(scores, prior=prior, edges=edges)
    return log_weight.softmax(-1 if edges == "one_key" else -2).nan_to_num()


def enumerate_marginals(scores: Tensor, *, prior: Tensor | None = None, edges: Edges = "one_key", k: int = 1) -> Tensor:
    """The same by going through every graph, which `marginal_attention` is tested with.

    ValueError where there are more than two million graphs.
    """
    log_weight = _log_weights(scores, prior, edges, k)
    every = graphs(*log_weight.shape[-2:], edges=edges, k=k)
    return torch.einsum("...g,gqk->...qk", _posterior(log_weight, every), every.double())


def sample_edges(
    scores: Tensor,
    count: int,
    *,
    prior: Tensor | None = None,
    edges: Edges = "one_key",
    k: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Graphs drawn at random given scores [query, key]: hard attention. Boolean [sample, query, key]

    Their mean is `marginal_attention`. All graphs are gone through, as in `enumerate_marginals`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores to draw graphs of are [query, key], got {list(scores.shape)}")
    log_weight = _log_weights(scores, prior, edges, k)
    every = graphs(*scores.shape, edges=edges, k=k)
    posterior = _posterior(log_weight, every)
    if not posterior.sum() > 0:
        raise ValueError("the prior leaves no graph that could be drawn")
    return every[torch.multinomial(posterior, count, replacement=True, generator=generator)]


def graphs(queries: int, keys: int, *, edges: Edges, k: int = 1) -> Tensor:
    """Every graph that is allowed. Boolean [graph, query, key]"""
    if edges == "any":
        rows, count = keys, 2 ** (queries * keys)
    elif edges == "one_query":
        return graphs(keys, queries, edges="one_key").mT
    elif edges == "one_to_one":
        rows, count = keys, math.perm(keys, queries)
    else:
        rows, count = math.comb(keys, k), math.comb(keys, k) ** queries
    if count > GRAPHS:
        raise ValueError(f"{queries} queries and {keys} keys have {count} graphs, {GRAPHS} are gone through at most")
    if edges == "any":
        return torch.tensor(list(itertools.product((False, True), repeat=queries * keys))).view(-1, queries, keys)
    if edges == "one_to_one":
        chosen = torch.tensor(list(itertools.permutations(range(rows), queries))).view(count, queries)
        return torch.nn.functional.one_hot(chosen, keys).bool()
    row = torch.tensor([[key in some for key in range(keys)] for some in itertools.combinations(range(keys), k)])
    return row[torch.tensor(list(itertools.product(range(rows), repeat=queries)))]


def _log_weights(scores: Tensor, prior: Tensor | None, edges: Edges, k: int) -> Tensor:
    """Log odds of each edge against its absence, in double precision; -inf where it cannot be."""
    if edges not in EDGES:
        raise ValueError(f"edges are one of {', '.join(EDGES)}, got {edges!r}")
    if scores.ndim < 2:
        raise ValueError(f"scores are [..., query, key], got {list(scores.shape)}")
    queries, keys = scores.shape[-2:]
    if edges == "k_keys" and not 1 <= k <= keys:
        raise ValueError(f"k is from 1 to the {keys} keys, got {k}")
    if k != 1 and edges != "k_keys":
        raise ValueError(f"k is for edges='k_keys' only, got k={k} with {edges!r}")
    if edges == "one_to_one" and queries > keys:
        raise ValueError(f"{queries} queries cannot have a key each of {keys}")
    if prior is None:
        return scores.double()
    prior = prior.double()
    if not (prior >= 0).all() or (edges == "any" and (prior > 1).any()):
        raise ValueError("a prior is 0 and up" + (", and at most 1 for edges='any'" if edges == "any" else ""))
    return scores.double() + (prior.logit() if edges == "any" else prior.log())


def _posterior(log_weight: Tensor, every: Tensor) -> Tensor:
    """Probability of each graph; [..., query, key] to [..., graph]. 0 where none is possible."""
    there = torch.where(every, log_weight[..., None, :, :], 0.0).sum((-2, -1))
    if (log_weight == torch.inf).any():  # certain edges: graphs without one are impossible
        lacking = ((log_weight == torch.inf)[..., None, :, :] & ~every).any(-1).any(-1)
        certain = torch.where(every & (log_weight[..., None, :, :] < torch.inf), log_weight[..., None, :, :], 0.0)
        there = certain.sum((-2, -1)).masked_fill(lacking, -torch.inf)
    return there.softmax(-1).nan_to_num()


def _chosen(log_weight: Tensor, k: int) -> Tensor:
    """Probability of each key, where k of them are drawn without replacement. [..., key]

    exp of log weight + log e_(k-1) of the others - log e_k of all, with e the elementary symmetric polynomials.
    """
    before, after = (_sums(of, k) for of in (log_weight, log_weight.flip(-1)))
    keys = log_weight.shape[-1]
    others = torch.stack(
        [
            torch.logsumexp(torch.stack([before[j][a] + after[keys - 1 - j][k - 1 - a] for a in range(k)]), 0)
            for j in range(keys)
        ],
        -1,
    )
    return (log_weight + others - before[-1][k][..., None]).exp().nan_to_num()


def _sums(log_weight: Tensor, k: int) -> list[list[Tensor]]:
    """log of the elementary symmetric polynomials of degree 0 to k, of the first 0, 1, .. keys."""
    nothing = torch.full_like(log_weight[..., 0], -torch.inf)
    found = [[torch.zeros_like(nothing), *[nothing] * k]]
    for weight in log_weight.unbind(-1):
        last = found[-1]
        found.append([last[0], *(torch.logaddexp(last[a], last[a - 1] + weight) for a in range(1, k + 1))])
    return found


class Iterated(NamedTuple):
    """Queries that came to lie among keys."""

    queries: Tensor  # [..., query, dim]
    energy: Tensor  # [step + 1], before each step and after the last; never rises


def iterate(
    keys: Tensor,
    queries: Tensor,
    *,
    beta: float | Tensor = 1.0,
    steps: int = 1,
    prior: Tensor | None = None,
    competes: bool = False,
) -> Iterated:
    """Expectation maximisation: probabilities of edges, then each query to the mean of the keys under them.

    keys [key, dim], queries [query, dim]; edges have a potential exp(-beta/2 |query - key|^2) times the square root of
    beta^dim, with a beta above 0 for all or for each query [query]. prior: of each key, 0 and up, or with `competes` of
    each query. Each query chooses a key, which for keys of one length is the update of a modern Hopfield network:
    softmax(beta query . key) times keys. With `competes` each key chooses a query: slot attention without its norms,
    recurrent cell and MLP. A query that no key chooses stays.

    >>> import torch
    >>> found = iterate(torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.5]]))
    >>> round(float(found.queries), 4)  # tanh 0.5
    0.4621
    """
    for name, given in (("keys", keys), ("queries", queries)):
        if given.ndim != 2:
            raise ValueError(f"{name} are [{'key' if name == 'keys' else 'query'}, dim], got {list(given.shape)}")
    keys, queries = keys.double(), queries.double()
    beta = torch.as_tensor(beta, dtype=torch.float64, device=queries.device).expand(len(queries))
    if not (beta > 0).all():
        raise ValueError("beta is above 0")
    if prior is not None:
        prior = prior.double()[:, None] if competes else prior.double()
    edges: Edges = "one_query" if competes else "one_key"

    def potentials() -> Tensor:
        away = (queries[:, None] - keys).square().sum(-1)
        return keys.shape[-1] / 2 * beta.log()[:, None] - beta[:, None] / 2 * away

    def energy() -> Tensor:
        return -_log_weights(potentials(), prior, edges, 1).logsumexp(0 if competes else 1).sum()

    energies = [energy()]
    for _ in range(steps):
        shares = marginal_attention(potentials(), prior=prior, edges=edges)
        total = shares.sum(-1, keepdim=True)
        queries = torch.where(total > 0, shares @ keys / total.clamp(min=torch.finfo(total.dtype).tiny), queries)
        energies.append(energy())
    return Iterated(queries, torch.stack(energies))
