"""A vision model's maps beside where people looked on the same pictures.

The metrics are those of saliency models (Bylinskii et al., arXiv:1604.03605). Beside the model stand what it has to
beat, the fixations on other pictures (the centre bias), and what cannot be beaten by much, one person's fixations by
the map of all others (the ceiling between observers). Intervals over people, and the test that gives pictures another
picture's map, are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .. import catalog
from ..call import Call
from ..data.loaders import GazeData, Scanpath
from ..recording import statistic
from ..seam import record
from ._people import Floats, interval, p_value
from .auc_judd import auc_judd
from .cc import cc
from .fixation_map import fixation_map
from .information_gain import information_gain
from .kl import kl
from .nss import nss
from .score import EVEN, WIDE, on_screen

METRICS = ("nss", "auc_judd", "cc", "kl", "information_gain")
PLACED = ("centre", "fit", "fill")
SIDE = 64  # rows and columns of all maps over a picture, which is as a square here
CENTRE, PEOPLE, LAST, BEST = "centre bias", "people", "last layer", "best head"

Placed = str | tuple[float, float, float, float] | None


def compare_pictures(
    model: nn.Module,
    processor: Any,
    data: GazeData,
    *,
    placed: Placed = None,
    sigma: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How well maps of a model tell where people look. [map, metric]

    `mean` is over the people of `data`, each by the mean over the pictures that he saw, with `low` and `high`: 95% of
    draws of people. The maps:

    - `best head`: of all, by nss; `heads` [layer, head] has all. A head shows the weights of the class token on the
      patches, or, where there is none, the mean of all patches' weights
    - `last layer`: the mean over its heads; `rollout`: of all layers, by attention rollout
    - `grad_cam`: of the class that the model names; not of models that name none
    - `centre bias`: the fixations of all people on the other pictures
    - `people`: of all others who saw this picture; NaN where nobody else did

    `over_centre` [map, metric], with `_low` and `_high`, is what is more than the centre bias. `p` [map] is how often
    the model's maps, dealt out to the pictures anew, have an nss as high; of the best head, how often the best of all
    has. It cannot be below one in as many orders as the pictures have. `maps` [map, picture, row, column] are as the
    picture lies.

    data: as from `regard.gaze.read(..., stimulus_folder=...)`. The model sees the whole picture, as its square: what
    its processor would cut off would be lost to the comparison. placed: how pictures stood on the screen: None, if
    the screen is as large as the picture; "centre", in the middle, a pixel on a pixel; "fit", as large as goes;
    "fill", in its shape; or left, top, right and bottom on the screen. Fixations beside the picture do not count.
    sigma: of people's maps, in pixels of the screen; otherwise one degree, where the data say it, or 1/24 of its
    width. An even map of 5% is mixed into all for kl and information_gain, which is over the centre bias in bits a
    fixation.

    FileNotFoundError, with the names, for missing pictures; ValueError for fewer than two pictures, for a model that
    does not attend to the patches of one picture, or where scipy is missing. progress: called with pictures done, and
    all.

        data = regard.gaze.read("fixations.csv", screen=(1920, 1080), stimulus_folder="pictures")
        found = compare_pictures(model, processor, data, placed="centre")
        print(found["mean"].to_pandas())
    """
    pictures = found_pictures(data)
    paths, beside, wide = _paths(data, pictures, placed, sigma)
    names = [name for name in pictures if paths[name]]
    if len(names) < 2:
        raise ValueError(
            f"the centre bias is of other pictures, so two that were looked at are needed: got {len(names)}; "
            f"{beside:,} fixations lie beside the pictures"
        )
    subjects = list(dict.fromkeys(s for name in names for s in paths[name]))
    made, notes = [], {}
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        made.append(model_maps(model, processor, data.picture(name), notes))
    kinds = [kind for kind in made[0] if all(kind in maps for maps in made)]
    shown = np.stack([[enlarged_map(maps[kind]) for maps in made] for kind in kinds])  # [kind, picture, row, column]

    human = np.stack([_map(list(paths[name].values()), wide[name]) for name in names])
    many = np.array([sum(map(len, paths[name].values())) for name in names], float)
    whole = (human * many[:, None, None]).sum(0)
    centre = np.stack([whole - human[i] * many[i] for i in range(len(names))])
    centre /= centre.sum((1, 2), keepdims=True)

    heads = [i for i, kind in enumerate(kinds) if isinstance(kind, tuple)]
    table = _nss_table(shown, [paths[name] for name in names], subjects)  # [kind, map's picture, picture]
    own = np.trace(table, axis1=1, axis2=2)
    rng = np.random.default_rng(seed)
    orders = np.array([rng.permutation(len(names)) for _ in range(resamples)]).reshape(-1, len(names))
    chance = table[:, orders, np.arange(len(names))].sum(-1).T  # [resample, kind]
    best = heads[int(np.argmax(own[heads]))]
    rows: list[tuple[str, Floats, float]] = [
        (BEST, shown[best], float(p_value(own[heads].max(), chance[:, heads].max(1)))),
        *((kind, shown[i], float(p_value(own[i], chance[:, i]))) for i, kind in enumerate(kinds) if i not in heads),
        (CENTRE, centre, np.nan),
        (PEOPLE, human, np.nan),
    ]

    scores = np.full((len(rows), len(METRICS), len(subjects), len(names)), np.nan)
    for j, name in enumerate(names):
        for subject, path in paths[name].items():
            seen = _map([path], wide[name])
            others = [other for who, other in paths[name].items() if who != subject]
            for i, (kind, maps, _) in enumerate(rows):
                if kind == PEOPLE and not others:
                    continue
                of = _map(others, wide[name]) if kind == PEOPLE else maps[j]
                scores[i, :, subjects.index(subject), j] = _judged(of, path, seen, centre[j])
    of_subject = _nan_mean(scores)  # [map, metric, subject]

    def estimate(count: Floats) -> Floats:
        both = np.stack([of_subject, of_subject - of_subject[[len(rows) - 2]]])
        there = ~np.isnan(both)
        total = (there * count).sum(-1)
        with np.errstate(invalid="ignore"):
            return np.where(total > 0, np.where(there, both * count, 0).sum(-1) / np.where(total, total, 1), np.nan)

    value = estimate(np.ones(len(subjects)))
    low, high = interval(estimate, len(subjects), resamples, rng)
    made_of: dict[str, Any] = {}
    for name, at in (("mean", 0), ("over_centre", 1)):
        prefix = "" if name == "mean" else "over_centre_"
        made_of[name] = (("map", "metric"), value[at])
        made_of[f"{prefix}low"], made_of[f"{prefix}high"] = (("map", "metric"), low[at]), (("map", "metric"), high[at])
    made_of["p"] = ("map", np.array([p for *_, p in rows]))
    grid = np.full([1 + max(kinds[i][axis] for i in heads) for axis in (0, 1)], np.nan)
    for i in heads:
        grid[kinds[i]] = own[i]
    made_of["heads"] = (("layer", "head"), grid)
    made_of["score"] = (("map", "metric", "subject", "picture"), scores)
    made_of["maps"] = (("map", "picture", "row", "column"), np.stack([maps for _, maps, _ in rows]))
    coords = {"map": [kind for kind, *_ in rows], "metric": list(METRICS), "subject": subjects, "picture": names}
    return xr.Dataset(
        made_of,
        coords,
        {
            "best_head": list(kinds[best]),
            "pictures": len(names),
            "people": len(subjects),
            "fixations": int(many.sum()),
            "beside": beside,
            "notes": list(notes.values()),
        },
    )


def found_pictures(data: GazeData) -> dict[str, tuple[int, int]]:
    """Width and height of the picture of each stimulus. FileNotFoundError with the names of those that are missing."""
    if not data.stimuli:
        raise ValueError("there are no trials to compare with")
    sizes, missing = {}, []
    for name in data.stimuli:
        try:
            sizes[name] = data.picture(name).size
        except FileNotFoundError:
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        where = (
            f"the folder {data.stimulus_folder} lacks {len(missing):,} of {len(data.stimuli):,} pictures"
            if data.stimulus_folder is not None
            else f"the {len(missing):,} pictures that were looked at are no part of the data"
        )
        raise FileNotFoundError(
            f"{where}: {shown}. Give a folder that holds them under these names (stimulus_folder=, --stimuli FOLDER)"
        )
    return sizes


def on_picture(path: Scanpath, picture: tuple[int, int], placed: Placed, name: str = "the picture") -> Scanpath:
    """A path on the screen as one on the picture that stood there, in its pixels.

    ValueError where the sizes differ and `placed` does not say how.
    """
    corner, scale = _standing(path.size, picture, placed, name)
    return Scanpath((path.places - corner) / scale, (int(picture[0]), int(picture[1])), path.durations)


def from_picture(path: Scanpath, screen: tuple[int, int], placed: Placed, name: str = "the picture") -> Scanpath:
    """A path on a picture as one on the screen where that stands; `on_picture` the other way round."""
    corner, scale = _standing(screen, path.size, placed, name)
    return Scanpath(path.places * scale + corner, screen, path.durations)


def _standing(
    screen: tuple[int, int], picture: tuple[int, int], placed: Placed, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where on the screen a picture's corner is, and how long its pixels are there."""
    whole, size = np.array(screen, float), np.array(picture, float)
    if placed is None:
        if tuple(screen) != tuple(picture):
            raise ValueError(
                f"{name} is {picture[0]} x {picture[1]} and the screen {screen[0]} x {screen[1]} pixels: say how "
                f"it was shown, placed={' or '.join(PLACED)} or left, top, right, bottom"
            )
        return np.zeros(2), np.ones(2)
    if isinstance(placed, str):
        if placed not in PLACED:
            raise ValueError(f"placed={placed!r}: {', '.join(PLACED)}, or left, top, right, bottom")
        scale = {"centre": np.ones(2), "fit": np.full(2, (whole / size).min()), "fill": whole / size}[placed]
        return (whole - size * scale) / 2, scale
    corner = np.array(placed[:2], float)
    scale = (np.array(placed[2:], float) - corner) / size
    if len(placed) != 4 or not (scale > 0).all():
        raise ValueError(f"placed={placed}: left, top, right, bottom on the screen, in pixels")
    return corner, scale


@statistic("batch head key", title="Weight of the class token")
def _first(call: Call) -> Tensor:
    return call.weights.rows(0, 1)[:, :, 0]


@statistic("batch head key", title="Mean weight received")
def _received(call: Call) -> Tensor:
    return call.weights.received() / call.query.shape[2]


def model_maps(model: nn.Module, processor: Any, picture: Image.Image, notes: dict[str, str]) -> dict[Any, Floats]:
    """The maps of a whole picture: of heads as (layer, head), and by name. [row, column] of patches or pixels

    notes: gets why a map cannot be had.
    """
    kind = type(model).__name__
    inputs = _inputs(processor, picture, kind)
    with torch.no_grad(), record(model, _first, _received, "rows") as recording:
        model(**inputs)
    stacks = [
        node
        for node in recording.tree.subtree
        if "rows" in node and node.attrs.get("kind") == "self" and node.attrs.get("grids")
    ]
    grids = stacks[0].attrs["grids"] if stacks else []
    grids = json.loads(grids) if isinstance(grids, str) else grids
    if len(stacks) != 1 or len(grids) != 1:
        raise ValueError(f"{kind} has no one stack of self attention over the patches of a whole picture")
    node = stacks[0].to_dataset()
    one = node.isel(batch=0)
    rows, columns = grids[0]
    patches = one["key_image"].values == 0
    if patches.sum() != rows * columns or node.sizes["query"] != node.sizes["key"]:
        raise ValueError(f"{kind} attends to {int(patches.sum())} places for a grid of {rows} by {columns} patches")
    class_token = one["key_role"].values[0] in ("special", "bos")
    weights = one["_first" if class_token else "_received"].transpose("layer", "head", "key").values.astype(float)
    weights = weights[..., patches].reshape(*weights.shape[:2], rows, columns)
    maps: dict[Any, Floats] = {
        (layer, head): weights[layer, head]
        for layer, head in np.ndindex(*weights.shape[:2])
        if not np.isnan(weights[layer, head]).any()
    }
    maps[LAST] = np.nanmean(weights[-1], axis=0)
    rolled = catalog.method("statistics", "rollout")(node[["rows"]].assign_attrs(node.attrs))
    last = rolled.isel(batch=0, layer=-1).transpose("query", "key").values
    maps["rollout"] = (last[0] if class_token else last.mean(0))[patches].reshape(rows, columns)
    try:
        cam = catalog.method("attribution", "grad_cam")(model, inputs)
        maps["grad_cam"] = cam.isel(batch=0).transpose("row", "column").values.astype(float)
    except ValueError as error:
        notes["grad_cam"] = f"grad_cam is left out: {str(error).partition(': ')[0]}"
    return maps


def _inputs(processor: Any, picture: Image.Image, kind: str) -> Mapping[str, Any]:
    usual = processor(images=picture, return_tensors="pt") if processor is not None else {}
    pixels = usual.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != 1:
        raise ValueError(f"{kind} has no processor that makes one picture of a picture")
    height, width = pixels.shape[-2:]
    square = picture.resize((width, height), Image.Resampling.BICUBIC)
    inputs = processor(images=square, return_tensors="pt", do_resize=False, do_center_crop=False)
    if inputs["pixel_values"].shape != pixels.shape:
        raise ValueError(
            f"{type(processor).__name__} makes {list(inputs['pixel_values'].shape)} of a whole picture, and "
            f"{list(pixels.shape)} is what {kind} is given"
        )
    return {"pixel_values": inputs["pixel_values"]}


def _paths(
    data: GazeData, pictures: Mapping[str, tuple[int, int]], placed: Placed, sigma: float | None
) -> tuple[dict[str, dict[str, Scanpath]], int, dict[str, tuple[float, float]]]:
    """Each person's fixations on each picture as a square; how many lie beside; sigma in rows and columns."""
    found: dict[str, dict[str, list]] = {name: {} for name in pictures}
    wide: dict[str, tuple[float, float]] = {}
    beside = 0
    for trial in data:
        size = pictures[trial.stimulus]
        path = on_picture(trial.scanpath, size, placed, trial.stimulus)
        there = on_screen(path)
        beside += int((~there).sum())
        if there.any():
            found[trial.stimulus].setdefault(trial.subject, []).append(path.places[there] / size * SIDE)
        if trial.stimulus not in wide:
            of_screen = sigma or data.degree or trial.scanpath.size[0] * WIDE
            zero, one = (
                on_picture(Scanpath(np.array([[v, v]]), trial.scanpath.size), size, placed) for v in (0.0, 1.0)
            )
            x, y = (one.places - zero.places)[0] / size * SIDE * of_screen
            wide[trial.stimulus] = (float(y), float(x))
    joined = {
        name: {who: Scanpath(np.concatenate(places), (SIDE, SIDE)) for who, places in of.items()}
        for name, of in found.items()
    }
    return joined, beside, wide


def _map(paths: Sequence[Scanpath], wide: tuple[float, float]) -> Floats:
    return fixation_map(paths, (SIDE, SIDE), sigma=wide)


def enlarged_map(shown: Floats) -> Floats:
    """On the grid of all maps, smoothly."""
    small = Image.fromarray(shown.astype(np.float32))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)


def _nss_table(shown: Floats, paths: Sequence[Mapping[str, Scanpath]], subjects: Sequence[str]) -> Floats:
    """What each picture adds to the mean nss over people, with each picture's map. [kind, map's picture, picture]"""
    flat = shown.reshape(*shown.shape[:2], -1)
    spread = flat.std(-1, keepdims=True)
    flat = np.where(spread > 0, (flat - flat.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1), 0)
    saw = {who: sum(who in of for of in paths) for who in subjects}
    counts = np.zeros((len(paths), SIDE * SIDE))
    for j, of in enumerate(paths):
        for who, path in of.items():
            column, row = path.places.astype(int).T
            np.add.at(counts[j], row * SIDE + column, 1 / (len(path) * saw[who] * len(subjects)))
    return flat @ counts.T


def _judged(of: Floats, path: Scanpath, seen: Floats, centre: Floats) -> list[float]:
    if np.ptp(of) == 0:  # it says nothing
        of = np.ones_like(of)
        first = [0.0, 0.5, np.nan]
    else:
        first = [nss(of, path), auc_judd(of, path), cc(of, seen)]
    even, base = (EVEN / m.size + (1 - EVEN) * m / m.sum() for m in (of, centre))
    return [*first, kl(even, seen), information_gain(even, path, baseline=base)]


def _nan_mean(scores: Floats) -> Floats:
    there = ~np.isnan(scores)
    number = there.sum(-1)
    return np.where(number > 0, np.where(there, scores, 0).sum(-1) / np.maximum(number, 1), np.nan)
