"""Small trained models that ship with Regard, in transformers' and diffusers' own architectures.

Each lies in a folder of its own: safetensors, configuration, processor, the model card `README.md`, and `measured.json`
with what it can do. `recipes/<name>.py` trains it and measures it.

    >>> from regard import zoo
    >>> model, tokenizer = zoo.load("reader")
"""

from __future__ import annotations

import json
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import loading
from ..extras import shortened

names = loading.zoo
RECIPES = (
    "reader",
    "namer",
    "viewer",
    "lookout",
    "describer",
    "witness",
    "painter",
    "listener",
)  # a later one may build on an earlier


def load(name: str, **options: Any) -> loading.Loaded:
    """A zoo model in evaluation mode, and its processor. `options` go to `from_pretrained`."""
    folder(name)
    return loading.load(name, **options)


def folder(name: str) -> Path:
    """Where a zoo model lies."""
    if name not in names():
        raise loading.UnknownModel(f"the zoo has no {shortened(name)!r}; it has {', '.join(names())}")
    return Path(str(resources.files(__name__).joinpath(name)))


def card(name: str) -> str:
    """The model card, Markdown."""
    return (folder(name) / "README.md").read_text(encoding="utf-8")


def measured(name: str) -> dict[str, Any]:
    """The figures of the card: `abilities` and `training`."""
    return json.loads((folder(name) / "measured.json").read_text(encoding="utf-8"))


def recipe(name: str) -> ModuleType:
    """How a model is trained and measured: a module of `regard.zoo.recipes`.

    It has `train(out, *, data, seed) -> dict`, which leaves a folder that `regard.load` reads and returns facts of the
    training; `measure(model, processor, *, seed) -> dict`, abilities by name, taken on data made fresh; `CARD`, a
    format string for both; and `TOLERANCE`, by how much an ability may fall short in a model trained anew.
    """
    if name not in RECIPES:
        raise loading.UnknownModel(f"there is no recipe {shortened(name)!r}; there are {', '.join(RECIPES)}")
    return import_module(f"{__name__}.recipes.{name}")
