"""Steps of a change: what a page asks for as interventions, as forms, and as Python."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from PIL import Image
from pydantic import BaseModel, Field, StrictBool

from .. import catalog
from ..cli.inputs import InputError
from ..cli.steer import parsed
from ..interventions import scale_attention, scale_heads
from ..loading import Loaded

Name = Annotated[str, Field(max_length=200)]
Upload = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # the id of a file that was uploaded
Place = Annotated[int, Field(strict=True, ge=0, le=10_000_000)]
Factor = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]


class Heads(BaseModel):
    """Heads, muted or scaled."""

    kind: Literal["heads"]
    on: StrictBool = True
    stack: Name = "language_model"
    heads: Annotated[list[tuple[Place, Place, Factor]], Field(min_length=1, max_length=4096)]  # layer, head, factor


class Attention(BaseModel):
    """What flows from keys to queries, cut or raised."""

    kind: Literal["attention"]
    on: StrictBool = True
    stack: Name = "language_model"
    keys: Annotated[list[Place], Field(min_length=1, max_length=100_000)]
    queries: Annotated[list[Place], Field(max_length=100_000)] | None = None
    layers: list[Place] | None = None
    heads: list[Place] | None = None
    factor: Annotated[float, Field(strict=True, ge=0, le=1000, allow_inf_nan=False)] = 0.0


class Method(BaseModel):
    """An intervention of the catalog."""

    kind: Literal["method"]
    on: StrictBool = True
    key: Name
    knobs: Annotated[dict[Name, Name], Field(max_length=50)] = {}


Step = Annotated[Heads | Attention | Method, Field(discriminator="kind")]


def _method(key: str) -> Any:
    return catalog.method("interventions", key)


def made(step: Any, loaded: Loaded, inputs: Mapping[str, Any], picture: Image.Image | None) -> Any:
    """The intervention, or the logits processor, that a step stands for."""
    if isinstance(step, Heads):
        return scale_heads({(layer, head): factor for layer, head, factor in step.heads}, stack=step.stack)
    if isinstance(step, Attention):
        where = {"queries": step.queries, "layers": step.layers, "heads": step.heads, "stack": step.stack}
        return scale_attention(step.keys, step.factor, **where)
    method = _method(step.key)
    finer = {"images": [picture]} if picture and "images" in inspect.signature(method.fit).parameters else {}
    return method.fit(loaded.model, inputs, loaded.processor, **finer, **_turned(step, method))


def _turned(step: Method, method: Any) -> dict[str, Any]:
    """The knobs of a step as values; InputError, which names the knob, for what is none."""
    return parsed({step.key: method}, [f"{step.key}.{name}={value}" for name, value in step.knobs.items()])[step.key]


def imports(steps: Sequence[Any]) -> list[str]:
    """The lines of Python that import what the steps need."""
    lines = []
    by_hand = {Attention: "scale_attention", Heads: "scale_heads"}
    if names := [name for kind, name in by_hand.items() if any(isinstance(step, kind) for step in steps)]:
        lines.append(f"from regard.interventions import {', '.join(names)}")
    for key in dict.fromkeys(step.key for step in steps if isinstance(step, Method)):
        method = _method(key)
        lines.append(f"from {method.__module__} import {method.__qualname__}")
    return lines


def written(step: Any, pictured: bool) -> str:
    """The expression of Python that makes what a step stands for."""
    if isinstance(step, Heads):
        factors = ", ".join(f"({layer}, {head}): {factor!r}" for layer, head, factor in step.heads)
        return f"scale_heads({{{factors}}}, stack={step.stack!r})"
    if isinstance(step, Attention):
        told = [repr(step.keys), repr(step.factor)]
        places = {"queries": step.queries, "layers": step.layers, "heads": step.heads}
        told += [f"{name}={value!r}" for name, value in places.items() if value is not None]
        return f"scale_attention({', '.join([*told, f'stack={step.stack!r}'])})"
    method = _method(step.key)
    knobs = [f"{name}={value!r}" for name, value in _turned(step, method).items()]
    finer = ["images=[picture]"] if pictured and "images" in inspect.signature(method.fit).parameters else []
    return f"{method.__qualname__}.fit({', '.join(['model', 'inputs', 'processor', *finer, *knobs])})"


def processes(step: Any) -> bool:
    """Whether a step changes the logits of what is said next, not the model."""
    return isinstance(step, Method) and any("__call__" in vars(kind) for kind in _method(step.key).__mro__)


def forms() -> list[dict[str, Any]]:
    """Of every intervention of the catalog, what a form asks: its words, and of each knob its kind and default."""
    found = []
    titles = {row.object.partition(":")[2]: row.title for row in catalog.rows().values() if row.room == "interventions"}
    for key in catalog.methods("interventions"):
        method = _method(key)
        doc = inspect.getdoc(method) or ""
        about = doc.partition("\n\n")[0].replace("\n", " ")
        found.append({"key": key, "title": titles.get(key, key), "about": about, "knobs": _fields(method, doc)})
    return found


def _fields(method: Any, doc: str) -> list[dict[str, Any]]:
    fields: dict[str, dict[str, Any]] = {}
    makers: tuple[Callable[..., Any], ...] = (method.__init__, method.fit)
    for maker in makers:
        hints = get_type_hints(maker)
        for p in inspect.signature(maker).parameters.values():
            if p.kind is not p.KEYWORD_ONLY or p.name == "images" or p.name.startswith("_"):
                continue
            kind = _kind(hints.get(p.name))
            if kind is not None:
                default = "" if p.default in (p.empty, None) else p.default
                shown = ",".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)
                fields[p.name] = {"name": p.name, **kind, "default": shown, "about": told(doc, p.name)}
    return list(fields.values())


def _kind(kind: Any) -> dict[str, Any] | None:
    """What a form asks for; None for what can be given from Python only."""
    kinds = get_args(kind) or (kind,)
    origin = get_origin(kind)
    if words := [word for word in kinds if isinstance(word, str)]:
        return {"kind": "choice", "words": words}
    number = next((n for n in (int, float) if n in kinds), None)
    if number is None:
        return {"kind": "text"} if str in kinds else None
    several = origin is not None and getattr(origin, "__name__", "") in ("Sequence", "Collection")
    return {"kind": "several" if several else "whole" if number is int else "number"}


def told(doc: str, name: str) -> str:
    """What a docstring says of a knob: from its name and a colon to the next name, or the paragraph's end."""
    for paragraph in doc.split("\n\n"):
        flat = " ".join(paragraph.split())
        if found := re.search(rf"(?:^|[.;] ){re.escape(name)}(?:, \w+)*: (.*?)(?=\. \w+(?:, \w+)*: |$)", flat):
            return found[1].rstrip(".")
    return ""


__all__ = ["Attention", "Heads", "InputError", "Method", "Step", "forms", "imports", "made", "processes", "written"]
