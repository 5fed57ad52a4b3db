"""Softmax attention by the fastest exact path at hand."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import native
from ..kernels.derivatives import transformed
from ._mechanism import visible


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
    """By Regard's kernel on a CPU, else by PyTorch's; zeros where nothing is visible. [batch, head, query, dim]"""
    if runs_native(query):
        return native.attention(query, key, value, causal=causal, mask=mask, scale=scale)
    square = causal and mask is None and query.shape[2] == key.shape[2]
    seen = None if square else visible(query, key, causal=causal, mask=mask)
    # PyTorch's fast ones have neither forward mode nor a second derivative, and say so.
    with sdpa_kernel(SDPBackend.MATH) if transformed(query, key, value) else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, seen, 0.0, square, scale=scale, enable_gqa=True)


def runs_native(query: Tensor) -> bool:
    return native.why_not() is None and query.device.type == "cpu" and query.element_size() <= 4
