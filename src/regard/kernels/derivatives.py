"""Derivatives where a backward pass of one's own does not lead: second ones, forward mode, transforms of torch.func.

A kernel reads numbers from memory, and torch does not see what becomes of them. Whatever asks for more than a first
gradient is computed in plain torch, which autograd follows to any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor is more than the numbers in its memory: a dual number, one of torch.func's, negated lazily."""
    for t in tensors:
        if t is not None and (
            t.is_neg() or torch.func.debug_unwrap(t) is not t or forward_ad.unpack_dual(t).tangent is not None
        ):
            return True
    return False


def again(grad: Tensor) -> bool:
    """Asked in a backward pass: whether what it gives will be differentiated again."""
    return torch.is_grad_enabled() or transformed(grad)


def gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the backward pass of function(*inputs) gives each input, given the gradient of its output; by autograd."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each by itself: one input may be made of another, or be it.
        own = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        output = function(*own)
    learned = [t for t in own if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, learned, grad, create_graph=further, allow_unused=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in own)
