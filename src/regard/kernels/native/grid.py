"""Attention of each position of a grid to a box of another, by the kernel: along each axis an interval. grid.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..derivatives import again, gradients, transformed
from ..operands import Operands
from . import _GRID, _GRID_ROWS, FLOAT, _call, _shapes, _tensor, empty, why_not


class Side(NamedTuple):
    """Of each position of an axis: the first key it sees along it, and the first after these. [query], ascending."""

    first: Tensor
    stop: Tensor
    length: int  # keys of the axis

    def seen(self) -> Side:
        """Of each key: the queries that see it."""
        keys = torch.arange(self.length)
        first, stop = (torch.searchsorted(t.contiguous(), keys, right=True) for t in (self.stop, self.first))
        return Side(first, torch.maximum(first, stop), len(self.first))

    def pairs(self) -> Tensor:
        """[query, key], boolean"""
        keys = torch.arange(self.length)
        return (keys >= self.first[:, None]) & (keys < self.stop[:, None])


def attention(
    query: Tensor, key: Tensor, value: Tensor, sides: Sequence[Side], *, scale: float, there: Tensor | None = None
) -> Tensor:
    """Softmax attention within boxes, with gradients, on the CPU. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], positions of grids, the last axis running
    fastest. sides: of each axis, 1 to 3. scale: above 0. there: which keys there are, boolean [batch|1, key]. Rows that
    see nothing give zeros.
    """
    if (why := why_not()) is not None:
        raise RuntimeError(f"native attention is not available: {why}")
    if problem := _shapes(query, key, value, None, None) or _misfit(query, key, sides, scale):
        raise ValueError(problem)
    if transformed(query, key, value):
        return _in_torch(query, key, value, there, sides, scale)
    hidden = None if there is None else torch.zeros(there.shape, **FLOAT).masked_fill_(~there, -math.inf)
    return _Attend.apply(query, key, value, there, hidden, sides, scale)  # type: ignore[return-value]


def _misfit(query: Tensor, key: Tensor, sides: Sequence[Side], scale: float) -> str | None:
    numbers = [math.prod(len(s.first) for s in sides), math.prod(s.length for s in sides)]
    if not 1 <= len(sides) <= 3 or numbers != [query.shape[2], key.shape[2]]:
        return f"1 to 3 sides, of as many positions as queries and keys; got {numbers} on {len(sides)} axes"
    if not scale > 0:
        return f"scale={scale}: it has to be above 0"
    for side in sides:
        falls = any(bool((t.diff() < 0).any()) for t in (side.first, side.stop))
        if falls or len(side.first) != len(side.stop) or side.first.min() < 0 or side.stop.max() > side.length:
            return f"first and stop ascend within the {side.length} keys of their axis"
    return None


def _in_torch(
    query: Tensor, key: Tensor, value: Tensor, there: Tensor | None, sides: Sequence[Side], scale: float
) -> Tensor:
    """The same in plain torch, at the cost of all pairs."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for side in sides:
        seen = torch.kron(seen, side.pairs())
    seen = seen[None, None] if there is None else seen & there[:, None, None]
    rows = seen.any(-1, keepdim=True)  # softmax over nothing has no derivative
    output = strips.output(Operands(query, key, value, scale, seen | ~rows, False, None, None, None))
    return output.where(rows, 0.0)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, there: Any, hidden: Any, sides: Any, scale: Any):
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)
        reference, above = empty(query.shape[:3]), empty(query.shape[:3])
        _run("grid_forward", query, key, value, hidden, sides, scale, [out, None], [reference, above])
        ctx.sides, ctx.scale = sides, scale
        ctx.save_for_backward(query, key, value, there, hidden, out, reference, above)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        query, key, value, there, hidden, out, reference, above = ctx.saved_tensors
        if again(grad):
            plain = partial(_in_torch, sides=ctx.sides, scale=ctx.scale)
            return *gradients(plain, grad, query, key, value, there), None, None, None
        inner = (grad.float() * out.float()).sum(-1)
        (batch, heads), group = query.shape[:2], query.shape[1] // key.shape[1]
        found = [empty(batch, heads, *t.shape[2:]) for t in (query, key, value)]
        rows = [reference, above, inner, *found]
        _run("grid_backward", query, key, value, hidden, ctx.sides, ctx.scale, [None, grad], rows)
        if group > 1:
            found[1:] = [t.unflatten(1, (-1, group)).sum(2) for t in found[1:]]
        return *(d.to(t.dtype) for d, t in zip(found, (query, key, value), strict=True)), None, None, None, None


def _run(
    what: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    sides: Sequence[Side],
    scale: float,
    tensors: list[Tensor | None],
    rows: list[Tensor],
) -> None:
    one = Side(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long), 1)
    whole = [*[one] * (3 - len(sides)), *sides]
    if len(key) != len(query):
        key, value = (t.expand(len(query), -1, -1, -1) for t in (key, value))
    both = [*whole, *(s.seen() for s in whole)]
    limits = [torch.cat([getattr(s, end) for s in both[a : a + 3]]).int() for a in (0, 3) for end in ("first", "stop")]
    arguments = _GRID.pack(
        *(*query.shape[:2], key.shape[1], query.shape[-1], value.shape[-1]),
        *(len(s.first) for s in whole),
        *(s.length for s in whole),
        *(word for tensor in (query, key, value) for word in _tensor(tensor)),
        *(t.data_ptr() for t in limits),
        *((0, 0) if hidden is None else (hidden.data_ptr(), hidden.stride(0) if len(hidden) > 1 else 0)),
        scale,
        torch.get_num_threads(),
    )
    words = [t.data_ptr() for t in rows] + [0] * (6 - len(rows))
    _call(what, arguments, _GRID_ROWS.pack(*(word for tensor in tensors for word in _tensor(tensor)), *words))
