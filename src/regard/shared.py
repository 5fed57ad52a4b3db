"""What is changed outside of Regard for as long as someone holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


def shared(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager that the first holder enters and the last one leaves, in whatever order they come and go."""
    lock, undo, holders = threading.RLock(), ExitStack(), 0

    @contextmanager
    def held() -> Iterator[None]:
        nonlocal holders
        with lock:
            if not holders:
                undo.enter_context(change())
            holders += 1
        try:
            yield
        finally:
            with lock:
                holders -= 1
                if not holders:
                    undo.close()

    return held
