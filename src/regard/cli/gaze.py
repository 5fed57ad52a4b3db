"""`regard gaze compare`: a language model's attention beside human reading times, as tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..data import loaders
from ..data.loaders import files
from ..files import refuse_foreign, replaced
from ..gaze.compare import CONTROLS, word_counts
from ..gaze.compare import compare as correlate
from ..loading import load
from .printed import Printed, tables

TASKS = ("reading", "search")


def compare(
    name: str,
    data: Path,
    *,
    task: str,
    language: str,
    corpus: Path | None,
    resamples: int,
    out: Path | None,
    seed: int,
    trust_remote_code: bool,
    console: Console,
) -> Printed:
    """Compare the model of this name with the readings in a folder, and say what came out."""
    if task not in TASKS:
        raise ValueError(f"--task {task}: there are {' and '.join(TASKS)}")
    if out is not None:
        refuse_foreign(out)
    with console.status("reading the data"):
        readings = [reading for reading in loaders.webqamgaze(data, language) if reading.task == task]
        counts = None if corpus is None else word_counts(files.text(corpus))
    with console.status(f"loading {name}"):
        model, tokenizer = load(name, trust_remote_code=trust_remote_code)
    with Progress(console=console, transient=True) as bar:
        row = bar.add_task("comparing")
        tree = correlate(
            model,
            tokenizer,
            readings,
            counts=counts,
            resamples=resamples,
            seed=seed,
            progress=lambda done, texts: bar.update(row, completed=done, total=texts),
        )
    if out is not None:
        with replaced(out) as draft:
            tree.to_zarr(draft, zarr_format=3, consolidated=False)
    told = tree.attrs
    compared = Printed([_summary(tree), *_layers(tree, console.width)])
    compared.lines.append(
        f"{told['words']:,} words of {told['texts']} texts, {told['readers']} readers; two halves of the readers agree "
        f"to {told['reliability']:.2f}, the most to be expected of a model"
    )
    if told["cut"]:
        compared.lines.append(f"{told['cut']:,} words were left out: beyond the model's positions")
    if out is not None:
        compared.lines.append(f"all numbers are in {out}")
    return compared


def _summary(tree: xr.DataTree) -> Table:
    """A line a measure; of those with heads, the head whose correlation is largest after the controls."""
    table = Table(title="Rank correlation with reading time", title_justify="left", header_style="bold")
    for column in ("measure", "plain", "controlled", "chance"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    plain, controlled = (tree[name].to_dataset() for name in ("plain", "controlled"))
    for name in ("received", "last", "rollout", "surprisal", *CONTROLS):
        if name not in plain:
            continue
        there = controlled if name in controlled else plain
        strength = np.abs(there[name])
        if bool(strength.isnull().all()):
            continue
        at = {dim: int(i) for dim, i in strength.argmax(...).items()}
        where = ", ".join(f"{dim} {int(there[dim][i])}" for dim, i in at.items())
        chance = f"{there[name].attrs['chance']:.2f}"
        table.add_row(
            f"{name} ({where})" if where else name,
            _interval(plain, name, at),
            _interval(controlled, name, at) if name in controlled else "",
            chance,
        )
    table.caption = (
        "95% intervals over texts. Where there are heads, the strongest after the controls is shown; chance is what "
        "the strongest of all reaches in 1 of 20 rotations of the reading times"
    )
    return table


def _layers(tree: xr.DataTree, width: int) -> list[Table]:
    """A line a layer: the mean over heads, and the lowest and highest, after the controls."""
    controlled = tree["controlled"].to_dataset()
    layers = controlled["layer"].values
    columns = {
        name: [_cell(controlled[name].sel(layer=layer).values) for layer in layers]
        for name in ("received", "last", "rollout")
    }
    return tables("After the controls, by layer", "layer", [str(layer) for layer in layers], columns, width)


def _cell(values: np.ndarray) -> str:
    cell = "-" if np.isnan(values).all() else f"{np.nanmean(values):+.2f}"
    if values.ndim and cell != "-":
        low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
        cell += f" (h{low} {values[low]:+.2f} .. h{high} {values[high]:+.2f})"
    return cell


def _interval(dataset: xr.Dataset, name: str, at: dict[str, int]) -> str:
    r, low, high = (float(dataset[name + suffix].isel(at)) for suffix in ("", "_low", "_high"))
    return f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"
