"""Taking a profile: batch after batch, with its state on disk, until the data end."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import sites
from ..files import refuse_foreign
from ..recording import Recording, spec_of
from ..seam import chosen
from .batches import Batch, Cursor, Inputs
from .engine import Job, Looker, forward
from .items import Source, read
from .journal import Journal
from .numbers import Seen
from .totals import Totals


@dataclass
class Progress:
    """How far a profile has come. `plain` and `looking` are seconds of the same batches, with `compare=True`."""

    items: int
    tokens: int
    resumed: int  # items that an earlier run had done
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    plain: float = 0.0
    looking: float = 0.0
    cut: int = 0  # bytes at the end of an earlier run's journal that were no whole batch; what they were is taken again

    @property
    def share(self) -> float:
        """Throughput as a share of the plain forward pass's on the same batches, the first batch of each left out."""
        return self.plain / self.looking if self.looking else float("nan")


def profile(
    model: nn.Module,
    processor: Any,
    items: str | Path | Source | Iterable[Any],
    *statistics: str | Callable[..., Tensor | None],
    out: str | Path | None = None,
    field: str | None = None,
    limit: int | None = None,
    length: int | None = None,
    prompt: str | None = None,
    exemplars: int = 5,
    batch: int = 64,
    batch_tokens: int = 4096,
    buffer: int = 1024,
    engine: str = "local",
    workers: int = 2,
    compare: bool = False,
    progress: Callable[[Progress], None] | None = None,
    skip_bad: bool = False,
    **named: str | Callable[..., Tensor | None],
) -> Recording:
    """Summaries of statistics over a data set, for every head: a recording with one node a stack and statistic.

    Each statistic is one number an item and head: averaged over the item's queries, padding left out; along a key axis
    the largest, per query; other axes (role, rank) stay. Of these numbers `count`, `mean`, `variance`, `minimum`,
    `maximum`, `quantiles` and the `highest` and `lowest` items are kept, in memory that does not grow with the data.

    model: in evaluation mode. processor: its tokenizer, or what prepares its pictures. items: a path (see `read`), or
    an iterable of texts, pictures, rows or `Item`s. statistics, named: as in `regard.record`.
    out: a zarr folder to write. The state stands beside it, `out` with `.state`; after a kill or an interrupt, the same
    call goes on from there and loses at most the batch under way. A state begun with another model, other data,
    statistics or options is refused with ValueError. Without `out` there is no state.
    field: the column to read. limit: items at most. length: tokens of an item at most, by default the model's
    positions; longer ones are cut, and counted. prompt: what is asked about each picture, of a model that reads too.
    exemplars: how many highest and lowest items to keep.
    batch, batch_tokens: items and tokens (with padding) a batch at most. buffer: items that are sorted by length.
    engine: "local", or "ray" for `workers` actors of Ray Data. compare: also run every batch plainly, and time both.
    progress: called after each batch. skip_bad: leave out rows of a file that cannot be read or hold nothing in
    `field`, and count them in the attribute `skipped`; otherwise such a row is an error.

    >>> import regard
    >>> from regard.profile import profile
    >>> model, tokenizer = regard.load("reader")
    >>> found = profile(model, tokenizer, ["to be or not to be", "it was the best of times"], "entropy", "received")
    >>> bool((found.tree["language_model/received"]["mean"] <= 1).all())
    True
    """
    functions = chosen(statistics, named)
    if model.training:
        raise ValueError("the model is in training mode, so its dropout would count; call model.eval() first")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r}: it is 'local' or 'ray'")
    if skip_bad and engine != "local":
        raise ValueError("skip_bad=True counts rows in the process that reads them: it needs engine='local'")
    if compare and engine != "local":
        raise ValueError("compare=True times batches one after the other: it needs engine='local'")
    sizes = {"exemplars": exemplars, "batch": batch, "batch_tokens": batch_tokens, "buffer": buffer, "workers": workers}
    for name, value in {**sizes, "limit": limit, "length": length}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: it must be 1 or more")
    source = read(items, field, skip_bad=skip_bad) if isinstance(items, (str, Path)) else items
    inputs = Inputs(model, processor, length=length, prompt=prompt)
    job = Job(source, None if isinstance(source, Source) else field, limit, inputs, batch, batch_tokens, buffer)
    totals = Totals({name: spec_of(f) for name, f in functions.items()}, exemplars)
    where = None if out is None else Path(out)
    if where is not None:
        refuse_foreign(where)
    options = {"limit": limit, "length": inputs.length, "prompt": inputs.prompt, **sizes}
    del options["workers"]

    with ExitStack() as held:
        journal = None
        if where is not None:
            data = source.state() if isinstance(source, Source) else type(source).__name__
            origin = {"model": _model_state(model, processor), "data": _hashed(repr(data))}
            origin |= {"statistics": {name: _statistic_state(f) for name, f in functions.items()}}
            journal = Journal(
                where.with_name(f"{where.name}.state"), {**origin, "options": options, "regard": version("regard")}
            )
            held.callback(journal.close)
            snapshot, records = journal.replay()
            if snapshot is not None:
                totals.restore(snapshot)
            for record in records:
                totals.add(Seen.from_bytes(record))
        cut = 0 if journal is None else journal.cut
        told = Progress(totals.counts["items"], totals.counts["tokens"], totals.counts["items"], cut=cut)
        began, tokens_before = time.perf_counter(), told.tokens

        if progress is not None:
            progress(told)
        looks = _looks(model, processor, functions, job, totals.cursor, engine, workers, told if compare else None)
        held.callback(looks.close)
        for seen in looks:
            if journal is not None:
                journal.append(seen.to_bytes())
            totals.add(seen)
            if journal is not None and journal.full:
                journal.snapshot(totals.to_bytes())
            told.items, told.tokens = totals.counts["items"], totals.counts["tokens"]
            told.seconds = time.perf_counter() - began
            told.tokens_per_second = (told.tokens - tokens_before) / told.seconds
            if progress is not None:
                progress(told)
        if not totals.counts["items"]:
            raise ValueError(f"{getattr(source, 'path', 'items')}: there is nothing to read in it")
        missed, other = sites.unreached(model, sites.find(model))
        attributes = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{name: version(name) for name in ("regard", "torch", "transformers")},
            "architecture": type(model).__name__,
            "data": str(getattr(source, "path", type(source).__name__)),
            "unreached": missed,
            "not_softmax": other,
            "partial": False,
        }
        if isinstance(source, Source) and source.skip_bad:
            attributes |= {"skipped": source.skipped.count, "skipped_first": list(source.skipped.first)}
        found = Recording([totals.tree(attributes)])
        if where is not None and journal is not None:
            found.save(where)
            journal.remove()
    return found


def _looks(
    model: nn.Module,
    processor: Any,
    functions: dict[str, Callable[..., Tensor | None]],
    job: Job,
    after: Cursor,
    engine: str,
    workers: int,
    told: Progress | None,
) -> Generator[Seen]:
    look = Looker(model, processor, functions)
    if engine == "ray":
        from .cluster import looks

        yield from looks(look, job, after, workers)
    elif told is not None:
        yield from _compared(look, job.batches(after), told)
    else:
        with look:
            for batch in job.batches(after):
                yield look(batch)


def _compared(look: Looker, batches: Iterator[Batch], told: Progress) -> Generator[Seen]:
    """Runs each batch twice, with the session closed and open, in turn first and second; `told` gets both times."""
    for n, batch in enumerate(batches):
        plain = _seconds(look.model, batch) if n % 2 else 0.0
        with look:
            began = time.perf_counter()
            yield look(batch)
            looking = time.perf_counter() - began  # with what is then done with the numbers
        plain = plain or _seconds(look.model, batch)
        if n:
            told.plain, told.looking = told.plain + plain, told.looking + looking


def _seconds(model: nn.Module, batch: Batch) -> float:
    began = time.perf_counter()
    forward(model, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _model_state(model: nn.Module, processor: Any) -> str:
    """A hash of weights, configuration and processor."""
    found = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:  # weights that accelerate keeps on disk
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config: Any = getattr(model, "config", None)
    found.update(config.to_json_string(use_diff=False).encode() if hasattr(config, "to_json_string") else b"")
    backend = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    found.update(repr(processor).encode() + (backend.to_str().encode() if backend is not None else b""))
    return found.hexdigest()


def _statistic_state(function: Any) -> list[str]:
    """What a statistic is: its function, knobs and code."""
    knobs: list[str] = []
    while isinstance(function, partial):
        knobs += [repr(function.args), repr(sorted(function.keywords.items()))]
        function = function.func
    try:
        code = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        code = ""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return [f"{function.__module__}.{name}", *knobs, _hashed(repr(spec_of(function)) + code)]


def _hashed(said: str) -> str:
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
