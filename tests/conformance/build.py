"""A tiny random model of any architecture in transformers' registry, and inputs that it runs on."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .inputs import Hints, draw, hidden_size, more
from .shrink import shrink

FACTORS = (8, 4, 1)  # of widths, tried in turn
LARGEST = 120e6  # parameters


class NotConstructible(Exception):
    """No tiny model of this architecture could be made and run here; says why."""


def architectures() -> list[str]:
    """Names of all architectures, as configurations call them (`model_type`)."""
    return sorted(CONFIG_MAPPING_NAMES)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode with eager attention, and inputs that it ran on."""
    reasons: list[str] = []
    try:
        config_class = CONFIG_MAPPING[name]
        model_classes = list(_classes(config_class))
    except Exception as error:
        raise NotConstructible(_reason(error)) from error
    for model_class in model_classes:
        for factor in FACTORS:
            try:
                return _built(model_class, config_class, factor)
            except Exception as error:
                reasons.append(f"{model_class.__name__}: {_reason(error)}")
    for whole in _wholes(config_class):
        try:
            return _part_of(whole, config_class)
        except Exception as error:
            reasons.append(f"as a part of {whole}: {_reason(error)}")
    raise NotConstructible(reasons[0] if reasons else "no model class takes this configuration")


def _built(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], factor: int) -> Any:
    config = shrink(config_class, factor)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise NotConstructible(f"still {size / 1e6:.0f} million parameters when shrunk")
    torch.manual_seed(0)
    model = model_class._from_config(shrink(config_class, factor), attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products want wider experts
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)  # so that attention is uneven
        return model, _inputs(model)


def _wholes(config_class: type[PreTrainedConfig]) -> Iterator[str]:
    """Architectures that hold one of this configuration."""
    for name in architectures():
        if config_class in (CONFIG_MAPPING[name].sub_configs or {}).values() and CONFIG_MAPPING[name] != config_class:
            yield name


def _part_of(whole: str, config_class: type[PreTrainedConfig]) -> tuple[nn.Module, dict[str, Any]]:
    """What a model runs for a configuration inside its own, with what it gives it."""
    model, inputs = build(whole)
    parts = [m for m in model.modules() if m is not model and _is_made_of(m, config_class)]
    given: dict[nn.Module, dict[str, Any]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        given.setdefault(module, {k: v for k, v in named.items() if not isinstance(v, Cache)})

    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    with torch.no_grad():
        model(**inputs)
        for handle in handles:
            handle.remove()
        part = next((part for part in parts if part in given), None)
        if part is None:
            raise NotConstructible("it runs no module of this configuration")
        part(**given[part])
    return part, given[part]


def _is_made_of(module: nn.Module, config_class: type[PreTrainedConfig]) -> bool:
    if hasattr(module, "config"):
        return type(module.config) is config_class
    takes = inspect.signature(type(module).__init__).parameters.get("config")
    return takes is not None and takes.annotation in (config_class, config_class.__name__)


def _inputs(model: nn.Module) -> dict[str, Any]:
    hints: Hints | None = Hints()
    while True:
        inputs = draw(model, hints)
        try:
            torch.manual_seed(0)
            model(**inputs)
            return inputs
        except Exception as error:
            hints = more(error, hints, inputs, hidden_size(model.config))
            if hints is None:
                raise


def _classes(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    """Model classes for a configuration: the base model first, then heads on it, then what else takes it."""
    names = [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING")]
    found: list[type[PreTrainedModel]] = []
    for name in sorted(names, key=lambda n: (n != "MODEL_MAPPING", n)):
        mapping = getattr(modeling_auto, name)
        if config_class in mapping:
            classes = mapping[config_class]
            found += classes if isinstance(classes, (list, tuple)) else [classes]
    module = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        members = vars(importlib.import_module(module)).values()
    except ImportError:
        members = ()
    found += [
        c
        for c in members
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and getattr(c, "config_class", None) is config_class
        and c.forward is not nn.Module.forward
    ]
    yield from list(dict.fromkeys(found))[:3]


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = (
        f" ({sys.modules.get(frame.tb_frame.f_globals.get('__name__', ''), None).__name__.rpartition('.')[2]}"
        if frame
        else ""
    )
    where += f":{frame.tb_lineno})" if frame else ""
    return f"{type(error).__name__}: {' '.join(lines)[:160]}{where}"
