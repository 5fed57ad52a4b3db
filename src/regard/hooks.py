"""What Regard puts on modules for a while. Copies of a module, and what is saved of it, have none of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn

from .shared import shared

_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_ours: set[int] = set()  # hooks
_wrapped: dict[Any, Any] = {}  # a module's forward from here, and its own where it had one before
_getstate = nn.Module.__getstate__


def attach(undo: ExitStack, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
    """Hook a module by one of its `register_...` methods until `undo` is closed."""
    undo.enter_context(_left_out_of_copies())
    handle = register(hook, **options)
    _ours.add(handle.id)
    undo.callback(_ours.discard, handle.id)
    undo.callback(handle.remove)


def wrap(undo: ExitStack, module: nn.Module, run: Callable[..., Any]) -> None:
    """Run a module as `run(module, forward, *args, **kwargs)` says, until `undo` is closed."""
    undo.enter_context(_left_out_of_copies())
    own, before = module.forward, module.__dict__.get("forward")

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(module, own, *args, **kwargs)

    def unwrap() -> None:
        if module.__dict__.get("forward") is forward:
            del module.forward
            if before is not None:
                module.forward = before
        del _wrapped[forward]

    _wrapped[forward] = before
    module.forward = forward
    undo.callback(unwrap)


@shared
@contextmanager
def _left_out_of_copies() -> Iterator[None]:
    nn.Module.__getstate__ = _state  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getstate__ = _getstate


def _state(module: nn.Module) -> dict[str, Any]:
    """What is copied, pickled and saved of a module: all but what is from here."""
    state = _getstate(module)
    for table in _TABLES:
        if any(i in _ours for i in state.get(table, ())):
            state[table] = OrderedDict((i, hook) for i, hook in state[table].items() if i not in _ours)
    if (forward := state.get("forward")) in _wrapped:
        del state["forward"]
        if (before := _wrapped[forward]) is not None:
            state["forward"] = before
    return state
