"""Reductions in plain torch, a strip of query rows at a time: memory O(n), differentiable, and exact.

Softmax is taken with each row shifted by its own maximum, so that sharp scores keep their digits; nothing here goes
through a rounded log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..call import Call
    from ..tokens import Tokens
    from ..weights import Reduction

STRIP = 2**20  # weights held at once: 4 MB in float32, and three or four such buffers; larger strips leave the cache


def rows(call: Call, a: int, b: int) -> Tensor:
    """Dense weights of queries a to b, after any edits. [batch, head, b-a, key]"""
    weights = _softmax(call, a, b)
    weights = F.pad(weights, (0, call.key.shape[2] - weights.shape[-1]))
    for edit in call._given.get("edits", ()):
        weights = edit(call, weights, range(a, b))
    return weights


def output(call: Call) -> Tensor:
    """weights @ value, [batch, head, query, dim], in the dtype of the query."""
    value = call.value.to(_exact(call))
    parts = []
    dropout = call._given.get("dropout", 0.0)
    for _, _, weights in _strips(call):
        weights = F.dropout(weights, dropout) if dropout else weights
        kv_heads, n = value.shape[1], weights.shape[-1]
        grouped = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ value[:, :, :n]
        parts.append(grouped.unflatten(2, (-1, weights.shape[2])).flatten(1, 2))
    return torch.cat(parts, dim=2).to(call.query.dtype)


def reduce(call: Call, wanted: Iterable[Reduction]) -> dict[Reduction, Tensor]:
    """Every reduction in `wanted`, in one pass over the strips."""
    wanted = list(wanted)
    masses, sets = [r for r in wanted if r.name == "mass"], call.query.new_empty(0)
    if masses:
        sets = torch.stack([_select(r.knob, call.tokens, call, "key") for r in masses], dim=-1).to(_exact(call))
    groups = {r: _select(r.knob, call.query_tokens, call, "query") for r in wanted if r.name == "received" and r.knob}
    k = max((r.knob for r in wanted if r.name.startswith("top_")), default=0)
    n_key = call.key.shape[2]
    parts: dict[Reduction, list[Tensor]] = {r: [] for r in wanted}
    columns: dict[Reduction, Tensor] = {}

    top = at = mass = sets
    for a, b, p in _strips(call):
        n = p.shape[-1]
        if k:
            top, at = p.topk(min(k, n), dim=-1)
            at = torch.where(top > 0, at + call.key_start, -1)
            if n < k:
                top, at = F.pad(top, (0, k - n)), F.pad(at, (0, k - n), value=-1)
        if masses:
            # matmul broadcasts a set that is the same for the whole batch
            mass = (p.flatten(1, 2) @ sets[:, :n]).unflatten(1, p.shape[1:3])
        for r in wanted:
            match r.name:
                case "entropy":
                    parts[r].append(_entropy(p))
                case "maximum":
                    parts[r].append(p.amax(-1))
                case "distance":
                    parts[r].append(torch.einsum("bhqk,qk->bhq", p, _distances(call, a, b, n, r.knob)))
                case "mass":
                    parts[r].append(mass[..., masses.index(r)])
                case "at":
                    where = r.knob.where[:, None, a:b, None].expand(p.shape[0], p.shape[1], -1, -1)
                    inside = (where >= 0) & (where < n)
                    parts[r].append((p.gather(-1, where.clamp(0, n - 1)) * inside)[..., 0])
                case "top_weights":
                    parts[r].append(top[..., : r.knob])
                case "top_keys":
                    parts[r].append(at[..., : r.knob])
                case "received":
                    seen = (
                        torch.einsum("bhqk,bq->bhk", p, groups[r][:, a:b].to(p.dtype).expand(len(p), -1))
                        if r in groups
                        else p.sum(-2)
                    )
                    seen = F.pad(seen, (0, n_key - n))
                    columns[r] = columns[r] + seen if r in columns else seen
                case _:
                    raise NotImplementedError(f"no reduction named {r.name!r}")
    return columns | {r: torch.cat(p, dim=2) for r, p in parts.items() if p}


def _strips(call: Call) -> Iterator[tuple[int, int, Tensor]]:
    """First query, last, and their weights [batch, head, query, key]; keys after the last visible one are cut off."""
    batch, head, n_query, _ = call.query.shape
    step = max(1, STRIP // (batch * head * call.key.shape[2]))
    if call.key.dtype != _exact(call):
        call = call.but(key=call.key.to(_exact(call)))  # once, rather than once a strip
    get = rows if call._given.get("edits") else _softmax
    for a in range(0, n_query, step):
        b = min(a + step, n_query)
        yield a, b, get(call, a, b)


def _softmax(call: Call, a: int, b: int) -> Tensor:
    query, key = call.query[:, :, a:b].to(_exact(call)), call.key.to(_exact(call))
    batch, head, _, dim = query.shape
    n = min(key.shape[2], b) if call.causal else key.shape[2]
    key = key[:, :, :n]
    # Query heads that share a key head become more rows of one product, so keys are never copied.
    grouped = query.reshape(batch * key.shape[1], -1, dim)
    if key.shape[0] != batch:
        key = key.expand(batch, -1, -1, -1)
    key = key.flatten(0, 1)
    scores = torch.baddbmm(grouped.new_empty(1), grouped, key.mT, beta=0, alpha=call.scale)
    scores = scores.view(batch, head, b - a, n)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.bias is not None:
        scores = scores + _cut(call.bias, a, b, n).to(scores.dtype)
    visible = None
    if call.mask is not None and call.mask.dtype == torch.bool:
        visible = _cut(call.mask, a, b, n)
        # With a bias, transformers folds both into one additive mask, whose lowest value is finite.
        lowest = float("-inf") if call.bias is None else torch.finfo(call.key.dtype).min
        scores = scores.masked_fill(~visible, lowest)
    elif call.mask is not None:
        scores = scores + _cut(call.mask, a, b, n).to(scores.dtype)
    if call.causal and n > a:
        future = torch.arange(a, n, device=scores.device) > torch.arange(a, b, device=scores.device)[:, None]
        scores[..., a:].masked_fill_(future, float("-inf"))
        if visible is not None:
            visible = visible & ~F.pad(future, (a, 0))
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype)
        sinks = sinks.reshape(1, head, 1, 1) if sinks.numel() == head else sinks[:, :, a:b]
        weights = torch.cat([scores, sinks.expand(batch, head, b - a, 1)], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if visible is not None and call.bias is None:
        blind = ~visible.any(-1, keepdim=True)
        if blind.any():
            weights = weights.masked_fill(blind, 0.0)
    return weights


def _entropy(p: Tensor) -> Tensor:
    if not p.requires_grad:
        return torch.special.entr(p).sum(-1)
    # entr has an infinite slope at 0, which softmax's own slope of 0 there would turn into NaN
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def _exact(call: Call) -> torch.dtype:
    return torch.float64 if call.query.dtype == torch.float64 else torch.float32


def _cut(mask: Tensor, a: int, b: int, n: int) -> Tensor:
    while mask.ndim < 4:
        mask = mask[None]
    return mask[:, :, a:b, :n] if mask.shape[2] > 1 else mask[..., :n]


def _distances(call: Call, a: int, b: int, n: int, clip: int | None) -> Tensor:
    at = torch.arange(call.query_start + a, call.query_start + b, device=call.query.device)
    keys = torch.arange(call.key_start, call.key_start + n, device=call.query.device)
    apart = (at[:, None] - keys).abs()
    return (apart if clip is None else apart.clamp(max=clip)).to(_exact(call))


def _select(knob: Any, tokens: Tokens | None, call: Call, axis: str) -> Tensor:
    """[batch|1, key or query] boolean."""
    if hasattr(knob, "where"):
        return knob.where
    if tokens is None:
        raise ValueError(
            f"role {knob!r} asked of {call.site}, but what its tokens are is not known; "
            f"pass a boolean tensor [batch, {axis}] instead"
        )
    return tokens.role(knob)
