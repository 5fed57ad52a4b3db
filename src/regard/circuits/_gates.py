"""Gates on heads, and what every method of this room needs of a model that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site
from ..prediction import evaluating
from ..seam import intervene

Head = tuple[int, int]  # layer, head
Run = Callable[[nn.Module], Any]  # runs a model on what is to be looked at
Loss = Callable[[nn.Module], Tensor]  # runs a model and gives the loss of each row [batch]


class Gates:
    """Multiplies what heads give; an intervention. `gates` has [head] or [batch, head] for each layer of one stack."""

    def __init__(self, stack: str, gates: Mapping[int, Tensor]) -> None:
        self.stack, self.gates = stack, gates

    def output(self, call: Call, output: Tensor) -> Tensor:
        gate = self.gates.get(call.site.layer) if call.site.stack == self.stack else None
        return output if gate is None else output * gate.to(output)[..., None, None]


class _Layout:
    """Notes the sites that run, and of how many rows and heads."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[int, Site]] = {}
        self.rows: dict[str, int] = {}

    def inputs(self, call: Call) -> Call:
        self.sites.setdefault(call.site.stack, {})[call.site.layer] = call.site
        self.rows[call.site.stack] = call.query.shape[0]
        return call


@torch.no_grad()
def layout(model: nn.Module, run: Run, stack: str | None = None) -> tuple[str, dict[int, Site], int]:
    """The stack (the only one that runs, where none is named), its sites by layer, and how many rows it is run on."""
    seen = _Layout()
    with intervene(model, seen):
        run(model)
    if stack is None and len(seen.sites) != 1:
        raise ValueError(f"heads of several stacks run: say stack=, one of {', '.join(seen.sites) or '(none ran)'}")
    stack = stack or next(iter(seen.sites))
    if stack not in seen.sites:
        raise ValueError(f"no heads of stack {stack!r} run; those that do are of {', '.join(seen.sites)}")
    return stack, dict(sorted(seen.sites[stack].items())), seen.rows[stack]


def without(sites: Mapping[int, Site], heads: Iterable[Head]) -> dict[int, Tensor]:
    """Gates that are 0 for these heads and 1 for the others."""
    gates = {layer: torch.ones(site.heads) for layer, site in sites.items()}
    for layer, head in heads:
        if layer not in gates or not 0 <= head < len(gates[layer]):
            known = ", ".join(f"layer {at} has {len(gate)}" for at, gate in gates.items())
            raise ValueError(f"there is no head {head} in layer {layer}: {known} heads")
        gates[layer][head] = 0.0
    return gates


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients for parameters; afterwards each module and parameter is as it was."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        try:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


def losses(model: nn.Module, loss: Loss, rows: int | None = None) -> Tensor:
    """What `loss` gives, checked: a floating tensor [batch]."""
    given = loss(model)
    if not isinstance(given, Tensor) or given.ndim != 1 or not given.is_floating_point():
        got = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"`loss` gives the loss of each row, a tensor [batch], not {got}: use reduction='none'")
    if rows is not None and len(given) != rows:
        raise ValueError(f"`loss` gave {len(given)} losses, but the model was run on {rows} rows: give one a row")
    return given


def table(values: Mapping[int, Tensor], **attributes: Any) -> xr.DataArray:
    """[layer, head]; NaN where a layer has fewer heads than another."""
    found = np.full((len(values), max(map(len, values.values()))), np.nan)
    for row, value in zip(found, values.values()):
        row[: len(value)] = value.detach().double().cpu().numpy()
    places = {"layer": list(values), "head": range(found.shape[1])}
    return xr.DataArray(found, places, ("layer", "head"), attrs=attributes)
