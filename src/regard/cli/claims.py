"""`regard reproduce --all`: every claim there is, and a page that says what came out."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import catalog
from ..catalog import VERDICTS, Finding
from ..files import written_aside

PAGE = """# Claims

What each paper claims, and what came out when `regard reproduce --all` ran it at `--scale {scale}`, seed {seed}, on
{machine}. Expectations were written before the runs. This is a report, not a test: what did not hold stays in it.
Seconds are of processor time.

{held} held, {failed} did not hold, {unsure} cannot be told at this scale{broken}.

"""
ENTRY = """## {key}

{title}{link}. **{verdict}**, {seconds:.0f} s.

Expected: {expected}

Measured: {measured}
{premises}{plot}
"""


def reproduce(
    keys: Sequence[str], page: Path | None, *, scale: str, seed: int, resume: bool = False, console: Console
) -> dict[str, Finding]:
    """Run claims one after the other; with `page`, write a Markdown page there and its plots into `assets/claims`.

    resume: take those that ran on this machine at this scale and seed as they came out then.
    """
    found: dict[str, Finding] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(keys))
        for key in keys:
            progress.update(task, description=key)
            plot = page.parent / "assets" / "claims" / f"{key}.svg" if page else None
            if resume and (kept := catalog.remembered(key, scale=scale, seed=seed)):
                found[key] = kept
                progress.advance(task)
                continue
            try:
                found[key] = catalog.reproduce(key, scale=scale, seed=seed, plot=plot)
            except Exception as error:  # one broken claim does not keep the others from running
                console.print(f"[bold red]{key} broke[/]: {error}", highlight=False)
                console.print(traceback.format_exc(), markup=False, highlight=False)
            else:
                finding = found[key]
                console.print(
                    f"{key}: {finding.verdict}, {finding.seconds:.0f} s. {finding.measured}",
                    highlight=False,
                    markup=False,
                )
                for premise in finding.premises:
                    console.print(f"  premise: {premise}", highlight=False, markup=False)
            progress.advance(task)
    if page is not None:
        with written_aside(page) as draft:
            draft.write_text(_page(keys, found, page, scale, seed), encoding="utf-8")
    return found


def _page(keys: Sequence[str], found: dict[str, Finding], page: Path, scale: str, seed: int) -> str:
    count = {verdict: sum(f.holds is verdict for f in found.values()) for verdict in VERDICTS}
    broken = [key for key in keys if key not in found]
    text = PAGE.format(
        scale=scale,
        seed=seed,
        machine=f"{torch.get_num_threads()} CPU threads ({platform.machine()})",
        held=count[True],
        failed=count[False],
        unsure=count[None],
        broken=f"; {len(broken)} broke: {', '.join(broken)}" if broken else "",
    )
    text += "| paper | verdict | seconds |\n|---|---|---|\n"
    for key, finding in found.items():
        text += f"| [{key}](#{key}) | {finding.verdict} | {finding.seconds:.0f} |\n"
    for key, finding in found.items():
        row = catalog.row(key)
        drawn = page.parent / "assets" / "claims" / f"{key}.svg"
        text += "\n" + ENTRY.format(
            title=row.title,
            key=key,
            link=f" ([{row.link.removeprefix('https://')}]({row.link}))" if row.link else "",
            verdict=finding.verdict.capitalize(),
            seconds=finding.seconds,
            expected=finding.expected,
            measured=finding.measured,
            premises="".join(f"\nPremise: {premise}\n" for premise in finding.premises),
            plot=f"\n![What was measured](assets/claims/{key}.svg)\n" if drawn.exists() else "",
        )
    return text.rstrip() + "\n"
