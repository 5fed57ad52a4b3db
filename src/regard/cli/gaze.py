"""`regard gaze`: data read, two groups scored, and models beside people, as tables, pictures and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..catalog import check_plot
from ..data import loaders, media
from ..data.loaders import GazeData, GazeTrial, Scanpath, files, read_gaze
from ..files import MARK, refuse_foreign, replaced
from ..gaze.compare import CONTROLS, word_counts
from ..gaze.compare import compare as correlate
from ..gaze.compare_pictures import METRICS, compare_pictures, found_pictures, from_picture
from ..gaze.draw import draw
from ..gaze.draw_scanpath import check_drawing, draw_scanpath
from ..gaze.scan import scan as scanned
from ..gaze.score import score as scored
from ..loading import load
from .inputs import InputError
from .printed import Printed, tables

TASKS = ("reading", "search")
READ = {  # what --read says, and what it becomes
    **dict.fromkeys(("units", "origin", "time", "separator", "decimal", "encoding", "subject", "stimulus", "eye"), str),
    **dict.fromkeys(("trial_message", "stimulus_message"), str),
    "distance": float,
    "screen_cm": lambda said: _pair(said, float, "screen_cm"),
    "up": lambda said: _yes(said),
}


def reading(
    columns: Sequence[str] | None,
    screen: str | None,
    only: Sequence[str] | None,
    more: Sequence[str] | None,
    stimuli: Path | None,
    keep_going: bool,
) -> dict[str, Any]:
    """The arguments of `read_gaze` that options say."""
    told: dict[str, Any] = {"keep_going": True} if keep_going else {}
    if columns:
        told["columns"] = _named(columns, "--column")
    if only:
        told["only"] = _named(only, "--only")
    if screen is not None:
        told["screen"] = _pair(screen, int, "--screen")
    if stimuli is not None:
        told["stimulus_folder"] = stimuli
    for name, said in _named(more or (), "--read").items():
        if name not in READ:
            raise ValueError(f"--read {name}: there are {', '.join(READ)}")
        told[name] = READ[name](said.replace("\\t", "\t") if name == "separator" else said)
    return told


# What messages of `read_gaze` and its like call by names of Python, as the command line has it.
OPTIONS = (
    (r"columns=\{([^{}]*)\}", lambda m: " ".join(f"--column {role}=NAME" for role in re.findall(r"'(\w+)'", m[1]))),
    (r"only=\{'([^']*)': \.\.\.\}", r"--only \1=..."),
    (r"keep_going=True", "--keep-going"),
    (r"\(stimulus_folder=, (--stimuli FOLDER)\)", r"(\1)"),
    (r"stimulus_folder(:|=)", r"--stimuli\1"),
    (r"screen=\(width, height\)", "--screen WIDTHxHEIGHT"),
    (r"screen_cm=\(width, height\)", "--read screen_cm=WIDTHxHEIGHT"),
    (r"placed=(centre or fit or fill or) left, top, right, bottom", r"--placed \1 left,top,right,bottom"),
    (r"same_people=True or False", "--same-people or --different-people"),
    (r"(?<![\w-])(check )?screen=(?=,)", r"\1--screen"),
    (
        r"(?<!--read )(?<!--column )(?<!--only )(?<![\w-])"
        r"(subject|stimulus|units|eye|encoding|separator|distance|origin|trial_message|stimulus_message)=(?:'([^']*)')?",
        lambda m: f"--read {m[1]}={m[2] or ''}",
    ),
)


@contextmanager
def by_options() -> Iterator[None]:
    """Errors name options of the command line where they name arguments of Python."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error)
        for pattern, option in OPTIONS:
            said = re.sub(pattern, option, said)
        if said == str(error):
            raise
        raise ValueError(said) from error


def _named(pairs: Sequence[str], option: str) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{option} {pair}: expected NAME=VALUE")
    return {name.strip(): value for name, _, value in (pair.partition("=") for pair in pairs)}


def _pair(said: str, kind: type, option: str) -> tuple:
    try:
        one, two = (kind(part) for part in said.lower().split("x"))
    except ValueError:
        raise ValueError(f"{option} {said}: expected WIDTHxHEIGHT, such as 1920x1080") from None
    return one, two


def _yes(said: str) -> bool:
    if said not in ("true", "false"):
        raise ValueError(f"--read up={said}: true or false")
    return said == "true"


@by_options()
def read(data: Path, told: Mapping[str, Any], out: Path | None) -> Printed:
    """Read fixations, say how, and write them as a plain table."""
    found = read_gaze(data, **told)
    said = Printed(lines=found.summary().split("\n"))
    if out is not None:
        if out.exists():
            raise FileExistsError(f"{out} exists; choose another name, or move it away")
        found.write(out)
        said.lines.append(f"a plain table of all of it is in {out}")
    return said


@by_options()
def score(
    a: Path,
    b: Path,
    told: Mapping[str, Any],
    *,
    same_people: bool | None,
    metrics: Sequence[str] | None,
    pairs: int,
    resamples: int,
    seed: int,
    out: Path | None,
    plot: Path | None,
    console: Console,
) -> Printed:
    """Compare two groups of scanpaths by all metrics."""
    _refuse(out, plot)
    with console.status("reading the data"):
        one, two = (read_gaze(path, **told) for path in (a, b))
    with Progress(console=console, transient=True) as bar:
        row = bar.add_task("comparing pairs")
        found = scored(
            one,
            two,
            same_people=same_people,
            metrics=metrics or None,
            pairs=pairs,
            resamples=resamples,
            seed=seed,
            progress=lambda done, every: bar.update(row, completed=done, total=every),
        )
    table = Table(title=f"A: {a.name}, B: {b.name}", title_justify="left", header_style="bold")
    for column in ("metric", "A with B", "within A", "within B", "other pictures", "p"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for name in found["metric"].values:
        of = found.sel(metric=name)
        cells = [_ranged(of, key, f"{key}_low", f"{key}_high") for key in ("between", "within_a", "within_b", "other")]
        mark = " (lower is alike)" if name in found.attrs["lower"] else ""
        table.add_row(f"{name}{mark}", *cells, _p(float(of["p"])))
    table.caption = (
        "means over pairs of people on one picture, and 95% of draws of people; p: how often two groups drawn anew "
        "from all people differ as much"
    )
    attrs = found.attrs
    printed = Printed([table], [_read_as("A", one), _read_as("B", two)])
    printed.lines.append(
        f"{attrs['pictures']} pictures are in both; {attrs['left_out_a']} of A and {attrs['left_out_b']} of B are not"
    )
    if attrs["pairs"] < attrs["pairs_possible"]:
        printed.lines.append(
            f"{attrs['pairs']:,} of {attrs['pairs_possible']:,} pairs were compared, drawn by chance (--pairs)"
        )
    _keep(printed, found, out, plot, None, None)
    return printed


@by_options()
def scan(
    name: str,
    picture: Path,
    *,
    about: str | None,
    like: Path | None,
    fixations: int,
    iterations: int,
    speed: float,
    seed: int,
    out: Path,
    table: Path | None,
    screen: str | None,
    placed: str | None,
    trust_remote_code: bool,
    console: Console,
) -> Printed:
    """Let a model look over a picture, and draw where its sharp spot goes.

    screen, placed: where the picture stood when people looked at it, so that the table is of what theirs is.
    """
    if table is None and (screen is not None or placed is not None):
        raise InputError("--screen and --placed are of the table: give --table too")
    if screen is None and placed is not None:
        raise InputError("--placed says how the picture stood on a screen: give --screen too")
    if about is not None and like is not None:
        raise InputError("--for and --like: give one of them")
    check_drawing(out)
    if table is not None and table.exists():
        raise FileExistsError(f"{table} exists; choose another name, or move it away")
    shown = media.picture(picture, str(picture))
    on = shown.size if screen is None else _pair(screen, int, "--screen")
    from_picture(
        Scanpath(np.zeros((0, 2)), shown.size), on, _placed(placed), picture.name
    )  # refused before the model runs
    wanted = about if like is None else media.picture(like, f"--like {like}")
    with console.status(f"loading {name}"):
        model, processor = load(name, trust_remote_code=trust_remote_code)
    model.float()  # half precision is for a GPU
    with console.status(f"looking: {fixations} fixations of {iterations} steps"):
        path = scanned(model, processor, shown, wanted, fixations=fixations, iterations=iterations, seed=seed)
    what = f"for {about}" if about else f"for what is in {like.name}" if like else "at the whole picture"
    draw_scanpath(path, shown, out, title=f"{name} looks {what}: {picture.name}", speed=speed)
    made = Table(header_style="bold")
    for column in ("fixation", "x", "y"):
        made.add_column(column, justify="right")
    for i, (x, y) in enumerate(path.places, 1):
        beside = "" if 0 <= x <= path.size[0] and 0 <= y <= path.size[1] else " (beside the picture)"
        made.add_row(str(i), f"{x:.0f}", f"{y:.0f}{beside}")
    printed = Printed([made], [f"{name} looks {what}", f"pixels of {picture.name}, {path.size[0]} by {path.size[1]}"])
    if table is not None:
        told = from_picture(path, on, _placed(placed), picture.name)
        GazeData((GazeTrial(name, picture.name, "", told),)).write(table)
        printed.lines.append(f"{table} is a table that regard gaze read and score take, with --screen {on[0]}x{on[1]}")
    printed.lines.append(f"picture: {out}")
    return printed


def _compare_pictures(
    name: str,
    data: GazeData,
    loaded: Any,
    *,
    placed: str | None,
    resamples: int,
    seed: int,
    out: Path | None,
    plot: Path | None,
    console: Console,
) -> Printed:
    how = _placed(placed)
    model, processor = loaded
    with Progress(console=console, transient=True) as bar:
        row = bar.add_task("looking at pictures")
        found = compare_pictures(
            model,
            processor,
            data,
            placed=how,
            resamples=resamples,
            seed=seed,
            progress=lambda done, every: bar.update(row, completed=done, total=every),
        )
    table = Table(title=f"{name} beside people", title_justify="left", header_style="bold")
    for column in ("map", *METRICS, "nss over centre", "p"):
        table.add_column(column, justify="left" if column == "map" else "right", overflow="fold")
    layer, head = found.attrs["best_head"]
    for kind in found["map"].values:
        of = found.sel(map=kind)
        cells = [_ranged(of.sel(metric=metric), "mean", "low", "high") for metric in METRICS]
        nss = of.sel(metric="nss")
        over = "" if kind == "centre bias" else _ranged(nss, "over_centre", "over_centre_low", "over_centre_high")
        label = f"{kind} (layer {layer}, head {head})" if kind == "best head" else str(kind)
        table.add_row(label, *cells, over, _p(float(of["p"])))
    table.caption = (
        "means over people, and 95% of draws of people; kl is better when lower. centre bias: the fixations on the "
        "other pictures. people: each by the map of the others, the most to be expected. p: how often maps of other "
        "pictures do as well; of the best head, the best of all heads"
    )
    printed = Printed([table], [_read_as("data", data), *found.attrs["notes"]])
    if found.attrs["beside"]:
        printed.lines.append(f"{found.attrs['beside']:,} fixations lie beside the pictures, and do not count")
    _keep(printed, found.drop_vars(["maps", "score"]), out, plot, data, (found, how))
    return printed


def _placed(said: str | None) -> Any:
    if said is None or "," not in said:
        return said
    try:
        return tuple(float(part) for part in said.split(","))
    except ValueError:
        raise ValueError(f"--placed {said}: centre, fit, fill, or left,top,right,bottom in pixels") from None


def _refuse(out: Path | None, plot: Path | None) -> None:
    if out is not None:
        refuse_foreign(out)
    if plot is not None:
        check_plot(plot)


def _keep(
    printed: Printed, found: xr.Dataset, out: Path | None, plot: Path | None, data: GazeData | None, whole: Any
) -> None:
    if plot is not None:
        if whole is None:
            draw(found, plot)
        else:
            draw(whole[0], plot, data, placed=whole[1])
        printed.lines.append(f"picture: {plot}")
    if out is not None:
        with replaced(out) as draft:
            draft.write_text(json.dumps({"about": MARK, **_plain(found)}, indent=1), encoding="utf-8")
        printed.lines.append(f"all numbers are in {out}")


def _plain(found: xr.Dataset) -> dict[str, Any]:
    """As JSON has it: what is not a number becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    told = {"attributes": dict(found.attrs)}
    told |= {
        str(name): {"axes": list(v.dims), "values": clean(v.values.tolist())} for name, v in found.variables.items()
    }
    return told


def _read_as(which: str, data: GazeData) -> str:
    return f"{which}: " + "; ".join(data.summary().split("\n"))


def _ranged(of: xr.Dataset, *names: str) -> str:
    value, low, high = (float(of[name]) for name in names)
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if math.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


@by_options()
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
    told: Mapping[str, Any] | None = None,
    placed: str | None = None,
    kept: Path | None = None,
    plot: Path | None = None,
) -> Printed:
    """Compare the model of this name with readings, or fixations on pictures, and say what came out.

    told: the arguments of `read_gaze`. out: of readings, a zarr folder; kept, plot: of pictures, JSON and a picture.
    """
    if task not in TASKS:
        raise ValueError(f"--task {task}: there are {' and '.join(TASKS)}")
    for path in (out, kept):
        if path is not None:
            refuse_foreign(path)
    if plot is not None:
        check_plot(plot)
    words = data.is_dir() and any(data.glob(f"words_{language}.csv*"))
    if told or not words:
        if out is not None or corpus is not None:
            raise ValueError("--out and --corpus are of reading data in words; of pictures there are --json and --plot")
        with console.status("reading the data"):
            fixations = read_gaze(data, **(told or {}))
            found_pictures(fixations)
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    sees = getattr(loaded.model, "main_input_name", None) == "pixel_values"
    if told or not words:
        if not sees:
            raise ValueError(
                f"{name} is no model that looks at pictures alone, and {data} are fixations on pictures: give a vision "
                f"model, or, to a model that reads, the folder of WebQAmGaze without --stimuli"
            )
        loaded.model.float()  # half precision is for a GPU
        how = {"placed": placed, "resamples": resamples, "seed": seed, "out": kept, "plot": plot, "console": console}
        return _compare_pictures(name, fixations, loaded, **how)
    if sees:
        raise ValueError(
            f"{name} looks at pictures, and {data} holds texts that people read: give a model that reads, or the "
            f"folder of the pages' pictures with --stimuli"
        )
    if kept is not None or plot is not None or placed is not None:
        raise ValueError("--json, --plot and --placed are of fixations on pictures; of words there is --out")
    model, tokenizer = loaded
    with console.status("reading the data"):
        readings = [reading for reading in loaders.webqamgaze(data, language) if reading.task == task]
        counts = None if corpus is None else word_counts(files.text(corpus))
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
