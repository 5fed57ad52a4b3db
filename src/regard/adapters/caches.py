"""Caches of keys and values: which one a model was given, and changes of its rows and its length."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Rows = Callable[[int], Tensor]  # of so many rows before: which of them the rows are now
Listener = Callable[[Any, Rows | None], None]

_listeners: list[Listener] = []
_local = threading.local()


def of(value: Any) -> Any:
    """The cache that tells how far a sequence has come: of an encoder-decoder's pair, the decoder's own."""
    value = getattr(value, "self_attention_cache", value)
    return value if hasattr(value, "get_seq_length") else None


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Until the block ends, tell of every cache: its rows in their new order, or None where it was cropped."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def watched() -> Iterator[None]:
    """While this is held, listeners hear."""
    with ExitStack() as undo:
        for kind in _kinds(Cache):
            for name, rows in _CHANGES.items():
                if (own := vars(kind).get(name)) is not None:
                    setattr(kind, name, _told(own, rows))
                    undo.callback(setattr, kind, name, own)
        yield


def _kinds(kind: type) -> Iterator[type]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)


def _told(own: Callable[..., Any], rows: Callable[[Any, int], Tensor] | None) -> Callable[..., Any]:
    @wraps(own)
    def change(cache: Any, by: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(_local, "busy", False):  # a part of a cache that tells for all of it
            return own(cache, by, *args, **kwargs)
        _local.busy = True
        try:
            result = own(cache, by, *args, **kwargs)
        finally:
            _local.busy = False
        order = None if rows is None else partial(rows, by)
        for listener in tuple(_listeners):
            listener(of(cache), order)
        return result

    return change


def _selected(indices: Any, n: int) -> Tensor:
    return torch.arange(n)[indices.cpu() if isinstance(indices, Tensor) else indices]


_CHANGES: dict[str, Callable[[Any, int], Tensor] | None] = {
    "reorder_cache": _selected,
    "batch_select_indices": _selected,
    "batch_repeat_interleave": lambda repeats, n: torch.arange(n).repeat_interleave(repeats),
    "crop": None,
}
