"""The same over Ray Data: one task reads and batches, a pool of actors looks, and the numbers come back in order."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ..extras import needs
from .batches import Cursor
from .engine import Job, Looker
from .numbers import Seen


def looks(look: Looker, job: Job, after: Cursor, workers: int) -> Generator[Seen]:
    """The numbers of each batch, in the order of the batches, whichever actor they come from."""
    with needs('engine="ray"', "ray"):
        import ray
        import ray.data
        from ray.exceptions import RayError
    if isinstance(job.source, Iterator):
        raise ValueError("an iterator cannot be read in another process; with engine='ray' give a path or a list")
    if getattr(getattr(look.model, "device", None), "type", "cpu") != "cpu":
        raise ValueError("engine='ray' looks on CPUs only; move the model there, or take engine='local'")

    def batches(_: Any) -> Iterator[dict[str, list[bytes]]]:
        for batch in job.batches(after):
            yield {"bytes": [pickle.dumps(batch)]}

    with ExitStack() as held:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
            held.callback(ray.shutdown)
        held.enter_context(_settings(ray.data.DataContext.get_current()))
        read = ray.data.from_items([{"start": 0}]).map_batches(batches, batch_size=None, num_cpus=0)
        arguments = ray.put(look.model), look.processor, look.statistics
        seen = read.map_batches(
            _Actor, batch_size=None, compute=ray.data.ActorPoolStrategy(size=workers), fn_constructor_args=arguments
        )
        try:
            for row in seen.iter_rows():
                yield Seen.from_bytes(row["bytes"])
        except RayError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, (ValueError, TypeError, OSError)) else error from error


@contextmanager
def _settings(context: Any) -> Iterator[None]:
    """A block a batch, so that batches stream; in order, so that the sums are those taken without Ray; no bars."""
    options, log = context.execution_options, logging.getLogger("ray.data")
    before = context.target_max_block_size, context.enable_progress_bars, options.preserve_order, log.level
    context.target_max_block_size, context.enable_progress_bars, options.preserve_order = 1, False, True
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars, options.preserve_order, level = before
        log.setLevel(level)


class _Actor:
    """One worker: a copy of the model. A session is one thread's, and Ray may call from any."""

    def __init__(self, model: Any, processor: Any, statistics: dict[str, Any]) -> None:
        import ray

        model = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self.look = Looker(model, processor, statistics)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        with self.look:
            return {"bytes": [self.look(pickle.loads(raw)).to_bytes() for raw in rows["bytes"]]}
