"""Run after run, with what was found on disk, until everything that fits a task was trained on it."""

from __future__ import annotations

import difflib
import json
import os
import platform
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .. import kernels
from ..extras import shortened
from ..files import refuse_foreign
from ..profile.journal import Journal
from .candidates import Candidate, candidate, candidates, chosen
from .result import Result
from .tasks import TASKS
from .training import SCALES, LeftOut, Scale, run


@dataclass
class Progress:
    """How far a comparison has come: runs done, of how many, how many of these an earlier call had made."""

    total: int
    done: int = 0
    resumed: int = 0
    cut: int = 0  # bytes at the end of an earlier journal that were no whole run; these are made again
    last: dict[str, Any] | None = None  # the run that was just made


@dataclass(frozen=True)
class _Job:
    task: str
    candidate: Candidate
    seed: int

    def known(self, run: Mapping[str, Any]) -> bool:
        """Whether an earlier run is this one, by the same code of the mechanism. What broke is tried again."""
        own = (self.task, self.candidate.key, self.seed, self.candidate.code)
        return own == tuple(run[k] for k in ("task", "mechanism", "seed", "code")) and not run.get("broke")


def compare(
    mechanisms: Iterable[str] | None = None,
    *,
    tasks: Sequence[str] | None = None,
    also: Mapping[str, Any] | None = None,
    seeds: int | None = None,
    scale: str = "small",
    jobs: int = 1,
    out: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Train and measure mechanisms on small tasks, beside softmax attention and no attention.

    mechanisms: keys of `candidates()`; all unless given. Each is run on the tasks that it fits. tasks: names in
    `TASKS`; all unless given. also: others by name, operators or modules that are declared (see `regard.mechanisms`);
    knobs by `functools.partial`. seeds: how many, from 0 on; as the scale has unless given. scale: one of `SCALES`.
    jobs: processes. out: a JSON file; its state stands beside it, `out` with `.state`: stopped at any moment, the same
    call goes on from there. What the file holds already, of the same scale and code, is not run again, and stays, so
    that mechanisms and tasks can be added. progress: called before the first run and after each.

    What fails, or would take longer than the scale allows, is left out and says why. Raises KeyError for an unknown
    name, ValueError where a file is of something else.

    >>> found = compare(["power"], tasks=["passkey"], scale="tiny", seeds=1)
    >>> sorted(row.mechanism for row in found.rows("passkey"))
    ['none', 'power', 'softmax']
    """
    ways = chosen(mechanisms) | {name: candidate(name, thing) for name, thing in (also or {}).items()}
    names = [_known(name, TASKS, "task") for name in tasks or TASKS]
    without = {name: why for name in names if (why := TASKS[name].lacking()) is not None}
    if without and tasks:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in without.items()))
    names = [name for name in names if name not in without]
    size = SCALES[_known(scale, SCALES, "scale")]
    count = size.seeds if seeds is None else seeds
    if count < 1 or jobs < 1 or (also and jobs > 1):
        raise ValueError(f"seeds and jobs are 1 or more, jobs with `also` 1; got {seeds=}, {jobs=}")
    where = None if out is None else Path(out)
    made = {
        "regard": version("regard"),
        "torch": version("torch"),
        "machine": _machine(),
        "settings": asdict(size),
        "without": without,
    }
    result = Result(scale, made=made)
    wanted: list[_Job] = []
    for name in names:
        unfit = {way.key: why for way in ways.values() if (why := way.unfit(TASKS[name])) is not None}
        result.unfit += [{"task": name, "mechanism": key, "why": why} for key, why in unfit.items()]
        fit = [way for way in ways.values() if way.key not in unfit]
        wanted += [_Job(name, way, seed) for seed in range(count) for way in fit]
    with ExitStack() as held:
        journal, before = None, _before(where, scale, size)
        journaled: list[dict[str, Any]] = []
        told = Progress(len(wanted))
        if where is not None:
            origin = {"comparison": scale, "settings": asdict(size), "regard": version("regard")}
            journal = Journal(where.with_name(f"{where.name}.state"), origin, "comparison")
            held.callback(journal.close)
            journaled += [json.loads(record) for record in journal.replay()[1]]
            told.cut = journal.cut
        kept = [*before.runs, *journaled]
        missing = []
        for job in wanted:
            (result.runs.append(found) if (found := next(filter(job.known, kept), None)) else missing.append(job))
        told.done = told.resumed = len(result.runs)
        if progress is not None:
            progress(told)
        if not missing and before.made:
            result.made = {**before.made, "without": without}  # nothing was measured now
        for made_run in _made(missing, size, jobs):
            if journal is not None:
                journal.append(json.dumps(made_run).encode())
            result.runs.append(made_run)
            told.done, told.last = told.done + 1, made_run
            if progress is not None:
                progress(told)
        result = _joined(result, before)
        if where is not None and journal is not None:
            result.save(where)
            if not _missing(journaled, result):
                journal.remove()  # otherwise a call for something else was stopped, and goes on from there
    return result


def _made(jobs: Sequence[_Job], size: Scale, processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        for job in jobs:
            yield _run(job, size)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_worker) as pool:
        try:
            for future in as_completed(
                [pool.submit(_by_key, job.task, job.candidate.key, job.seed, size) for job in jobs]
            ):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _worker() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool whose parent is killed is not told: each of its processes holds the other end of the others' pipes."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _by_key(task: str, key: str, seed: int, size: Scale) -> dict[str, Any]:
    return _run(_Job(task, chosen([key])[key], seed), size)


def _run(job: _Job, size: Scale) -> dict[str, Any]:
    said = {"task": job.task, "mechanism": job.candidate.key, "seed": job.seed, "code": job.candidate.code}
    try:
        return said | run(job.candidate, TASKS[job.task], job.seed, size)
    except LeftOut as error:
        return said | {"why": str(error)}
    except Exception as error:  # one broken mechanism does not keep the others from running
        at = traceback.extract_tb(error.__traceback__)[-1]
        return said | {
            "why": f"broke: {type(error).__name__}: {shortened(error, 200)} ({Path(at.filename).name})",
            "broke": True,
        }


def _before(where: Path | None, scale: str, size: Scale) -> Result:
    """What a file holds. ValueError where that is of another scale or version."""
    if where is None or not where.exists():
        return Result(scale)
    refuse_foreign(where)
    held = Result.load(where)
    if (held.scale, held.made.get("settings"), held.made.get("regard")) != (scale, asdict(size), version("regard")):
        raise ValueError(
            f"{where} holds a comparison at {held.scale!r} by regard {held.made.get('regard')}, not at {scale!r} by "
            f"{version('regard')}, with the settings of now; choose another name, or delete it"
        )
    return held


def _joined(result: Result, before: Result) -> Result:
    """The result, and of what a file held that which was not asked for now and is of no other code; in order."""
    every = candidates()

    def merged(new: list[Any], old: list[Any]) -> list[Any]:
        known, keys, names = {_which(thing) for thing in new}, list(every), list(TASKS)
        both = [*new, *(thing for thing in old if _which(thing) not in known and _stays(thing, every))]
        last = {key: len(keys) for key in (thing["mechanism"] for thing in both) if key not in every}
        places = {key: i for i, key in enumerate(keys)} | last
        return sorted(both, key=lambda t: (names.index(t["task"]), places[t["mechanism"]], t.get("seed", 0)))

    return Result(result.scale, merged(result.runs, before.runs), merged(result.unfit, before.unfit), result.made)


def _which(thing: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(thing.get(k) for k in ("task", "mechanism", "seed"))


def _missing(journaled: Sequence[Mapping[str, Any]], result: Result) -> bool:
    """Whether a journal has runs that would be needed, and a result has not."""
    every, there = candidates(), {_which(one) for one in result.runs}
    return any(_which(one) not in there and _stays(one, every) for one in journaled)


def _stays(thing: Mapping[str, Any], every: Mapping[str, Candidate]) -> bool:
    """Whether a run is of a task that there is, and of the code that its mechanism has now."""
    now = every.get(thing["mechanism"])
    return thing["task"] in TASKS and (now is None or thing.get("code", now.code) == now.code)


def _known(name: str, among: Collection[str], what: str) -> str:
    if name not in among:
        near = difflib.get_close_matches(name, among, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise KeyError(f"no {what} {shortened(name)!r}{hint}; there are {', '.join(among)}")
    return name


def _machine() -> str:
    load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, {kernels.describe()}, torch {torch.__version__}{load}"
