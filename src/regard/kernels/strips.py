"""Reductions in plain torch, a strip of query rows at a time: memory O(n), differentiable, and exact.

Softmax is taken with each row shifted by its own maximum, so that sharp scores keep their digits; nothing here goes
through a rounded log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .operands import Chosen, Factor, Operands, Reduction

STRIP = 2**20  # weights held at once: 4 MB in float32, twice; larger strips leave the cache
TALL = 32  # rows below which a strip is too flat for fast products: heads are then taken one by one
BLOCK = 64  # of keys, for the largest of long rows
NOTHING = math.log(torch.finfo(torch.float32).tiny)  # this far below the rest of its row, a score leaves no weight


class _Space:
    """Two buffers that all strips share: strips of a causal call differ in size, and would leave the heap in pieces.

    Autograd keeps what it needs of each strip, so with gradients every strip gets memory of its own.
    """

    def __init__(self, call: Operands) -> None:
        self.shared = not call.wants_gradient
        self.like = torch.empty(0, dtype=_exact(call), device=call.query.device)
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, which: int, *shape: int) -> Tensor | None:
        if not self.shared:
            return None
        size = torch.Size(shape).numel()
        if which not in self.buffers or self.buffers[which].numel() < size:
            self.buffers[which] = self.like.new_empty(max(size, STRIP))
        return self.buffers[which][:size].view(shape)


def rows(call: Operands, a: int, b: int) -> Tensor:
    """Dense weights of queries a to b, after any edits. [batch, head, b-a, key]"""
    return _edited(call, a, b, _Space(call)).clone()


def visible(call: Operands, keys: Chosen | None = None) -> Tensor:
    """How many keys, or keys of a set, each query may look at. [batch|1, head|1, query] integers"""
    chosen = None if keys is None else keys.where[:, None, None]
    parts = []
    for a, b in spans(call):
        may = seen(call, a, b)
        parts.append((may if chosen is None else may & chosen).sum(-1))
    return torch.cat(parts, dim=2)


def seen(call: Operands, a: int, b: int) -> Tensor:
    """Which keys the queries a to b may look at, by the rule in `Weights`. [batch|1, head|1, b-a, key] boolean"""
    at = torch.arange(call.key.shape[2], device=call.query.device)[None, None, None]
    may = at <= (torch.arange(a, b, device=at.device)[:, None] if call.causal else at[..., -1:])
    limits = [cut(limit, a, b, at.shape[-1]) for limit in (call.mask, call.bias) if limit is not None]
    for limit in limits:
        may = may & limit if limit.dtype == torch.bool else may
    if added := [limit.float() for limit in limits if limit.dtype != torch.bool]:
        scores = sum(added[1:], added[0]).where(may, -math.inf)
        top = scores.amax(-1, keepdim=True)
        may = may & (scores - top > NOTHING) & (top > NOTHING)
    return may.expand(-1, -1, b - a, -1)


def misfit(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What keeps these from being attention's [batch, head, position, dim], in words."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not (query.ndim == key.ndim == value.ndim == 4):
        return f"attention takes [batch, head, position, dim]; got {shapes}"
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        return f"key and value belong together, and to the batch and dim of the query; got {shapes}"
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads do not share {key.shape[1]} key heads evenly"
    return None


def output(call: Operands) -> Tensor:
    """weights @ value, [batch, head, query, dim], in the dtype of the query."""
    return torch.cat([_output(part) for part in _by_heads(call)], dim=1)


def reduce(call: Operands, wanted: Iterable[Reduction]) -> dict[Reduction, Tensor]:
    """Every reduction in `wanted`, in one pass over the strips."""
    wanted = list(wanted)
    found = [_reduce(part, wanted) for part in _by_heads(call)]
    return found[0] if len(found) == 1 else {r: torch.cat([part[r] for part in found], dim=1) for r in wanted}


def _output(call: Operands) -> Tensor:
    value, dropout, parts = call.value.to(_exact(call)), call.dropout, []
    for _, _, weights in _strips(call, _Space(call)):
        weights = F.dropout(weights, dropout) if dropout else weights
        kv_heads, n = value.shape[1], weights.shape[-1]
        grouped = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ value[:, :, :n]
        parts.append(grouped.unflatten(2, (-1, weights.shape[2])).flatten(1, 2))
    return torch.cat(parts, dim=2).to(call.query.dtype)


def _reduce(call: Operands, wanted: list[Reduction]) -> dict[Reduction, Tensor]:
    masses, sets = [r for r in wanted if r.name == "mass"], call.query.new_empty(0)
    if masses:
        sets = stack([r.knob.where for r in masses]).mT.to(_exact(call))
    k = max((r.knob for r in wanted if r.name.startswith("top_")), default=0)
    n_key, space = call.key.shape[2], _Space(call)
    parts: dict[Reduction, list[Tensor]] = {r: [] for r in wanted}
    columns: dict[Reduction, Tensor] = {}
    top = at = mass = sets
    for a, b, p in _strips(call, space):
        n = p.shape[-1]
        if k:
            top, at = _top(p, k)
            at = torch.where(top > 0, at + call.key_start, -1)
        if masses:
            # matmul broadcasts a set that is the same for the whole batch
            mass = (p.flatten(1, 2) @ sets[:, :n]).unflatten(1, p.shape[1:3])
        for r in wanted:
            match r.name:
                case "entropy":
                    parts[r].append(_entropy(p, space))
                case "maximum":
                    parts[r].append(p.amax(-1))
                case "squares":
                    parts[r].append(p.square().sum(-1))
                case "distance":
                    apart = _distances(call, a, b, n, r.knob)
                    parts[r].append(torch.mul(p, apart, out=space(0, *p.shape)).sum(-1))
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
                    if r.knob is not None:
                        chosen = r.knob.where[:, None, None, a:b].to(p.dtype)
                        seen = (chosen.expand(*p.shape[:2], -1, -1) @ p)[:, :, 0]
                    else:
                        seen = p.sum(-2)
                    if space.shared:
                        columns.setdefault(r, p.new_zeros(*p.shape[:2], n_key))[..., :n] += seen
                    else:
                        seen = F.pad(seen, (0, n_key - n))
                        columns[r] = columns[r] + seen if r in columns else seen
                case _:
                    raise NotImplementedError(f"no reduction named {r.name!r}")
    return columns | {r: torch.cat(p, dim=2) for r, p in parts.items() if p}


def _by_heads(call: Operands) -> list[Operands]:
    """The call, or one call for each key head where rows are so long that a strip of all heads would be flat."""
    batch, heads, n_query, _ = call.query.shape
    kv_heads, n_key = call.key.shape[1], call.key.shape[2]
    if call.edits or kv_heads == 1 or STRIP // (batch * heads * n_key) >= min(TALL, n_query):
        return [call]
    group = heads // kv_heads

    def own(tensor: Tensor | None, queries: slice) -> Tensor | None:
        return tensor if tensor is None or tensor.ndim < 4 or tensor.shape[1] == 1 else tensor[:, queries]

    parts = []
    for i in range(kv_heads):
        keys, queries = slice(i, i + 1), slice(i * group, (i + 1) * group)
        sinks = call.sinks
        if sinks is not None:
            sinks = sinks.flatten()[queries] if sinks.numel() == heads else sinks[:, queries]
        new = {"query": call.query[:, queries], "key": call.key[:, keys], "value": call.value[:, keys], "sinks": sinks}
        new["factors"] = tuple(Factor(*(t if t.shape[1] == 1 else t[:, queries] for t in f)) for f in call.factors)
        parts.append(replace(call, **new, mask=own(call.mask, queries), bias=own(call.bias, queries)))
    return parts


def _strips(call: Operands, space: _Space) -> Iterator[tuple[int, int, Tensor]]:
    """First query, last, and their weights [batch, head, query, key]; keys after the last visible one are cut off.

    The weights lie in a shared buffer: use them before the next strip.
    """
    if call.key.dtype != _exact(call):
        call = replace(call, key=call.key.to(_exact(call)))  # once, rather than once a strip
    get = _edited if call.edits else _softmax
    for a, b in spans(call):
        yield a, b, get(call, a, b, space)


def spans(call: Operands) -> Iterator[tuple[int, int]]:
    """First query and last of each strip."""
    batch, head, n_query, _ = call.query.shape
    step = max(1, STRIP // (batch * head * call.key.shape[2]))
    for a in range(0, n_query, step):
        yield a, min(a + step, n_query)


def _edited(call: Operands, a: int, b: int, space: _Space) -> Tensor:
    weights = _softmax(call, a, b, space)
    weights = F.pad(weights, (0, call.key.shape[2] - weights.shape[-1]))
    for edit in call.edits:
        weights = edit(weights, range(a, b))
    return weights


def _softmax(call: Operands, a: int, b: int, space: _Space) -> Tensor:
    query, key = call.query[:, :, a:b].to(_exact(call)), call.key.to(_exact(call))
    batch, head, _, dim = query.shape
    n = min(key.shape[2], b) if call.causal else key.shape[2]
    # Query heads that share a key head become more rows of one product, so keys are never copied.
    grouped = query.reshape(batch * key.shape[1], -1, dim)
    key = key[:, :, :n].expand(batch, -1, -1, -1).flatten(0, 1)
    product = space(0, len(grouped), grouped.shape[1], n)
    scores = torch.baddbmm(grouped.new_empty(1), grouped, key.mT, beta=0, alpha=call.scale, out=product)
    scores = scores.view(batch, head, b - a, n)
    if call.softcap is not None:
        scores = scores.div_(call.softcap).tanh_() if space.shared else torch.tanh(scores / call.softcap)
        scores = scores.mul_(call.softcap) if space.shared else scores * call.softcap
    # In place, but where autograd or a transform of torch.func follows.
    add, fill = (Tensor.add_, Tensor.masked_fill_) if space.shared else (Tensor.add, Tensor.masked_fill)
    for factor in call.factors:
        scores = add(scores, factor.bias(a, b, n).to(scores.dtype))
    if call.bias is not None:
        scores = add(scores, cut(call.bias, a, b, n).to(scores.dtype))
    visible = None
    if call.mask is not None and call.mask.dtype == torch.bool:
        visible = cut(call.mask, a, b, n)
        # With a bias, transformers folds both into one additive mask, whose lowest value is finite.
        lowest = float("-inf") if call.bias is None else torch.finfo(call.key.dtype).min
        scores = fill(scores, ~visible, lowest)
    elif call.mask is not None:
        scores = add(scores, cut(call.mask, a, b, n).to(scores.dtype))
    if call.causal and n > a:
        future = torch.arange(a, n, device=scores.device) > torch.arange(a, b, device=scores.device)[:, None]
        if space.shared:
            scores[..., a:].masked_fill_(future, float("-inf"))
        else:
            scores = scores.masked_fill(F.pad(future, (a, 0)), float("-inf"))
        if visible is not None:
            visible = visible & ~F.pad(future, (a, 0))
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype)
        sinks = sinks.reshape(1, head, 1, 1) if sinks.numel() == head else sinks[:, :, a:b]
        joined = torch.cat([scores, sinks.expand(batch, head, b - a, 1)], dim=-1)
        weights = torch.softmax(joined, -1, out=space(1, *joined.shape))[..., :-1]
    else:
        weights = torch.softmax(scores, -1, out=space(1, *scores.shape))
    if visible is not None and call.bias is None:
        blind = ~visible.any(-1, keepdim=True)
        if not space.shared or blind.any():
            weights = weights.masked_fill(blind, 0.0)
    return weights


def _top(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis and their places, padded with zeros where there are fewer."""
    n = p.shape[-1]
    if n <= 4 * k * BLOCK:
        top, at = p.topk(min(k, n), dim=-1)
        return F.pad(top, (0, k - top.shape[-1])), F.pad(at, (0, k - at.shape[-1]))
    # The k largest lie in the k blocks of largest maximum; selecting there is several times faster than in long rows.
    whole = n // BLOCK * BLOCK
    best = p[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1).topk(k, dim=-1).indices
    places = (best[..., None] * BLOCK + torch.arange(BLOCK, device=p.device)).flatten(-2)
    tail = torch.arange(whole, n, device=p.device).expand(*p.shape[:-1], -1)
    places = torch.cat([places, tail], dim=-1)
    top, at = p.gather(-1, places).topk(k, dim=-1)
    return top, places.gather(-1, at)


def _entropy(p: Tensor, space: _Space) -> Tensor:
    if space.shared:
        return torch.special.entr(p, out=space(0, *p.shape)).sum(-1)
    # entr has an infinite slope at 0, which softmax's own slope of 0 there would turn into NaN
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def _exact(call: Operands) -> torch.dtype:
    return torch.float64 if call.query.dtype == torch.float64 else torch.float32


def cut(mask: Tensor, a: int, b: int, n: int) -> Tensor:
    while mask.ndim < 4:
        mask = mask[None]
    return mask[:, :, a:b, :n] if mask.shape[2] > 1 else mask[..., :n]


def _distances(call: Operands, a: int, b: int, n: int, clip: int | None) -> Tensor:
    at = torch.arange(call.query_start + a, call.query_start + b, device=call.query.device, dtype=_exact(call))
    keys = torch.arange(call.key_start, call.key_start + n, device=call.query.device, dtype=_exact(call))
    apart = (at[:, None] - keys).abs_()
    return apart if clip is None else apart.clamp_(max=clip)


def stack(sets: list[Tensor]) -> Tensor:
    """[batch|1, set, position] of sets [batch|1, position]."""
    return torch.stack(torch.broadcast_tensors(*sets), dim=1)
