"""What is behind a function that was given, and the names of its arguments."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

_names: weakref.WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = weakref.WeakKeyDictionary()


def innermost(function: Any) -> Any:
    """The function or class behind any number of `functools.partial`s."""
    while isinstance(function, partial):
        function = function.func
    return function


def arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's parameters, looked up once."""
    if (names := _names.get(function)) is None:
        names = _names[function] = tuple(inspect.signature(function).parameters)
    return names


def bound(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    if not args:
        return kwargs
    forward = module.forward
    method = getattr(forward, "__func__", None)
    names = arguments(forward) if method is None else arguments(method)[1:]
    return dict(zip(names, args)) | kwargs
