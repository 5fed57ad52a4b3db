"""Exact streaming reductions of attention weights. One contract, several paths; `strips` (plain torch) is the truth.

`native` (C++) serves CPU tensors of float32, bfloat16 and float16 where no gradient and no edited weights are asked
for, in one pass with the output. `gpu` (Triton) serves a GPU where REGARD_KERNEL=triton asks for it: its programs pass
the tests in Triton's interpreter and compile for Hopper, but have not been run on a GPU yet. The rest is for `strips`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from . import gpu, native, strips
from .operands import Chosen, Edit, Factor, Operands, Reduction
from .strips import misfit, rows, seen, spans, visible

Path = Callable[..., tuple[dict[Reduction, Tensor], Tensor | None]]

__all__ = [
    "Chosen",
    "Edit",
    "Factor",
    "Operands",
    "Reduction",
    "applied",
    "describe",
    "fuses",
    "misfit",
    "reduce",
    "rows",
    "seen",
    "spans",
    "visible",
    "with_output",
]


def reduce(call: Operands, wanted: Iterable[Reduction]) -> dict[Reduction, Tensor]:
    """Every reduction in `wanted`, in one pass."""
    wanted, call = list(wanted), call.absorbed
    path = _path(call, wanted)
    return strips.reduce(call, wanted) if path is None else path(call, wanted, output=False)[0]


def with_output(call: Operands, wanted: Iterable[Reduction]) -> tuple[Tensor, dict[Reduction, Tensor]]:
    """weights @ value [batch, head, query, dim], and what of `wanted` comes along at no price."""
    wanted, dtype, call = list(wanted), call.query.dtype, call.absorbed
    if call.dropout:
        return strips.output(call).to(dtype), {}
    path = _path(call, wanted)
    if path is not None:
        found, output = path(call, wanted, output=True)
        assert output is not None
        return output.to(dtype), found
    if call.wants_gradient and not call.factors and native.refusal(call) is None:
        return native.differentiable(call).to(dtype), {}
    return strips.output(call).to(dtype), {}


def applied(call: Operands, values: Tensor) -> Tensor:
    """weights @ values, in float32 or wider; values [batch|1, head|1, key, n]. [batch, head, query, n]"""
    exact = torch.promote_types(call.query.dtype, torch.float32)
    (batch, heads, _, _), kv_heads = call.query.shape, call.key.shape[1]
    wide = {"query": call.query.to(exact), "key": call.key.to(exact), "dropout": 0.0}
    if shared := values.shape[1] == 1:
        values = values.to(exact).expand(batch, kv_heads, -1, -1)
    else:  # heads that share a key head have values of their own: each takes its part of them all
        values = values.to(exact).expand(batch, -1, -1, -1).unflatten(1, (kv_heads, -1)).movedim(2, 3).flatten(3)
    found = with_output(replace(call, **wide, value=values), ())[0]
    if shared:
        return found
    group = heads // kv_heads
    parts = found.unflatten(1, (kv_heads, group)).unflatten(-1, (group, -1))  # [batch, kv_head, own, query, part, n]
    return parts.diagonal(dim1=2, dim2=4).movedim(-1, 2).flatten(1, 2)


def fuses(call: Operands) -> bool:
    """Whether output and reductions of this call come out of one pass, faster than the output alone elsewhere."""
    return _path(call.absorbed, []) is native.forward


def describe() -> str:
    """Which path is in use on the CPU, and why, for people."""
    why = native.why_not()
    return native.describe() if why is None else f"plain torch ({why})"


def _path(
    call: Operands, wanted: list[Reduction]
) -> Callable[..., tuple[dict[Reduction, Tensor], Tensor | None]] | None:
    """The fast path that can do this call; None: plain torch."""
    if call.wants_gradient or call.factors:
        return None
    if call.query.is_cuda:
        asked = os.environ.get("REGARD_KERNEL") == "triton"
        return gpu.forward if asked and gpu.refusal(call, wanted) is None else None
    return native.forward if native.refusal(call, wanted) is None else None
