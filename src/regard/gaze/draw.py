"""The pictures of `score` and of `compare_pictures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from ..catalog import drawn
from ..data.loaders import GazeData
from .compare_pictures import BEST, CENTRE, LAST, PEOPLE, Placed, on_picture

SHOWN = (PEOPLE, BEST, "grad_cam", LAST, "rollout", CENTRE)
OURS, THEIRS, GREY, DARK = "#d1495b", "#00798c", "#8a8f98", "#22262b"


def draw(
    found: xr.Dataset, path: str | Path, data: GazeData | None = None, *, placed: Placed = None, most: int = 4
) -> None:
    """Draw what `score` or `compare_pictures` found into a PNG or SVG file.

    Of pictures, a row each, `most` of them: the fixations (a circle each, larger where they lasted longer, a colour for
    each person), where people looked, the model's maps, with the nss of each, and at the side the mean of each over
    people, between the centre bias and the ceiling. Those pictures are shown on which the best head does best, worst,
    and evenly between. That needs the `data`, and how they were `placed`, once more.

    ValueError where the data are missing, or matplotlib is, or the file does not end in .png or .svg; FileExistsError
    where it is not one that Regard wrote.
    """
    path = Path(path)
    if "between" in found:
        drawn(lambda figure: _scores(figure, found), path, size=(13, 7))
        return
    if "maps" not in found or data is None:
        raise ValueError("draw takes what score found, or what compare_pictures found and the data that it was given")
    names = _chosen(found, most)
    size = (2.1 * (1 + sum(kind in found["map"] for kind in SHOWN)) + 4, 0.6 + 1.75 * max(len(names), 2))
    drawn(lambda figure: _pictures(figure, found, data, placed, names), path, size=size)


def _chosen(found: xr.Dataset, most: int) -> list[str]:
    """From the best to the worst, by the best head, in even steps."""
    own = _of_picture(found, BEST)
    order = np.argsort(-own)
    at = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [str(found["picture"].values[i]) for i in order[at]]


def _of_picture(found: xr.Dataset, kind: str) -> NDArray[np.float64]:
    return found["score"].sel(map=kind, metric="nss").mean("subject").values


def _pictures(figure: Any, found: xr.Dataset, data: GazeData, placed: Placed, names: list[str]) -> None:
    kinds = [kind for kind in SHOWN if kind in found["map"].values]
    left, right = figure.subfigures(1, 2, width_ratios=(2.1 * (1 + len(kinds)), 4))
    grid = left.subplots(len(names), 1 + len(kinds), squeeze=False)
    subjects = [str(name) for name in found["subject"].values]
    for row, name in zip(grid, names):
        image = data.picture(name)
        shown = np.asarray(image, dtype=np.float64) / 255
        _fixations(row[0], image, [(t, subjects) for t in data.of(name)], placed)
        for axes, kind in zip(row[1:], kinds):
            axes.imshow(_over(shown, found["maps"].sel(map=kind, picture=name).values))
            worth = float(found["score"].sel(map=kind, picture=name, metric="nss").mean("subject"))
            box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2}
            place = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
            axes.text(0.98, 0.03, f"{worth:.2f}", fontsize=9, color="white", bbox=box, **place)
        for axes in row:
            axes.set(xticks=[], yticks=[], xlim=(0, image.width), ylim=(image.height, 0))
            for side in axes.spines.values():
                side.set_visible(False)
    grid[0][0].set_title("fixations", fontsize=11, color=DARK)
    for axes, kind in zip(grid[0][1:], kinds):
        axes.set_title(_named(found, kind), fontsize=11, color=DARK)
    _bars(right.subplots(), found, kinds)


def _fixations(axes: Any, image: Image.Image, trials: list[Any], placed: Placed) -> None:
    from matplotlib import colormaps

    axes.imshow(np.asarray(image.convert("RGB")))
    for trial, subjects in trials:
        path = on_picture(trial.scanpath, image.size, placed, trial.stimulus)
        if trial.subject not in subjects:
            continue
        colour = colormaps["turbo"]((subjects.index(trial.subject) + 0.5) / len(subjects))
        x, y = path.places.T
        area = np.full(len(path), 22.0) if path.durations is None else 6 + np.clip(path.durations, 0, 1000) / 9
        axes.plot(x, y, color=colour, linewidth=0.5, alpha=0.45)
        axes.scatter(x, y, s=area, color=colour, alpha=0.8, edgecolors="white", linewidths=0.5, zorder=3)


def _over(picture: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A map over its picture, which is dark and grey where the map is low."""
    from matplotlib import colormaps

    high, wide = picture.shape[:2]
    low, top = np.quantile(values, [0.02, 0.995])
    share = np.clip((values - low) / (top - low), 0, 1) if top > low else np.zeros_like(values)
    large = Image.fromarray(share.astype(np.float32)).resize((wide, high), Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(large, dtype=np.float64), 0, 1)[..., None]
    grey = picture.mean(-1, keepdims=True) * 0.55
    hot = colormaps["inferno"](0.15 + 0.85 * strength[..., 0])[..., :3]
    return np.clip((1 - 0.85 * strength) * grey + 0.85 * strength * hot, 0, 1)


def _named(found: xr.Dataset, kind: str) -> str:
    if kind == BEST:
        layer, head = found.attrs["best_head"]
        return f"head {layer}.{head}"
    return {PEOPLE: "other people", "grad_cam": "Grad-CAM"}.get(kind, kind)


def _bars(axes: Any, found: xr.Dataset, kinds: list[str]) -> None:
    of = found.sel(metric="nss")
    order = [kind for kind in kinds if kind not in (PEOPLE, CENTRE)]
    order = [PEOPLE, *sorted(order, key=lambda kind: -float(of["mean"].sel(map=kind))), CENTRE]
    for i, kind in enumerate(order):
        mean, low, high = (float(of[name].sel(map=kind)) for name in ("mean", "low", "high"))
        colour = THEIRS if kind == PEOPLE else GREY if kind == CENTRE else OURS
        axes.barh(-i, mean, color=colour, height=0.62)
        if np.isfinite([low, high]).all():
            axes.plot([low, high], [-i, -i], color=DARK, linewidth=1.6, solid_capstyle="butt")
        axes.text(
            max(mean, high, 0.0),
            -i,
            f"  {mean:.2f}",
            va="center",
            fontsize=10,
            color=DARK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            zorder=4,
        )
    centre = float(of["mean"].sel(map=CENTRE))
    axes.axvline(centre, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.axvline(0, color=DARK, linewidth=0.8)
    axes.set_yticks(range(0, -len(order), -1), [_named(found, kind) for kind in order], fontsize=10)
    right = max(float(np.nanmax(of["high"].fillna(of["mean"]))), 0.1) * 1.2
    axes.set_xlim(min(0.0, float(of["low"].fillna(of["mean"]).min()) * 1.1), right)
    axes.set_xlabel("NSS, 0 is chance; 95% of draws of people", fontsize=9)
    told = found.attrs
    axes.set_title(
        f"{told['people']} people, {told['pictures']} pictures, {told['fixations']:,} fixations",
        fontsize=10,
        color=DARK,
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _scores(figure: Any, found: xr.Dataset) -> None:
    """A panel a metric: both groups with each other, within, and on different pictures."""
    metrics = [str(name) for name in found["metric"].values]
    rows = (("between", "A with B", OURS), ("within_a", "within A", THEIRS), ("within_b", "within B", THEIRS))
    rows = (*rows, ("other", "other pictures", GREY))
    columns = min(5, len(metrics))
    grid = figure.subplots(-(-len(metrics) // columns), columns, squeeze=False)
    for axes, name in zip(grid.flat, metrics):
        of = found.sel(metric=name)
        for i, (key, _, colour) in enumerate(rows):
            value, low, high = (float(of[f"{key}{suffix}"]) for suffix in ("", "_low", "_high"))
            if np.isfinite([low, high]).all():
                axes.plot([low, high], [-i, -i], color=colour, linewidth=2.5, alpha=0.5, solid_capstyle="round")
            if np.isfinite(value):
                axes.plot([value], [-i], "o", color=colour, markersize=8)
        p = float(of["p"])
        told = "" if np.isnan(p) else f"   p = {p:.3f}"
        lower = "  (lower is alike)" if name in found.attrs["lower"] else ""
        axes.set_title(f"{name.replace('_', ' ')}{lower}{told}", fontsize=9, color=DARK, loc="left")
        axes.set_ylim(-len(rows) + 0.5, 0.5)
        first = axes in grid[:, 0]
        axes.set_yticks(range(0, -len(rows), -1), [label if first else "" for _, label, _ in rows], fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.2)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    told = found.attrs
    figure.suptitle(
        f"{told['people_a']} in A, {told['people_b']} in B, {told['pictures']} pictures; lines hold 95% of draws",
        fontsize=11,
        color=DARK,
    )
