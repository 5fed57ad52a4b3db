"""Attention to keys that hash like the query, and to a random sample in place of all others.

Han et al., HyperAttention: Long-context Attention in Near-Linear Time (arXiv:2310.05869), algorithms 1 to 4, and the
authors' code.

Queries and keys are hashed by the signs of random projections, and sorted so that neighbouring buckets differ in few
signs. Blocks of the sorted order meet, which finds the large weights; what is left is estimated from keys drawn with
replacement, each counted for as many as it stands for. Both are joined by their log-sum-exp, so weights are a softmax
in which some keys are missing and others count more than once. Causal attention is cut in halves: each half by itself,
and the later queries to the earlier keys as above; below `least` positions all is exact.

Deviations: keys drawn out of a query's own block are left out, as in the paper; in float32 the authors' code counts
them twice, which is `mask_sampled=False`. Masked keys are sorted last and neither met nor drawn, where the code's own
padding has scores of 0. The order of buckets is that of the authors' code, the Gray code of their number; in its
inverse, which the paper describes, all neighbours differ in one sign, here three in four do. Sort and sample get no
gradient. Which keys of the earlier half a query meets depends on the later queries that it is sorted with, though
nothing of a later key or value reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax

Part = tuple[Tensor, Tensor]  # output [batch, head, query, dim] and log-sum-exp [batch, head, query]


class _Plan:
    """What is drawn, in the order of calls, and the sizes."""

    def __init__(
        self, block: int, sample: int, projections: int | Tensor, least: int, seed: int, sampled: Any, masked: bool
    ) -> None:
        self.block, self.sample, self.projections, self.least = block, sample, projections, least
        self.generator = np.random.default_rng(seed)  # torch's own is refused inside vmap
        self.sampled, self.masked = iter(sampled) if sampled is not None else None, masked

    def directions(self, like: Tensor) -> Tensor:
        if isinstance(self.projections, int):
            drawn = self.generator.standard_normal((like.shape[-1], self.projections))
            self.projections = torch.from_numpy(drawn)
        return self.projections.to(like)

    def draw(self, count: Tensor, heads: int) -> Tensor:
        """Places of sampled keys in the sorted order. [batch, head, sample]; count: keys of each row, [batch]"""
        if self.sampled is not None:
            return next(self.sampled).to(count.device)
        shares = torch.from_numpy(self.generator.random((len(count), heads, self.sample)))
        return (
            (shares.to(count.device) * count[:, None, None]).long().clamp_max((count - 1).clamp_min(0)[:, None, None])
        )


def rank(tensor: Tensor, directions: Tensor) -> Tensor:
    """Place of each vector's bucket in the authors' order. [batch, head, position]

    directions: [dim, projection]. The place is the Gray code of the number that the signs spell.
    """
    signs = (tensor.to(directions.dtype) @ directions > 0).long()
    number = (signs * 2 ** torch.arange(signs.shape[-1], device=signs.device)).sum(-1)
    return number ^ (number >> 1)


def _sorted(tensor: Tensor, plan: _Plan, there: Tensor | None = None) -> Tensor:
    """The order by bucket; what is not there comes last."""
    place = rank(tensor.detach(), plan.directions(tensor))
    if there is not None:
        place = place.masked_fill(~there[:, None], torch.iinfo(place.dtype).max)
    return place.sort(dim=-1, stable=True).indices


def _taken(query: Tensor, key: Tensor, there: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
    """Orders of queries and keys, places of sampled keys, and how many stand for one sampled."""
    order_q, order_k = _sorted(query, plan), _sorted(key, plan, there)
    count = there.sum(-1)
    drawn = plan.draw(count, query.shape[1]) if plan.sample else order_k[..., :0]
    return order_q, order_k, drawn, count.double() / max(plan.sample, 1)


def _sizes(n_query: int, n_key: int, plan: _Plan) -> tuple[int, int]:
    """Blocks, and queries of each."""
    blocks = -(-n_key // plan.block)
    return blocks, -(-n_query // blocks)


def _exact(query: Tensor, key: Tensor, value: Tensor, there: Tensor, scale: float, causal: bool) -> Part:
    seen = there[:, None, None].expand(-1, 1, query.shape[2], -1)
    if causal:
        seen = seen & torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
    return _met(query @ key.mT * scale, seen, value)


def _met(scores: Tensor, seen: Tensor, value: Tensor, more: Tensor | float = 0.0) -> Part:
    """Softmax over what is seen. more: added to the log-sum-exp."""
    low = torch.finfo(scores.dtype).min
    lse = scores.masked_fill(~seen, low).logsumexp(-1) + more
    return softmax(scores, seen) @ value, lse.masked_fill(~seen.any(-1), low)


def _joined(one: Part, other: Part) -> Part:
    lse = torch.stack([one[1], other[1]])
    shares = lse.softmax(0)[..., None]
    return one[0] * shares[0] + other[0] * shares[1], lse.logsumexp(0)


def _near(query: Tensor, key: Tensor, value: Tensor, there: Tensor, scale: float, plan: _Plan) -> Part:
    """All queries to all keys, exactly where there are fewer keys than `least`."""
    batch, heads, n, dim = query.shape
    if key.shape[2] < plan.least:
        return _exact(query, key, value, there, scale, False)
    order_q, order_k, drawn, stands = _taken(query, key, there, plan)
    blocks, rows = _sizes(n, key.shape[2], plan)
    short = blocks * plan.block - key.shape[2]

    def take(tensor: Tensor, order: Tensor) -> Tensor:
        return tensor.gather(2, order[..., None].expand(-1, -1, -1, tensor.shape[-1]))

    q, k, v = take(query, order_q), take(key, order_k), take(value, order_k)
    known = there[:, None].expand(-1, heads, -1).gather(2, order_k)
    q_blocks = F.pad(q, (0, 0, 0, blocks * rows - n)).unflatten(2, (blocks, rows))
    k_blocks, v_blocks = (F.pad(t, (0, 0, 0, short)).unflatten(2, (blocks, -1)) for t in (k, v))
    seen = F.pad(known, (0, short)).unflatten(2, (blocks, 1, -1)).expand(-1, -1, -1, rows, -1)
    part = _met(q_blocks @ k_blocks.mT * scale, seen, v_blocks)
    part = part[0].flatten(2, 3)[:, :, :n], part[1].flatten(2, 3)[:, :, :n]
    if plan.sample:
        scores, other = q @ take(k, drawn).mT * scale, known.gather(2, drawn)[:, :, None]
        if plan.masked:
            own = torch.arange(n, device=q.device) // rows
            other = other & (drawn[:, :, None] // plan.block != own[:, None])
        part = _joined(part, _met(scores, other.expand_as(scores), take(v, drawn), stands.log().to(q)[:, None, None]))
    back = order_q.argsort(-1)
    return take(part[0], back), part[1].gather(2, back)


def _causal(query: Tensor, key: Tensor, value: Tensor, there: Tensor, scale: float, plan: _Plan) -> Part:
    n = query.shape[2]
    if n <= plan.least:
        return _exact(query, key, value, there, scale, True)
    if n % 2:
        query, key, value = (F.pad(t, (0, 0, 0, 1)) for t in (query, key, value))
        output, lse = _causal(query, key, value, F.pad(there, (0, 1)), scale, plan)
        return output[:, :, :n], lse[:, :, :n]
    half = n // 2
    output, lse = _causal(
        _halved(query), _halved(key), _halved(value), there.unflatten(1, (2, -1)).flatten(0, 1), scale, plan
    )
    output, lse = _whole(output), _whole(lse[..., None])[..., 0]
    far = _near(query[:, :, half:], key[:, :, :half], value[:, :, :half], there[:, :half], scale, plan)
    late = _joined((output[:, :, half:], lse[:, :, half:]), far)
    return torch.cat([output[:, :, :half], late[0]], 2), torch.cat([lse[:, :, :half], late[1]], 2)


def _halved(tensor: Tensor) -> Tensor:
    """Both halves of [batch, head, position, dim] as rows of the batch, one after the other."""
    return tensor.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, 2)).movedim(1, 2).flatten(2, 3)


def _counts(query: Tensor, key: Tensor, there: Tensor, causal: bool, plan: _Plan) -> Tensor:
    """How often each query counts each key, of the same draws. [batch, head, query, key]"""
    batch, heads, n, m = *query.shape[:3], key.shape[2]
    full = there[:, None, None].expand(batch, heads, n, m).to(query.dtype)
    if n <= plan.least if causal else m < plan.least:
        return full.tril() if causal else full
    if not causal:
        order_q, order_k, drawn, stands = _taken(query, key, there, plan)
        rows, place = _sizes(n, m, plan)[1], order_k.argsort(-1)
        own = (order_q.argsort(-1) // rows)[..., None] == (place // plan.block)[:, :, None]
        times = torch.zeros_like(place, dtype=query.dtype).scatter_add_(
            -1, order_k.gather(-1, drawn), torch.ones_like(drawn, dtype=query.dtype)
        )
        times = (times * stands.to(query)[:, None, None])[:, :, None]
        return full * (own + times * ~own if plan.masked else own + times)
    longer = n + n % 2
    query, key, there = F.pad(query, (0, 0, 0, n % 2)), F.pad(key, (0, 0, 0, n % 2)), F.pad(there, (0, n % 2))
    half, found = longer // 2, query.new_zeros(batch, heads, longer, longer)
    own = _counts(_halved(query), _halved(key), there.unflatten(1, (2, -1)).flatten(0, 1), True, plan)
    found[:, :, :half, :half], found[:, :, half:, half:] = own[::2], own[1::2]
    found[:, :, half:, :half] = _counts(query[:, :, half:], key[:, :, :half], there[:, :half], False, plan)
    return found[:, :, :n, :n]


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    key, plan = by_head(key, query.shape[1]), _planned(**knobs)
    counts = _counts(query.detach(), key.detach(), _there(key, mask), causal, plan)
    scores = query @ key.mT * scale_of(query, scale) + counts.clamp_min(torch.finfo(counts.dtype).tiny).log()
    return softmax(scores, counts > 0)


def _there(key: Tensor, mask: Tensor | None) -> Tensor:
    everywhere = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    return everywhere if mask is None else everywhere & mask[:, 0, 0]


def _planned(
    *,
    block: int = 256,
    sample: int = 256,
    projections: int | Tensor = 7,
    least: int = 4096,
    seed: int = 0,
    sampled: Sequence[Tensor] | None = None,
    mask_sampled: bool = True,
) -> _Plan:
    if block < 1 or sample < 0 or least < 1 or (isinstance(projections, int) and not 1 <= projections <= 62):
        raise ValueError(
            f"hyperattention: a block holds 1 key or more, 0 or more are sampled, and signs are 1 to 62; got {block=}, "
            f"{sample=}, {least=}, {projections=}"
        )
    return _Plan(block, sample, projections, least, seed, sampled, mask_sampled)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, **knobs: Any) -> Cost:
    plan = _planned(**knobs)

    def near(n: int, m: int) -> float:
        return n * min(m, plan.block + plan.sample) if m >= plan.least else n * m

    def halved(n: int, near: Callable[[int, int], float]) -> float:
        return pairs(n, n, True) if n <= plan.least else 2 * halved(-(-n // 2), near) + near(-(-n // 2), -(-n // 2))

    taken = halved(n_key, near) if causal else near(n_query, n_key)
    signs = 7 if isinstance(plan.projections, Tensor) else plan.projections
    hashed = 2 * dim * signs * (n_query + n_key)
    return Cost(4 * dim * taken + hashed, 2 * dim * (n_query + 2 * n_key) + 2 * dim * taken / plan.block)


@mechanism("causal", "full", "cross", mask="keys", weights=_weights, cost=_cost, whole=True, ahead=True)
def hyperattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    block: int = 256,
    sample: int = 256,
    projections: int | Tensor = 7,
    least: int = 4096,
    seed: int = 0,
    sampled: Sequence[Tensor] | None = None,
    mask_sampled: bool = True,
) -> Tensor:
    """An estimate of softmax attention in near-linear time, by hashing and sampling. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. block: keys that meet; sample: keys drawn;
    projections: signs of a hash, or directions [dim, projection]; least: with fewer keys it is exact softmax attention.
    seed: of directions and draws, so that calls repeat; sampled: places of drawn keys in the sorted order
    [batch, head, sample], a tensor a call, to be drawn otherwise; where halves are taken, the shortest first, with
    both halves of each sequence as rows of the batch. mask: which keys there are, [batch, 1, 1, key].
    Raises ValueError for causal attention of fewer queries than keys.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> hyperattention(x, x, x, least=1024).shape
        torch.Size([1, 4, 3000, 64])
    """
    knobs = {"block": block, "sample": sample, "projections": projections, "least": least, "seed": seed}
    plan = _planned(**knobs, sampled=sampled, mask_sampled=mask_sampled)  # type: ignore[arg-type]
    return parts(query, key, value, plan, causal=causal, mask=mask, scale=scale)[0].to(value.dtype)


def parts(
    query: Tensor, key: Tensor, value: Tensor, plan: _Plan, *, causal: bool, mask: Tensor | None, scale: float | None
) -> Part:
    """The output, and what the log of each row's sum is taken to be."""
    exact = torch.promote_types(query.dtype, torch.float32)
    key, value = (by_head(t, query.shape[1]).to(exact) for t in (key, value))
    way = _causal if causal else _near
    return way(query.to(exact), key, value, _there(key, mask), scale_of(query, scale), plan)
