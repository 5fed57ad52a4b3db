"""`regard compare`: mechanisms trained and measured beside each other, with a bar, as tables, a file and a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .. import catalog
from ..compare import TASKS, Progress, Result
from ..compare import compare as make
from ..compare.result import HEAD
from ..files import refuse_foreign, with_section, written_aside
from .printed import Printed, tables

SECTION = "compare"


def compare(
    keys: Sequence[str],
    tasks: Sequence[str],
    *,
    seeds: int | None,
    scale: str,
    jobs: int,
    out: Path,
    plot: Path | None,
    page: Path | None,
    console: Console,
) -> Printed:
    """Compare, and say what came out; without keys or tasks, all of them."""
    refuse_foreign(out)
    if plot is not None:
        catalog.check_plot(plot)
    if page is not None:
        with_section(page.read_text(encoding="utf-8"), SECTION, "")  # what is wrong with it is found before the work
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("comparing", total=None)

        def tick(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)
            if progress.last is None:
                if progress.resumed:
                    bar.console.print(f"going on after {progress.resumed:,} of {progress.total:,} runs")
                if progress.cut:
                    bar.console.print(f"{progress.cut:,} bytes at the journal's end were no whole run")
            else:
                bar.update(task, description="{task}, {mechanism}".format(**progress.last))

        result = make(keys or None, tasks=tasks or None, seeds=seeds, scale=scale, jobs=jobs, out=out, progress=tick)
    if plot is not None:
        rows = -(-len(result.tasks()) // 2)
        catalog.drawn(result.draw, plot, size=(9, 3.6 * rows))
    if page is not None:
        at = "" if plot is None else _address(plot, page)
        made = f"## What they can do\n\n`regard compare --page {page.name}`. {result.markdown(at)}"
        text = with_section(page.read_text(encoding="utf-8"), SECTION, made)
        with written_aside(page) as draft:
            draft.write_text(text, encoding="utf-8")
    return said(result, console.width)


def said(result: Result, width: int) -> Printed:
    """A table a task, and what was left out."""
    printed = Printed()
    for name in result.tasks():
        rows = result.rows(name)
        cells = [row.cells() for row in rows]
        task = TASKS[name]
        heads = [task.measure, HEAD[2], f"{task.unit} a second", *HEAD[4:]]
        columns = {head: [line[i] for line in cells] for i, head in enumerate(heads, 1)}
        printed.tables += tables(f"{name}: {task.about}", HEAD[0], [line[0] for line in cells], columns, width)
        printed.lines += [f"{name}: {key} left out, {why}" for key, why in result.left_out(name).items()]
    printed.lines += [f"{name} left out: {why}" for name, why in result.made["without"].items()]
    if any(row.exact for name in result.tasks() for row in result.rows(name)):
        printed.lines.append("=: gives what softmax attention gives on inputs as long")
    return printed


def _address(plot: Path, page: Path) -> str:
    """Of the picture, as the page links to it."""
    return Path(os.path.relpath(plot, page.parent)).as_posix()
