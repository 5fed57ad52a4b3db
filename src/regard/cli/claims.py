"""`regard reproduce` of several claims, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import catalog
from ..catalog import Finding
from ..files import refuse_foreign


def reproduce(
    keys: Sequence[str], plots: Path | None, *, scale: str, seed: int, resume: bool = False, console: Console
) -> dict[str, Finding]:
    """Run claims; `plots` is a folder for what they draw.

    resume: take those that ran on this machine at this scale and seed as they came out then.
    """
    drawn = {key: plots / f"{key}{'' if scale == 'small' else '-' + scale}.svg" for key in keys} if plots else {}
    refuse_foreign(*drawn.values())
    found: dict[str, Finding] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(keys))
        for key in keys:
            progress.update(task, description=key)
            if resume and (kept := catalog.remembered(key, scale=scale, seed=seed)):
                found[key] = kept
                progress.advance(task)
                continue
            try:
                found[key] = catalog.reproduce(key, scale=scale, seed=seed, plot=drawn.get(key))
            except Exception as error:  # one broken claim does not keep the others from running
                console.print(f"[bold red]{key} broke[/]: {error}", highlight=False)
                console.print(traceback.format_exc(), markup=False, highlight=False)
            else:
                finding = found[key]
                told = f"{key}: {finding.verdict}, {finding.seconds:.0f} s. {finding.measured}"
                lines = [told, *(f"  premise: {premise}" for premise in finding.premises)]
                console.print("\n".join(lines), highlight=False, markup=False)
            progress.advance(task)
    broken = [key for key in keys if key not in found]
    counts = [(v, sum(f.verdict == v for f in found.values())) for v in catalog.VERDICTS.values()]
    told = ", ".join(f"{n} {verdict}" for verdict, n in counts) + (f"; broke: {', '.join(broken)}" if broken else "")
    console.print(told, highlight=False)
    return found
