"""Mechanisms: attention operators in place of softmax attention. Each file holds one, of the same name as the file.

An operator is `name(query, key, value, *, causal, mask, scale, **knobs) -> output`, declared with `@mechanism`. It is a
transformers attention implementation too: `model.set_attn_implementation("regard:power")`. What has weights of its own,
or sees the layer's input, is a module, declared with `@module`. `convert(model, **knobs)` changes a trained model.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from .. import catalog
from ._mechanism import Cost, Spec, mechanism, spec_of
from ._modules import ModuleSpec, declared_of, module

__all__ = ["Cost", "ModuleSpec", "Spec", "conversions", "mechanism", "module", "modules", "operators", "spec_of"]


def operators() -> dict[str, Callable[..., Any]]:
    """Every declared operator of this room, by name."""
    found = {name: catalog.method("mechanisms", name) for name in catalog.methods("mechanisms")}
    return {name: method for name, method in found.items() if isinstance(getattr(method, "spec", None), Spec)}


def modules() -> dict[str, type[nn.Module]]:
    """Every declared module of this room: by the name of its file, or as file.Class where that declares more."""
    found: dict[str, type[nn.Module]] = {}
    for name, held in _files().items():
        here = {k: v for k, v in vars(held).items() if declared_of(v) and v.__module__ == held.__name__}
        alone = len(here) == 1 and not isinstance(getattr(getattr(held, name, None), "spec", None), Spec)
        found |= {name if alone else f"{name}.{kind}": cls for kind, cls in here.items()}
    return found


def conversions() -> dict[str, Callable[..., Any]]:
    """Every `convert(model, **knobs)` of this room, by the name of its file: it changes a trained model in place.

    What it gives is not used, unless that is another model.
    """
    return {name: held.convert for name, held in _files().items() if callable(getattr(held, "convert", None))}


def _files() -> dict[str, Any]:
    return {name: import_module(f"{__name__}.{name}") for name in catalog.files("mechanisms")}
