"""Linear attention that conserves flow: keys compete for what leaves them, queries are gated by what reaches them.

Wu et al., Flowformer: Linearizing Transformers with Conservation Flows (arXiv:2202.06258), section 3.2, equations 4 to
8; causal as in thuml/Flowformer. With q and k the sigmoids of query and key, and eps added to each of their channels,

    into_i = q_i . sum of k_j                 out of_j = k_j . sum of q_i
    kept into_i = q_i . sum of k_j / out of_j     kept out of_j = k_j . sum of q_i / into_i, between -1 and 1
    output_i = sigmoid(kept into_i * queries / keys) q_i / into_i . sum of k_j^T softmax_j(kept out of) keys value_j

Causal, each sum is over the past, the kept flows are of means over it, and softmax_j is over keys up to j, not up to
the query. Rows of weights sum to about the gate, not to 1. Deviation: what a mask leaves out is left out of every sum
and count, as a key and, of as many keys as queries, as a query; the authors' code has no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._mechanism import Cost, by_head, mechanism
from ._scan import Product, State, scan, tokens

EPS = 1e-6
_BLOCK = 64


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    n_query, n_key = query.shape[2], key.shape[2]
    q, k = (query if scale is None else query * scale).sigmoid(), by_head(key, query.shape[1]).sigmoid()
    keys = q.new_ones(1, 1, n_key, 1) if mask is None else mask.mT.to(q)
    queries = keys if n_query == n_key else q.new_ones(1, 1, n_query, 1)
    past = torch.ones(n_query, n_key, dtype=q.dtype, device=q.device)
    past = past.tril() if causal else past
    mean_n = mean_m = (past @ keys).clamp_min(1) if causal else 1.0
    into = ((q + EPS) * (past @ (k * keys) + EPS)).sum(-1, keepdim=True)
    upto = past if causal else past.mT
    out_of = ((k + EPS) * (upto @ (q * queries) + EPS)).sum(-1, keepdim=True)
    kept_into = ((q + EPS) * (past @ (k * keys * mean_m / out_of) + EPS)).sum(-1, keepdim=True) / mean_n
    kept_out = ((k + EPS) * (upto @ (q * queries * mean_n / into) + EPS)).sum(-1, keepdim=True) / mean_m
    strength = kept_out.clamp(-1, 1).exp() * keys
    among = torch.ones(n_key, n_key, dtype=q.dtype, device=q.device)
    total = (among.tril() if causal else among) @ strength
    competition = strength / total.where(total > 0, 1.0) * (mean_m if causal else keys.sum(2, keepdim=True))
    share = 1.0 if causal else queries.sum(2, keepdim=True) / keys.sum(2, keepdim=True).clamp_min(1)
    return (kept_into * share).sigmoid() / into * (q @ k.mT) * past * competition.mT


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, **_: Any) -> Cost:
    inside = 4 * dim * n_query * (min(_BLOCK, n_query) + 1) / 2 if causal else 0
    taken = 1 if causal else 4  # passes over queries and keys
    return Cost(inside + (2 * dim * dim + 8 * dim) * (n_query + n_key), taken * 2 * dim * (n_query + n_key))


def step(
    state: State | None, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> tuple[Tensor, State]:
    """One token after another in constant memory: the output [batch, head, 1, dim], and the state for the next.

    query: [batch, head, 1, dim]; key, value: [batch, kv_head, 1, dim]; state: None at the first token.
    """
    state = _nothing(query, value) if state is None else state
    return _past(Product(None, 1), state, query if scale is None else query * scale, key, value)


@mechanism("causal", "full", "cross", mask="keys", weights=_weights, cost=_cost, step=step, scaled=False, whole=True)
def flow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Linear attention whose keys compete and whose queries are gated, by conserved flow. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. mask: which keys there are,
    [batch, 1, 1, key], and which queries where there are as many. scale: multiplies queries before their sigmoid; the
    paper has none. Causal, every key needs its query, so that cached keys are refused: decode with `step`.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> flow_attention(x, x, x, causal=True).shape
        torch.Size([1, 4, 3000, 64])
    """
    query = query if scale is None else query * scale
    there = () if mask is None else (mask.mT,)
    if causal:
        product = Product(None, _BLOCK)
        strips = (query, key, value, *there)
        output, _ = scan(
            lambda state, *strip: _past(product, state, *strip),
            _nothing(query, value),
            strips,
            strip=tokens(query, _BLOCK),
        )
        return output  # type: ignore[return-value]
    return _whole(query, key, value, there)


def _features(tensor: Tensor, heads: int) -> Tensor:
    return by_head(tensor, heads).to(torch.promote_types(tensor.dtype, torch.float32)).sigmoid()


def _flow(features: Tensor, total: Tensor) -> Tensor:
    """[batch, head, token, 1]"""
    return ((features + EPS) * (total + EPS)).sum(-1, keepdim=True)


def _nothing(query: Tensor, value: Tensor) -> State:
    """Sums over no token: of k, q, k / out of, q / into, the strengths, their number, and k^T value."""
    (batch, heads, _, dim), exact = query.shape, torch.promote_types(query.dtype, torch.float32)
    zero = query.new_zeros(batch, heads, 1, dim, dtype=exact)
    one = zero[..., :1]
    return zero, zero, zero, zero, one, one, zero.new_zeros(batch, heads, dim, value.shape[-1])


def _past(product: Product, state: State, query: Tensor, key: Tensor, value: Tensor, *there: Tensor):
    heads = query.shape[1]
    q, k = _features(query, heads), _features(key, heads)
    v = by_head(value, heads).to(q.dtype)

    def only(of: Tensor) -> Tensor:
        return of.where(there[0], 0.0) if there else of

    def summed(before: Tensor, of: Tensor) -> Tensor:
        return before + only(of).cumsum(2)

    keys, queries, count = summed(state[0], k), summed(state[1], q), summed(state[5], torch.ones_like(q[..., :1]))
    n = count.clamp_min(1)
    into, out_of = _flow(q, keys), _flow(k, queries)
    from_keys, from_queries = summed(state[2], k * n / out_of), summed(state[3], q * n / into)
    gate = (_flow(q, from_keys) / n).sigmoid()
    strength = (_flow(k, from_queries) / n).clamp(-1, 1).exp()
    strengths = summed(state[4], strength)
    # Where no key is there yet, the sums and what they divide are 0.
    competition = strength / strengths.where(strengths > 0, 1.0) * n
    output, held = product(state[6], q / into, only(k), only(v) * competition)
    sums = (keys, queries, from_keys, from_queries, strengths, count)
    return (gate * output).to(value.dtype), (*(s[:, :, -1:] for s in sums), held)


def _whole(query: Tensor, key: Tensor, value: Tensor, there: tuple[Tensor, ...]) -> Tensor:
    """Four passes, each over queries and keys by themselves; the two that make sums, side by side."""
    heads, strip = query.shape[1], tokens(query)
    own = there if query.shape[2] == key.shape[2] else ()
    zero, *_, one, _, held = _nothing(query, value)

    def only(tensor: Tensor, there: tuple[Tensor, ...]) -> Tensor:
        return tensor.where(there[0], 0.0) if there else tensor

    def total(state: State, tensor: Tensor, *there: Tensor) -> tuple[None, State]:
        features = only(_features(tensor, heads), there)
        return None, (state[0] + features.sum(2, keepdim=True),)

    def shared(state: State, tensor: Tensor, *there: Tensor) -> tuple[None, State]:
        features = _features(tensor, heads)
        return None, (state[0], state[1] + only(features / _flow(features, state[0]), there).sum(2, keepdim=True))

    def gathered(state: State, key: Tensor, value: Tensor, *there: Tensor) -> tuple[None, State]:
        k = _features(key, heads)
        strength = only(_flow(k, state[0]).clamp(-1, 1).exp(), there)
        v = only(by_head(value, heads).to(k.dtype), there) * strength
        return None, (state[0], state[1] + strength.sum(2, keepdim=True), state[2] + k.mT @ v)

    def given(state: State, query: Tensor) -> tuple[Tensor, State]:
        q = _features(query, heads)
        keys, from_keys, share, mixed = state
        gate = (_flow(q, from_keys) * share).sigmoid()
        return ((gate / _flow(q, keys) * q) @ mixed).to(value.dtype), state

    (keys,) = scan(total, (zero,), (key, *there), strip=strip)[1]
    (queries,) = scan(total, (zero,), (query, *own), strip=strip)[1]
    from_keys = scan(shared, (queries, zero), (key, *there), strip=strip)[1][1]
    from_queries = scan(shared, (keys, zero), (query, *own), strip=strip)[1][1]
    strengths, mixed = scan(gathered, (from_queries, one, held), (key, value, *there), strip=strip)[1][1:]
    count = there[0].sum(2, keepdim=True) if there else one + key.shape[2]
    asked = own[0].sum(2, keepdim=True) if own else one + query.shape[2]
    mixed = mixed / strengths.where(strengths > 0, 1.0) * count
    share = (asked / count.clamp_min(1)).to(mixed.dtype)
    output, _ = scan(given, (keys, from_keys, share, mixed), (query,), strip=strip)
    return output  # type: ignore[return-value]
