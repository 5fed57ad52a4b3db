"""torch.nn.MultiheadAttention, and the encoders made of it.

Its work is done in one function of torch, which hides from a `TorchFunctionMode` what it calls; and in evaluation
mode by a fused kernel, which computes whole layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch.nn.functional import multi_head_attention_forward

from ..shared import shared

# Torch's own code, but for the look-up by which it would hand itself over whole to the mode that is on.
open_forward = FunctionType(
    multi_head_attention_forward.__code__,
    {**multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=multi_head_attention_forward.__defaults__,
)
open_forward.__kwdefaults__ = multi_head_attention_forward.__kwdefaults__


@shared
@contextmanager
def no_fast_path() -> Iterator[None]:
    """Encoder layers run module by module."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
