"""Attention modules of a model, and others in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..adapters.mechanisms import held

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")


def attentions(model: nn.Module, projection: str | None, asked_by: str) -> dict[str, tuple[nn.Module, str]]:
    """Attention modules by name, each with the name of its output projection, the usual ones unless given."""
    outputs, found = (projection,) if projection else OUTPUTS, {}
    for name, module in model.named_modules():
        output = next((p for p in outputs if isinstance(getattr(module, p, None), nn.Module)), None)
        if re.search(r"Attention$", type(module).__name__) and output:
            found[name] = (module, output)
    if not found:
        raise ValueError(
            f"{asked_by}: {type(model).__name__} has no module called ...Attention with an output projection "
            f"called {' or '.join(outputs)}; name it with projection=..."
        )
    return found


def channels(projection: nn.Module) -> tuple[int, int]:
    """Of the layer's input, and of all heads' outputs together, by the output projection."""
    weight = cast(Tensor, projection.weight)
    # transformers' Conv1D holds the transpose of what a linear layer does
    dim, mixed = weight.shape if isinstance(projection, nn.Linear) else weight.shape[::-1]
    return dim, mixed


def heads_of(attention: nn.Module, name: str, output: str, asked_by: str) -> tuple[int, int, int]:
    """Channels of a head, heads, and key heads of an attention module."""
    dim = getattr(attention, "head_dim", None)
    if dim is None:
        raise ValueError(f"{asked_by}: {name} does not say its head_dim")
    heads = channels(attention.get_submodule(output))[1] // dim
    keys = getattr(attention, "k_proj", None)
    return dim, heads, channels(keys)[0] // dim if isinstance(keys, nn.Linear) else heads


def own(
    model: nn.Module, operator: Callable[..., Any], made: Callable[[int, int, int], nn.Module]
) -> Callable[[], None]:
    """Give every attention of a model an operator of its own; gives the function that takes it away.

    made(dim, heads, kv_heads), of a head's channels and their numbers, is kept as the child `mechanism` of the
    attention module, with its dtype and device, and called with query, key, value, causal, mask and scale. operator:
    what is declared, which says what is supported. The model is one of transformers'.
    """
    name = operator.__name__
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{name}: {type(model).__name__} is no model of transformers; call the module yourself")
    found = attentions(model, None, name)
    if already := [n for n, (attention, _) in found.items() if hasattr(attention, "mechanism")]:
        raise ValueError(f"{name}: {already[0]} has a mechanism of its own already; undo that first")
    modules = {n: made(*heads_of(attention, n, output, name)) for n, (attention, output) in found.items()}
    for n, (attention, _) in found.items():
        attention.mechanism = modules[n].to(next(attention.parameters()))
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(held(operator))  # type: ignore[operator]

    def undo() -> None:
        model.set_attn_implementation(before)  # type: ignore[operator]
        for attention, _ in found.values():
            del attention.mechanism

    return undo


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules where others are, by name; gives the function that puts the old ones back."""
    before = {name: model.get_submodule(name) for name in modules}
    _put(model, modules)
    return lambda: _put(model, before)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
