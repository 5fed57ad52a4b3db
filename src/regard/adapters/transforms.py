"""Ways in which torch runs a model without values that could be looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..call import UnreachableAttention


def refuse(inputs: Iterable[Any]) -> None:
    """Raise where a model is traced or transformed rather than run."""
    if (way := _way(inputs)) is not None:
        raise UnreachableAttention(
            f"the model runs under {way}, which hands on stand-ins for tensors, so its attention cannot be seen or "
            f"changed; leave the block of record or intervene before it"
        )


def _way(inputs: Iterable[Any]) -> str | None:
    if (level := torch._C._functorch.peek_interpreter_stack()) is not None:  # type: ignore[attr-defined]
        return f"torch.func ({level.key().name.lower()})"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return "torch.export or torch.compile"
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if fake or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return "FakeTensorMode"
    if any(isinstance(value, torch.fx.Proxy) for value in inputs):
        return "torch.fx"
    return "the meta device" if any(tensor.is_meta for tensor in tensors) else None
