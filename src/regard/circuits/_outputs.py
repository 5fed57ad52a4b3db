"""What the heads of a layer give, side by side, for methods that learn from it or put something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from ..seam import intervene
from ._gates import frozen

Inputs = Mapping[str, Any]


class Watch:
    """Shows each call of a stack, or of all, and its output to a function; an intervention that changes nothing."""

    def __init__(self, stack: str | None, show: Callable[[Call, Tensor], Any]) -> None:
        self.stack, self.show = stack, show

    def output(self, call: Call, output: Tensor) -> Tensor:
        if self.stack in (None, call.site.stack):
            self.show(call, output)
        return output


def side_by_side(output: Tensor) -> Tensor:
    """[batch, query, head * dim] of [batch, head, query, dim]"""
    return output.transpose(1, 2).flatten(2)


def apart(wide: Tensor, heads: int) -> Tensor:
    """[batch, head, query, dim] of [batch, query, head * dim]"""
    return wide.unflatten(-1, (heads, -1)).transpose(1, 2)


def real(inputs: Inputs, rows: int, tokens: int) -> Tensor:
    """Which tokens are no padding, by the attention mask. [batch, token]"""
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool)
    if tuple(mask.shape) != (rows, tokens):
        raise ValueError(f"heads gave {rows} rows of {tokens} tokens, and attention_mask is {list(mask.shape)}")
    return mask.bool()


def of_layer(model: nn.Module, inputs: Inputs, layer: int, stack: str | None = None) -> tuple[Call, Tensor]:
    """The call of one layer, and what its heads gave. [batch, head, query, dim]"""
    found: dict[str, dict[int, tuple[Call, Tensor]]] = {}

    def show(call: Call, output: Tensor) -> None:
        found.setdefault(call.site.stack, {})[call.site.layer] = call, output

    with frozen(model), torch.no_grad(), intervene(model, Watch(stack, show)):
        model(**inputs)
    if len(found) != 1:
        others = ", ".join(found) or "(none ran)"
        raise ValueError(f"no heads of stack {stack!r} run" if stack else f"say stack=, one of {others}")
    [(stack, layers)] = found.items()
    if layer not in layers:
        raise ValueError(f"there is no layer {layer} in {stack}; there are {', '.join(map(str, sorted(layers)))}")
    return layers[layer]


def head_outputs(
    model: nn.Module, batches: Iterable[Inputs], layer: int, *, stack: str | None = None
) -> Iterator[Tensor]:
    """What the heads of a layer give for each batch of inputs, padding left out. [token, head * dim]"""
    for inputs in batches:
        _, output = of_layer(model, inputs, layer, stack)
        yield side_by_side(output)[real(inputs, len(output), output.shape[2]).to(output.device)]
