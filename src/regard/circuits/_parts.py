"""Which rows and columns of a model's matrices belong to which head.

Architectures name and pack their projections in as many ways as there are. Here they are found by what flows through
them in one forward pass: the rows of a head are those outputs of a matrix that its query, key or value has a gradient
for; the matrix that takes all heads' outputs side by side is the one they are written with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call, Site, UnreachableAttention
from ..seam import intervene
from ..sites import find
from ._gates import Run, frozen

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest value, for two tensors to count as one


@dataclass(eq=False)
class Matrix:
    """A module that multiplies by a matrix; `tall`: its weight is [out, in], as in nn.Linear, not [in, out]."""

    module: Any
    name: str
    tall: bool = True

    @property
    def weight(self) -> Tensor:
        """[out, in]"""
        weight = self.module.weight
        return weight if self.tall else weight.T

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def keep(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Keep these outputs, or these inputs, in this order."""
        weight, bias = self.weight, self.bias
        if rows is not None:
            weight = weight[rows]
            if bias is not None:
                self.module.bias = nn.Parameter(bias.detach()[rows].clone(), bias.requires_grad)
        if columns is not None:
            weight = weight[:, columns]
        n_out, n_in = weight.shape
        kept = weight if self.tall else weight.T
        self.module.weight = nn.Parameter(kept.detach().clone().contiguous(), self.module.weight.requires_grad)
        for names, size in ((("out_features", "nf"), n_out), (("in_features", "nx"), n_in)):
            for name in names:
                if hasattr(self.module, name):
                    setattr(self.module, name, size)


Rows = list[tuple[Matrix, Tensor]]  # a matrix and the outputs of it, ascending


@dataclass(eq=False)
class Parts:
    """The projections of one site. Each list has an entry for each head (`query`) or key head (`key`, `value`)."""

    site: Site
    dim: int  # of values
    query: list[Rows] = field(default_factory=list)
    key: list[Rows] = field(default_factory=list)
    value: list[Rows] = field(default_factory=list)
    writes: list[Matrix] = field(default_factory=list)  # given all heads' outputs; several with low-rank adapters

    def columns(self, head: int) -> Tensor:
        """Inputs of `writes` that are this head's."""
        return torch.arange(head * self.dim, (head + 1) * self.dim)


def parts(model: nn.Module, run: Run, stack: str, watch: Watch | None = None) -> dict[int, Parts]:
    """The projections of the sites of a stack, by layer. Raises UnreachableAttention where a matrix cannot be read."""
    watch = watch or Watch(stack)
    with frozen(model), torch.enable_grad(), ExitStack() as undo:
        around = {name: [m for m in module.modules() if is_matrix(m)] for name, module in _sites(model, stack).items()}
        inside = {id(m) for modules in around.values() for m in modules}
        for name, module in model.named_modules():
            if not is_matrix(module):
                continue
            matrix = Matrix(module, name)
            undo.callback(module.register_forward_pre_hook(partial(watch.enters, matrix)).remove)
            if id(module) in inside:
                undo.callback(module.register_forward_hook(partial(watch.gave, matrix)).remove)
        with intervene(model, watch):
            run(model)
    for found in watch.found.values():
        if not found.writes:
            raise UnreachableAttention(
                f"{found.site}: what its heads give is not what a matrix is given next, so nothing says how they write"
            )
    return dict(sorted(watch.found.items()))


def _sites(model: nn.Module, stack: str) -> dict[str, nn.Module]:
    return {site.name: module for module, site in find(model).items() if site.stack == stack}


def is_matrix(module: nn.Module) -> bool:
    """Whether a module has one matrix for its weight, as nn.Linear; an embedding does not multiply by its own."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return (
        weight is not None and weight.ndim == 2 and weight.is_floating_point() and not isinstance(module, nn.Embedding)
    )


class Watch:
    """Cuts the graph after each matrix, so that gradients tell what comes out of which."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.found: dict[int, Parts] = {}
        self.came: list[tuple[Matrix, Tensor]] = []  # outputs since the last call
        self.waiting: tuple[Parts, Tensor] | None = None
        self.modules: set[str] = set()

    def gave(self, matrix: Matrix, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        given, bias = args[0].detach(), matrix.bias
        fits = [tall for tall in (True, False) if _multiplies(given, matrix.module.weight, bias, output, tall)]
        if not fits:
            return None
        matrix.tall = fits[0]
        leaf = output.detach().requires_grad_()
        self.came.append((matrix, leaf))
        return leaf

    def inputs(self, call: Call) -> Call:
        came, self.came = self.came, []
        self.waiting = None
        if call.site.stack != self.stack:
            return call
        if call.site.layer in self.found or call.site.name in self.modules:
            raise UnreachableAttention(f"{call.site} ran more than once in a pass: its heads are not one layer's alone")
        self.modules.add(call.site.name)
        found = Parts(call.site, call.value.shape[-1])
        for role in ("query", "key", "value"):
            setattr(found, role, _rows(call, getattr(call, role), role, came))
        self.found[call.site.layer] = found
        self.see(call, found, came)
        return call

    def see(self, call: Call, found: Parts, came: Sequence[tuple[Matrix, Tensor]]) -> None:
        """What else is wanted of a call, whose states have a graph that begins at the matrices' outputs."""

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack == self.stack:
            self.waiting = self.found[call.site.layer], output.detach().transpose(1, 2).flatten(2)
        return output

    def enters(self, matrix: Matrix, module: nn.Module, args: Any) -> None:
        if self.waiting is None or len(args) != 1 or not isinstance(args[0], Tensor):
            return
        found, heads = self.waiting
        if args[0].numel() == heads.numel() and torch.equal(args[0].detach().reshape(heads.shape), heads):
            found.writes.append(matrix)
            n_in = heads.shape[-1]
            # of a square weight the shape does not tell
            rows, columns = matrix.module.weight.shape
            matrix.tall = columns == n_in if rows != columns else isinstance(module, nn.Linear)


def _multiplies(given: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, tall: bool) -> bool:
    matrix = weight if tall else weight.T
    if matrix.shape != (output.shape[-1], given.shape[-1]):
        return False
    expected = nn.functional.linear(given, matrix, bias)
    return close(expected.reshape(output.shape), output.detach())


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same to rounding."""
    limit = CLOSE.get(one.dtype, 2e-2) * float(one.detach().abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other.to(one.dtype), rtol=0.0, atol=limit + 1e-30)


def _rows(call: Call, states: Tensor, role: str, matrices: Sequence[tuple[Matrix, Tensor]]) -> list[Rows]:
    if not matrices or not states.requires_grad:
        raise UnreachableAttention(f"{call.site}: its {role} comes out of no matrix that Regard can read")
    # Drawn at random, so that rotary embedding cannot make a sum of gradients vanish.
    mix = torch.randn(states[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(states)
    found: list[Rows] = []
    for head in range(states.shape[1]):
        total = (states[:, head] * mix).sum()
        gradients = torch.autograd.grad(total, [leaf for _, leaf in matrices], retain_graph=True, allow_unused=True)
        rows = []
        for (matrix, _), gradient in zip(matrices, gradients):
            if gradient is not None and (used := gradient.flatten(0, -2).abs().amax(0) > 0).any():
                rows.append((matrix, used.nonzero()[:, 0].cpu()))
        found.append(rows)
    for matrix, _ in matrices:
        mine = torch.cat([rows for of in found for m, rows in of if m is matrix] or [torch.empty(0, dtype=torch.long)])
        if len(mine.unique()) != len(mine):
            raise UnreachableAttention(
                f"{call.site}: outputs of {matrix.name} belong to several heads' {role} at once (a norm over all "
                f"heads, or a shared part), so no head has matrices of its own"
            )
    return found
