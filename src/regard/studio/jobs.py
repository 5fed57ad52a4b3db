"""Work that takes time: one job at a time a model, in order, each with what it told so far, each to be cancelled."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..extras import shortened

KEPT = 64  # jobs that are done and still told of
WAITING = 32  # jobs of all models that may wait
PLAIN = (ValueError, KeyError, TypeError, NotImplementedError, OSError)  # errors that a user can act on


class Cancelled(Exception):
    """Raised inside of a job that was cancelled, from where it next says how far it is."""


class Busy(ValueError):
    """Too many jobs wait."""


class Job:
    """What is to be done, and what it told: events, each a name and what goes with it."""

    def __init__(self, number: int, model: str, work: Callable[[Job], None]) -> None:
        self.id, self.model, self.work = str(number), model, work
        self.events: list[tuple[str, Any]] = []
        self.cancelled = threading.Event()
        self.done = False
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._lock = threading.Lock()

    def tell(self, name: str, /, **what: Any) -> None:
        with self._lock:
            # Of how far it is, the last word counts: what a slow page has not read yet is not kept.
            if name == "progress" and self.events and self.events[-1][0] == "progress":
                self.events[-1] = (name, what)
            else:
                self.events.append((name, what))
            self.done = name in ("done", "failed", "cancelled")
            for loop, event in self._listeners:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)

    def check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    async def told(self) -> AsyncIterator[tuple[str, Any]]:
        """Its events from the first to the last, as they come."""
        woken, at, shown = asyncio.Event(), 0, None
        listener = (asyncio.get_running_loop(), woken)
        with self._lock:
            self._listeners.append(listener)
        try:
            while True:
                woken.clear()
                with self._lock:
                    new, done = self.events[max(0, at - 1) :], self.done
                    first, at = at, len(self.events)
                for i, event in enumerate(new, max(0, first - 1)):
                    if i >= first or event is not shown:  # the last word on progress may have been replaced
                        yield event
                    shown = event
                if done:
                    return
                await woken.wait()
        finally:
            with self._lock:
                self._listeners.remove(listener)


class Jobs:
    """The queues of all models."""

    def __init__(self) -> None:
        self.all: dict[str, Job] = {}
        self._queues: dict[str, queue.Queue[Job]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def add(self, model: str, work: Callable[[Job], None]) -> Job:
        with self._lock:
            if sum(not job.done for job in self.all.values()) >= WAITING:
                raise Busy(f"{WAITING} jobs wait already; let them end, or stop some")
            for done in [job.id for job in self.all.values() if job.done][:-KEPT]:
                del self.all[done]
            job = Job(next(self._numbers), model, work)
            self.all[job.id] = job
            if model not in self._queues:
                self._queues[model] = queue.Queue()
                threading.Thread(target=self._run, args=(self._queues[model],), daemon=True).start()
            waiting = [other for other in self.all.values() if other.model == model and not other.done]
            job.tell("queued", before=len(waiting) - 1)
        self._queues[model].put(job)
        return job

    def cancel(self, number: str) -> None:
        self.all[number].cancelled.set()

    def stop(self) -> None:
        for job in list(self.all.values()):
            job.cancelled.set()

    def _run(self, waiting: queue.Queue[Job]) -> None:
        while True:
            job = waiting.get()
            try:
                job.check()
                began = time.perf_counter()
                job.work(job)
                job.tell("done", seconds=round(time.perf_counter() - began, 3))
            except Cancelled:
                job.tell("cancelled")
            except PLAIN as error:
                message = error.args[0] if isinstance(error, KeyError) and error.args else error
                job.tell("failed", why=shortened(plainly(str(message)), 400))
            except Exception as error:  # one broken job does not end the studio
                job.tell("failed", why=f"{type(error).__name__}: {shortened(str(error), 300)}")


def plainly(message: str) -> str:
    """A message of the command line without the names of its options."""
    for option in ("text", "file", "image", "audio", "generate", "knob"):
        message = message.removeprefix(f"--{option}: ").replace(f" with --{option}", "").replace(f", --{option},", "")
    return message.replace(", or cut it with --truncate", "")
