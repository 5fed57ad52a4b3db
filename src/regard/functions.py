"""What is behind a function that was given, and the names of its arguments."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any


def innermost(function: Any) -> Any:
    """The function or class behind any number of `functools.partial`s."""
    while isinstance(function, partial):
        function = function.func
    return function


def bound(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args)) | kwargs
