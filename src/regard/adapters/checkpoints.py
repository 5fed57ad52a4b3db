"""torch's gradient checkpoints: parts of a model that run again for their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

Again = Callable[[], AbstractContextManager[None]]

_stand: list[Callable[[], Again | None]] = []


@contextmanager
def watched(stand: Callable[[], Again | None]) -> Iterator[None]:
    """While this is held, `stand` is asked as a checkpoint begins; in what it gives, the part runs again."""
    function, generator = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator

    class Reentrant:
        @staticmethod
        def apply(part: Callable[..., Any], *args: Any) -> Any:
            return function.apply(_again(part, stand(), first=True), *args)

    def without(part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(_again(part, stand(), first=False), *args, **kwargs)

    checkpoint.CheckpointFunction = Reentrant  # type: ignore[misc, assignment]
    checkpoint._checkpoint_without_reentrant_generator = without
    try:
        yield
    finally:
        checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator = function, generator  # type: ignore[misc]


def _again(part: Callable[..., Any], again: Again | None, first: bool) -> Callable[..., Any]:
    """The part as it is to be run for its gradient; `first`: and before that, by the same function."""
    if again is None:
        return part

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if first:
            first = False
            return part(*args, **kwargs)
        with again():
            return part(*args, **kwargs)

    return run


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
