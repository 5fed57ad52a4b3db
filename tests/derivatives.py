"""Every kind of derivative of a function of tensors, for tests to compare with those of a plain float64 one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

with warnings.catch_warnings(), forward_ad.dual_level():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, as it first loads what forward mode needs
    forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """First and second ones, backward and forward, by autograd and by torch.func, along fixed directions."""
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=generator, dtype=torch.double).to(t.dtype) for t in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    def turned(*tensors: Tensor) -> Tensor:
        """The gradient along the directions: its gradient is a row of the Hessian."""
        grads = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
        return sum((g * a).sum() for g, a in zip(grads, along))

    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    plain = [t.detach() for t in inputs]
    every = tuple(range(len(inputs)))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, a) for t, a in zip(plain, along)]
        tangent = forward_ad.unpack_dual(function(*dual)).tangent
        over = torch.autograd.grad(loss(*(t.requires_grad_() for t in dual)), dual)
        forward_over_reverse = [forward_ad.unpack_dual(g).tangent for g in over]
    return {
        "first, where a graph is made": list(torch.autograd.grad(loss(*leaves), leaves, create_graph=True)),
        "second": list(torch.autograd.grad(turned(*leaves), leaves)),
        "of one input, the others constant": list(
            torch.autograd.grad(loss(leaves[0], *plain[1:]), leaves[:1], create_graph=True)
        ),
        "of one tensor in two places": _shared(loss, leaves),
        "forward": [tangent],
        "forward over reverse": forward_over_reverse,
        "torch.func.grad": list(torch.func.grad(loss, every)(*plain)),
        "torch.func.jvp": [torch.func.jvp(function, tuple(plain), tuple(along))[1]],
        "torch.func.hessian": _hessian(function, plain),
    }


def _shared(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Keys made of values, which are inputs themselves: what each place gives adds up."""
    if len(leaves) < 3 or leaves[1].shape != leaves[2].shape:
        return []
    value = leaves[2]
    (first,) = torch.autograd.grad(loss(leaves[0], value * 0.5, value, *leaves[3:]), value, create_graph=True)
    return [first, *torch.autograd.grad(first.sum(), value)]


def _hessian(function: Callable[..., Tensor], plain: list[Tensor]) -> list[Tensor]:
    """Of a few numbers, which move all of the query."""

    def moved(by: Tensor) -> Tensor:
        return function(plain[0] * (1 + by[:, None].sum()) + by[0], *plain[1:]).square().sum()

    return [torch.func.hessian(moved)(torch.zeros(2, dtype=plain[0].dtype))]


def assert_same(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]], near: float = 1e-4) -> None:
    """Within a share of the largest number of each."""
    for kind, tensors in theirs.items():
        assert len(ours[kind]) == len(tensors)
        for mine, truth in zip(ours[kind], tensors):
            off = float((mine.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max())
            assert off < near, f"{kind}: off by {off:.1e}"
