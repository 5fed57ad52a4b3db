"""`regard atlas`: what every head of a model does, as tables, a recording and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

from .. import report
from ..atlas import TAXONOMY, UNKNOWN, atlas, best, text, unknown
from ..files import replaced
from ..loading import Loaded, load
from ..observations import Observation
from ..seam import record
from .inputs import open_picture, writable

SHOWN = 4  # heads of a kind that the table names


def run(
    name: str,
    *,
    out: Path,
    pictures: Sequence[Path] = (),
    thresholds: Mapping[str, float] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    console: Console,
) -> tuple[Path, Path]:
    """Make the atlas of a model, print it, and write `atlas.zarr` and `atlas.html` into `out`; returns their paths."""
    opened = [open_picture(path, console) for path in pictures]  # bad input is found before a model is loaded
    writable(out, "atlas.html", "atlas.zarr")
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    with console.status("testing the heads"):
        recording = atlas(*loaded, pictures=opened, thresholds=thresholds, seed=seed)
    tree = recording.tree
    tree.attrs["model"] = name
    tree.attrs["note"] = " ".join(f"{note[0].upper()}{note[1:]}." for note in tree.attrs["notes"])
    for stack, node in tree.children.items():
        console.print(_kinds(stack, node.to_dataset()), _layers(node.to_dataset()))
    for note in tree.attrs["notes"]:
        console.print(f"[yellow]{note}", highlight=False)
    page = out / "atlas.html"
    out.mkdir(parents=True, exist_ok=True)
    with console.status("writing the report"), replaced(page) as draft:
        report.write(_with_text(tree, loaded), draft, findings=_findings(tree))
        path = recording.save(out / "atlas.zarr")
    return path, page


def _with_text(tree: xr.DataTree, loaded: Loaded) -> xr.DataTree:
    """The tree with the weights of a text, so that one can see what its heads do; as it is for a model without text."""
    model, processor = loaded
    tokenizer = getattr(processor, "tokenizer", processor)
    if model.main_input_name != "input_ids" or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return tree
    inputs = text(model, tokenizer)
    if unknown(inputs["input_ids"], tokenizer) > UNKNOWN:
        return tree
    with torch.inference_mode(), record(model, "rows", "received", processor=processor) as recording:
        model(**inputs)
    read = recording.tree
    stacks = {f"/{name}": node.to_dataset() for name, node in tree.children.items()}
    for name in set(read.children) & set(tree.children):
        stacks[f"/{name}"] = tree[name].to_dataset().merge(read[name].to_dataset(), combine_attrs="override")
    both = xr.DataTree.from_dict(stacks)
    both.attrs = tree.attrs
    return both


def _kinds(stack: str, dataset: xr.Dataset) -> Table:
    """A line a kind: its stage in the survey, how many heads have it, and the clearest of them."""
    title = f"{stack}: {dataset.sizes['layer']} layers x {dataset.sizes['head']} heads"
    table = Table(title=title, title_justify="left", header_style="bold", title_style="bold")
    for column in ("kind", "stage", "heads", "the clearest (layer.head score)"):
        table.add_column(column, justify="right" if column == "heads" else "left")
    for name, kind in TAXONOMY.items():
        if set(kind.scores) <= set(dataset.data_vars):
            found = best(dataset, name)
            heads = ", ".join(f"{layer}.{head} {score:.2f}" for layer, head, score in found[:SHOWN])
            table.add_row(name, kind.stage, str(len(found)), heads)
    return table


def _layers(dataset: xr.Dataset) -> Table:
    """A line a layer: its heads with their kinds."""
    table = Table(header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("heads: kinds")
    for layer in dataset["layer"].values:
        kinds = dataset["kinds"].sel(layer=layer)
        heads = (f"{int(head)}: {kind}" for head, kind in zip(dataset["head"].values, kinds.values) if kind)
        table.add_row(str(layer), "; ".join(heads) or "none")
    return table


def _findings(tree: xr.DataTree) -> list[Observation]:
    """The clearest head of each kind, in words."""
    found = []
    for stack, node in tree.children.items():
        for name, kind in TAXONOMY.items():
            for layer, head, score in best(node.to_dataset(), name)[:1]:
                text = f"{stack.replace('_', ' ').capitalize()} layer {layer} head {head} {kind.about} ({score:.2f})."
                found.append(Observation(text, stack, layer, head, score))
    return found
