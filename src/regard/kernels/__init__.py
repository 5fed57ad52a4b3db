"""Exact streaming reductions of attention weights. One contract, several paths; `strips` (plain torch) is the truth.

`native` (C++) serves CPU tensors of float32, bfloat16 and float16 where no gradient and no edited weights are asked
for, in one pass with the output. `gpu` (Triton) serves a GPU where REGARD_KERNEL=triton asks for it: its programs pass
the tests in Triton's interpreter and compile for Hopper, but have not been run on a GPU yet. The rest is for `strips`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from torch import Tensor

from . import gpu, native, strips
from .operands import Chosen, Edit, Operands, Reduction
from .strips import misfit, rows, seen, spans, visible

Path = Callable[..., tuple[dict[Reduction, Tensor], Tensor | None]]

__all__ = [
    "Chosen",
    "Edit",
    "Operands",
    "Reduction",
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
    wanted = list(wanted)
    path = _path(call, wanted)
    return strips.reduce(call, wanted) if path is None else path(call, wanted, output=False)[0]


def with_output(call: Operands, wanted: Iterable[Reduction]) -> tuple[Tensor, dict[Reduction, Tensor]]:
    """weights @ value [batch, head, query, dim], and what of `wanted` comes along at no price."""
    wanted = list(wanted)
    if call.dropout:
        return strips.output(call), {}
    path = _path(call, wanted)
    if path is not None:
        found, output = path(call, wanted, output=True)
        assert output is not None
        return output, found
    if call.wants_gradient and native.refusal(call) is None:
        return native.differentiable(call), {}
    return strips.output(call), {}


def fuses(call: Operands) -> bool:
    """Whether output and reductions of this call come out of one pass, faster than the output alone elsewhere."""
    return _path(call, []) is native.forward


def describe() -> str:
    """Which path is in use on the CPU, and why, for people."""
    why = native.why_not()
    return native.describe() if why is None else f"plain torch ({why})"


def _path(
    call: Operands, wanted: list[Reduction]
) -> Callable[..., tuple[dict[Reduction, Tensor], Tensor | None]] | None:
    """The fast path that can do this call; None: plain torch."""
    if call.wants_gradient:
        return None
    if call.query.is_cuda:
        asked = os.environ.get("REGARD_KERNEL") == "triton"
        return gpu.forward if asked and gpu.refusal(call, wanted) is None else None
    return native.forward if native.refusal(call, wanted) is None else None
