"""`regard profile`: a model over a data set, with a bar, and what came out as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..data import DataError
from ..loading import load
from ..profile import Progress, read
from ..profile import profile as take
from ..profile.items import BadRow
from .printed import Printed, tables


def profile(
    name: str,
    data: Path,
    statistics: Sequence[str],
    *,
    out: Path,
    console: Console,
    trust_remote_code: bool = False,
    **options: Any,
) -> Printed:
    """Take a profile of the model of this name, and say what came out; `options` go to `regard.profile.profile`."""
    source = read(
        data, options.pop("field"), skip_bad=options.pop("skip_bad")
    )  # bad input is found before a model is loaded
    with console.status(f"loading {name}"):
        model, processor = load(name, trust_remote_code=trust_remote_code)
    columns = (
        TextColumn("profiling"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} items, {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    last: list[Progress] = []
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=options.get("limit"), speed=0.0)

        def tick(progress: Progress) -> None:
            if not last and progress.resumed:
                bar.console.print(f"going on after {progress.resumed:,} items", highlight=False)
            if not last and progress.cut:
                bar.console.print(
                    f"the last {progress.cut:,} bytes of the journal were no whole batch and were cut off: what they "
                    f"were of is taken again",
                    highlight=False,
                )
            last[:] = [progress]
            bar.update(task, completed=progress.items, speed=progress.tokens_per_second)

        try:
            tree = take(model, processor, source, *statistics, out=out, progress=tick, **options).tree
        except BadRow as error:
            raise DataError(f"{error}; mend that row, or leave out what cannot be read with --skip-bad") from error
    stacks = [(name, node) for name, node in tree.children.items() if node.children]
    taken = Printed([one for name, node in stacks for one in _tables(name, node, console.width)])
    for name, node in stacks:
        for statistic, child in node.children.items():
            taken.lines += _extremes(name, statistic, child.to_dataset(), node.to_dataset())
    counts = tree.attrs
    speed = f"{last[0].tokens_per_second:,.0f} a second"
    taken.lines.append(f"{counts['items']:,} items, {counts['tokens']:,} tokens; {speed}")
    if counts["truncated"]:
        taken.lines.append(f"{counts['truncated']:,} items were cut: longer than the model's positions, or --length")
    if counts["empty"]:
        taken.lines.append(f"{counts['empty']:,} items hold no token and were left out")
    if counts.get("skipped"):
        taken.lines.append(f"{counts['skipped']:,} rows could not be read and were left out (--skip-bad), among them:")
        taken.lines += [f"  {why}" for why in counts["skipped_first"]]
    if options.get("compare"):
        told = last[0]
        taken.lines.append(
            f"throughput {told.share:.2f} of the plain forward pass on the same batches (the first left out): "
            f"{told.looking:.1f} s against {told.plain:.1f} s"
        )
    return taken


def _tables(stack: str, node: xr.DataTree, width: int) -> list[Table]:
    """A line a layer: the mean over items, averaged over heads, and that of the lowest and the highest head."""
    columns = {
        label: [_cell(part["mean"].isel(layer=i)) for i in range(part.sizes["layer"])]
        for name, child in node.children.items()
        for label, part in _each(name, child.to_dataset())
    }
    layers = [str(layer) for layer in node.coords["layer"].values]
    title = f"{stack}: mean over items and heads (lowest head .. highest head)"
    return tables(title, "layer", layers, columns, width)


def _cell(mean: xr.DataArray) -> str:
    values = mean.values.ravel()
    if np.isnan(values).all():
        return "-"
    cell = f"{np.nanmean(values):.3g}"
    if mean.dims != ("head",):
        return cell
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return f"{cell} (h{low} {values[low]:.3g} .. h{high} {values[high]:.3g})"


def _extremes(stack: str, name: str, dataset: xr.Dataset, labels: xr.Dataset) -> list[str]:
    """The head with the highest and the one with the lowest mean, each with its most extreme item."""
    found = []
    for label, part in _each(name, dataset):
        mean = part["mean"]
        if "head" not in mean.dims or mean.isnull().all():
            continue
        for which, word in ((mean.argmax, "highest"), (mean.argmin, "lowest")):
            at = part.isel({dim: int(i) for dim, i in which(...).items()}).isel(exemplar=0)  # type: ignore[operator]
            item = labels.sel(item=int(at[f"{word}_item"]))
            token = int(at[f"{word}_token"])
            where = f"{item['item_id'].item()}{f', token {token}' if token >= 0 else ''}"
            text = f" {item['item_text'].item()!r}" if item["item_text"].item() else ""
            head = f"layer {int(at['layer'])} head {int(at['head'])}, mean {float(at['mean']):.3g}"
            found.append(f"{stack} {label}: {word} in {head}; its {word} item {float(at[word]):.3g}: {where}{text}")
    return found


def _each(name: str, dataset: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
    """A statistic as a whole, or role by role; of ranks the first."""
    if "rank" in dataset.dims:
        dataset = dataset.isel(rank=0)
    if "role" not in dataset.dims:
        return [(name, dataset)]
    return [(f"{name} {role}", dataset.sel(role=role)) for role in dataset["role"].values]
