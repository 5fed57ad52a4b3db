"""`regard look`: from a model and an input to a recording and a report."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from .. import catalog, report, sites
from ..extras import listed
from ..files import refuse_foreign, replaced
from ..loading import Loaded, load
from ..observations import Observation, observe
from ..padding import real, unpadded
from ..prediction import writes
from ..recording import Recording, spec_of, statistic
from ..seam import record
from ..statistics import BASIC
from ..tokens import Tokens
from . import sound
from .inputs import InputError, Written, hear, open_picture, png, prepare, read_text, seen, writable, written
from .printed import tables

ROWS_BUDGET = 256 * 2**20  # bytes of dense rows to keep, all layers together; above it the largest keys of each row
TOP = 24  # keys kept of each row where rows are not
SHOWN = 4e6  # rows of which a page of `report.BUDGET` can hold the largest weight: 3 bytes each, before base64
DECODED = 16  # tokens that an encoder-decoder model writes unless told how many
PAINTED = 4  # steps that are kept of those in which a pipeline paints a picture, first and last among them


@dataclass
class Seen:
    """What `look` wrote, and what it found."""

    recording: Path
    report: Path
    partial: bool
    tables: list[Table] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    picture: Path | None = None  # what was painted
    said: str | None = None  # what was generated


def look(
    name: str = "reader",
    *,
    text: str | None = None,
    file: Path | None = None,
    image: Path | None = None,
    audio: Path | None = None,
    generate: int = 0,
    out: Path = Path("regard-look"),
    truncate: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Seen:
    """Run a model over a text, picture or sound, and write `recording.zarr` and `report.html` into the folder `out`.

    A diffusers pipeline paints the text, and `picture.png` is written too.
    """
    console = console or Console(quiet=True)
    text, picture = read_text(text, file), open_picture(image, console)  # bad input is found before a model is loaded
    heard = sound.read(audio) if audio is not None else None
    writable(out, "report.html", "recording.zarr")
    began = time.perf_counter()
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    if hasattr(loaded.processor, "scheduler"):  # a diffusers pipeline
        if heard is not None:
            raise InputError(f"--audio: {type(loaded.model).__name__} paints a text; give it one with --text")
        return _paint(loaded, name, text, picture, generate, out, console)
    model = loaded.model
    if heard is not None or model.main_input_name == "input_features":
        inputs, roles = hear(loaded, name, heard, text is not None or picture is not None), None
    else:
        inputs, roles = prepare(loaded, name, text, picture, truncate, generate)
    size = ", ".join(f"{value.shape[1]} tokens" for key, value in inputs.items() if key == "input_ids")
    size = size if heard is None else f"{heard.seconds:.1f} s of sound"
    found = sites.find(model)
    _announce(model, found, size and f", {size}", console)
    decoder = bool(getattr(model.config, "is_encoder_decoder", False)) and model.can_generate()
    steps = generate or (DECODED if decoder else 0)
    if steps and not writes(model):
        raise InputError(f"--generate: {type(model).__name__} does not generate; leave the option out")

    attributes_ = attributes(model, name) | {"attention": model.config._attn_implementation}
    wrote = None
    with _progress(console, model, steps) as tick:
        chosen = statistics(model, inputs, steps) | {"tick": tick}
        with (
            contextlib.suppress(KeyboardInterrupt),
            torch.inference_mode(),
            record(model, processor=loaded.processor, roles=roles, attributes=attributes_, **chosen) as recording,
        ):
            if steps:
                wrote = written(loaded, inputs, steps)
            else:
                model(**inputs)
    seconds = time.perf_counter() - began
    if wrote is not None:
        note_said(recording, loaded, wrote)
    pictures = seen(loaded.processor, inputs, picture) if picture else []
    if len(recording) and pictures and pictures[0] is not picture:
        recording[0].attrs["note"] = f"The picture is shown as the model is given it, {_sizes(pictures)}."
    return _write(recording, out, pictures, recording.interrupted, seconds, console)


def _sizes(pictures: list[Image.Image]) -> str:
    first = pictures[0]
    return f"{first.width} x {first.height} pixels" + (f" and {len(pictures) - 1} more" if len(pictures) > 1 else "")


def note_said(recording: Recording, loaded: Loaded, wrote: Written) -> None:
    """Keep what was generated with the recording, and its last token, which the model never ran on."""
    tree, tokenizer = recording[0], getattr(loaded.processor, "tokenizer", loaded.processor)
    tree.attrs["said"] = tokenizer.decode(wrote.ids[wrote.start :], skip_special_tokens=True)
    last = Tokens.plain("generated", 1, 1, wrote.ids[None, -1:]).texts(loaded.processor)[0]
    for node in tree.children.values():
        looks = node.attrs["causal"] or node.attrs["kind"] == "cross"
        if looks and node["query"].values[-1] == len(wrote.ids) - 2:
            node.attrs["unread"] = last


def _announce(model: nn.Module, found: dict[nn.Module, Any], size: str, console: Console) -> None:
    console.print(f"{type(model).__name__}: {len(found)} attention modules{size}", highlight=False)
    if missed := sites.unreached(model, found)[0]:
        console.print(f"[yellow]not read, though they attend:[/] {listed(missed)}", highlight=False)


def attributes(model: Any, name: str) -> dict[str, Any]:
    return {"model": name, "architecture": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}


def _paint(
    loaded: Loaded, name: str, text: str | None, picture: Image.Image | None, generate: int, out: Path, console: Console
) -> Seen:
    """Let a pipeline paint the text, and write what its denoising model attends to in some of the steps."""
    model, pipeline = loaded
    kind, takes = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if picture is not None or generate:
        raise InputError(f"{'--generate' if generate else '--image'}: {kind} paints a text; give it with --text")
    if not {"prompt", "num_inference_steps"} <= set(takes):
        raise InputError(f"{kind} paints no text; from Python: regard.record(model, ...) around your own call")
    if text is None:
        raise InputError(f"{kind} paints a text: give one with --text")
    refuse_foreign(out / "picture.png")
    began = time.perf_counter()
    found = sites.find(model)
    _announce(model, found, "", console)
    with _progress(console, model, takes["num_inference_steps"].default) as tick:
        recording, picture, interrupted = painting(loaded, name, text, tick)
    seconds = time.perf_counter() - began
    pictures = [enlarged(picture)] if picture else []
    return _write(recording, out, pictures, interrupted, seconds, console, picture)


def painting(
    loaded: Loaded, name: str, text: str, tick: Any, **options: Any
) -> tuple[Recording, Image.Image | None, bool]:
    """What a pipeline attends to in some of the steps in which it paints a text, as samples, and the picture.

    Whether it was interrupted comes last; then there are the steps until that, and no picture. tick: a statistic that
    is told of each call.
    """
    model, pipeline = loaded
    takes = inspect.signature(pipeline.__call__).parameters
    steps = takes["num_inference_steps"].default
    kept = sorted({round(i) for i in np.linspace(0, steps - 1, PAINTED)})
    pipeline.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(0)} if "generator" in takes else {}
    painted = None
    chosen = {
        key: _where(lambda _: len(recording) - 1 in kept, f)
        for key, f in statistics(model, {}, 0, runs=len(kept)).items()
    }
    with (
        contextlib.suppress(KeyboardInterrupt),
        torch.inference_mode(),
        record(model, processor=pipeline, attributes=attributes(model, name), **chosen, tick=tick) as recording,
    ):
        painted = pipeline(prompt=text, **seeded, **options).images[0]
    whole = len(recording) - recording.interrupted  # a step that was interrupted lacks layers
    runs = {i: recording[i] for i in kept if i < whole}
    return _as_samples(runs, steps), painted, recording.interrupted


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture, which a page would blur, in larger pixels."""
    larger = max(1, 256 // max(picture.size))
    return picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST)


def _as_samples(runs: dict[int, xr.DataTree], steps: int) -> Recording:
    """One run, whose samples are these steps of painting; of a batch with and without words, what was given words.

    diffusers' pipelines lay a guided batch out as texts to avoid, then texts to follow.
    """
    if not runs:
        return Recording([])
    first, stacks = next(iter(runs.values())), {}
    for stack in first.children:
        parts = [run[stack].to_dataset().isel(batch=[-1]) for run in runs.values()]
        whole = xr.concat(parts, "batch", data_vars="minimal", coords="minimal", compat="override", join="override")
        for side in ("query", "key"):  # every sample is of the one picture that was painted
            if (image := f"{side}_image") in whole.coords:
                whole = whole.assign_coords({image: whole[image].clip(max=0)})
        grids = json.loads(whole.attrs["grids"])
        stacks[f"/{stack}"] = whole.assign_attrs(grids=json.dumps(grids[-1:]))
    tree = xr.DataTree.from_dict(stacks)
    numbers = ", ".join(str(i + 1) for i in runs)
    tree.attrs = first.attrs | {"note": f"Painted in {steps} steps. The samples are steps {numbers}."}
    return Recording([tree])


def _write(
    recording: Recording,
    out: Path,
    pictures: list[Image.Image],
    interrupted: bool,
    seconds: float,
    console: Console,
    painted: Image.Image | None = None,
) -> Seen:
    if not len(recording):
        raise InputError("interrupted before any attention was recorded; nothing was written")
    tree = recording[0]
    tree.attrs["seconds"] = round(seconds, 2)
    observations = observe(tree)
    page, picture = out / "report.html", out / "picture.png" if painted else None
    out.mkdir(parents=True, exist_ok=True)
    # All are written aside before any takes its place, so that a folder never holds some of each run.
    with contextlib.ExitStack() as drafts:
        with console.status("writing the report"):
            report.write(tree, drafts.enter_context(replaced(page)), findings=observations, pictures=pictures)
            if painted and picture:
                drafts.enter_context(replaced(picture)).write_bytes(png(painted))
        with console.status("writing the recording"):
            path = recording.save(out / "recording.zarr")
    found = [one for stack, node in tree.children.items() for one in _tables(stack, node.to_dataset(), console.width)]
    return Seen(path, page, interrupted, found, observations, picture, tree.attrs.get("said"))


def _where(wanted: Callable[[Any], bool], function: Any) -> Any:
    """A statistic that leaves the other calls out."""

    def chosen(call: Any) -> Tensor | None:
        return function(call) if wanted(call) else None

    chosen.spec = spec_of(function)  # type: ignore[attr-defined]
    return chosen


def statistics(model: nn.Module, inputs: dict[str, Any], steps: int, runs: int = 1) -> dict[str, Any]:
    expected = steps + (inputs["input_ids"].shape[1] if "input_ids" in inputs else 0)
    modules = len(sites.find(model)) * runs or 1

    def sizes(call: Any) -> tuple[int, int]:
        """Rows of all layers together, and keys of each, when everything is generated."""
        n_key = call.key.shape[2] if call.site.cross else max(call.key_positions.stop, expected)
        n_query = max(call.query_positions.stop, expected if call.site.causal else 0)
        return call.query.shape[0] * call.query.shape[1] * n_query * modules, n_key

    def fit(call: Any) -> bool:
        """Whether every weight is kept."""
        rows, keys = sizes(call)
        return rows * keys * 4 <= ROWS_BUDGET

    chosen = {name: catalog.statistic(name) for name in BASIC}
    for name in ("top_keys", "top_weights"):  # dear: only where rows do not say it, and a page can show it
        top = partial(catalog.statistic(name), k=TOP)
        chosen[name] = _where(lambda call: not fit(call) and sizes(call)[0] <= SHOWN, top)
    return chosen | {"rows": _where(fit, catalog.statistic("rows"))}


@contextlib.contextmanager
def _progress(console: Console, model: nn.Module, steps: int) -> Iterator[Any]:
    """Shows attention calls as they happen; gives a statistic that counts them and records nothing."""
    total = len(sites.find(model))
    columns = (
        TextColumn("looking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("attention calls"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total * max(1, steps))

        @statistic("batch", title="Progress")
        def tick(call: Any) -> None:
            progress.advance(task)

        yield tick


def _tables(stack: str, dataset: xr.Dataset, width: int) -> list[Table]:
    """A line a layer: what each statistic is on average, over heads and positions, padding left out."""
    sizes, dataset = dataset.sizes, unpadded(dataset)
    title = f"{stack}: {sizes['layer']} layers x {sizes['head']} heads, {sizes['query']} queries"
    title += f" on {sizes['key']} keys" if sizes["key"] != sizes["query"] else ""
    columns: dict[str, np.ndarray] = {}
    for name, variable in dataset.data_vars.items():
        label = str(variable.attrs.get("long_name", name))
        units = variable.attrs.get("units", "")
        if "role" in variable.dims:
            roles = [r for r in variable["role"].values if float(variable.sel(role=r).mean()) > 0 or r != "other"]
            for role in roles:
                columns[f"on {role}"] = _mean(variable.sel(role=role))
        elif "rank" not in variable.dims and not {"query", "key"} <= set(variable.dims):
            if "key" in variable.dims:
                asked = real(dataset, "query").sum("query")
                columns["on its top key"] = _mean(variable.max("key") / asked.where(asked > 0))
            else:
                columns[f"{label}{f' ({units})' if units else ''}"] = _mean(variable)
    cells = {
        name: [f"{v:.0%}" if name.startswith("on ") else f"{v:.2f}" for v in values]
        for name, values in columns.items()
        if np.isfinite(values).any()
    }
    return tables(title, "layer", [str(layer) for layer in dataset["layer"].values], cells, width)


def _mean(variable: xr.DataArray) -> np.ndarray:
    return variable.mean([d for d in variable.dims if d != "layer"]).values
