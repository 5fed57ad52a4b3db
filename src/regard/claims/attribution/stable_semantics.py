"""Captions of two objects, painted with their maps: does a chunk's map show the object that it names?

On Zawar et al., StableSemantics (arXiv:2406.13735), who compare maps with what open-vocabulary segmenters find in the
pictures. The data set is harvested from the zoo's painter, and read back. Judged are pictures in which the zoo's viewer
finds both pairs of colour and shape; truth are the pixels of a chunk's colour. Controls: the map of the other chunk,
and maps of the first denoising step alone, when there is little but noise to look at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ... import loading
from ...attribution.stable_semantics import METADATA, harvest
from ...catalog import Finding, Premise
from ...data.scenes import caption
from ...evaluation.localisation import iou_score, pointing_game_score
from ...zoo.recipes import painter, viewer
from .._measure import mean

SCALES = "small", "large"
EXPECTED = (
    "as many patches as an object has, chosen by the map of its chunk, overlap it by an intersection over union of at "
    "least 0.4, and at least three times that of the other chunk's map, by two standard errors; the map's maximum lies "
    "on the object in at least 70%; maps of the first step alone overlap it by at least 0.05 less, and by two standard "
    "errors"
)
CAPTIONS, PICTURES = {"small": 36, "large": 300}, 3
FEWEST = 40  # pictures to judge


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap of the maps with the rendered objects."""
    said = captions(CAPTIONS[scale], seed)
    pipeline = loading.load("painter").processor
    pipeline.set_progress_bar_config(disable=True)
    with TemporaryDirectory() as folder:
        rows, first = (
            _read(harvest(pipeline, said, Path(folder) / name, per_caption=PICTURES, seed=seed, **options))
            for name, options in (("all", {}), ("first", {"steps": [0]}))
        )
    judged = [i for i, shown in enumerate(confirmed([row["image"] for row in rows], said)) if shown]
    found: list[NDArray[np.float64]] = []  # of each picture, the mean over its chunks
    for i in judged:
        each = []
        for which, mask in enumerate(masks(rows[i])):
            maps = np.stack([rows[i]["maps"][which], rows[i]["maps"][1 - which], first[i]["maps"][which]])
            if mask.any():
                hit = pointing_game_score(maps[:1], mask[None])
                each.append(np.concatenate([iou_score(maps, np.stack([mask] * 3)), hit, [mask.mean()]]))
        if each:
            found.append(np.mean(each, 0))
    own, other, early, hit, chance = np.transpose(found or [np.full(5, np.nan)])
    times, later = mean(own - 3 * other), mean(own - early)
    holds = own.mean() >= 0.4 and times.above() and hit.mean() >= 0.7 and later.value >= 0.05 and later.above()
    measured = (
        f"intersection over union {mean(own):.2f} with the chunk's own object, {mean(other):.2f} of the other "
        f"chunk's map, {mean(early):.2f} of the first step's ({later:.2f} less); the maximum lies on the object in "
        f"{mean(hit):.1%}, of which there is {chance.mean():.0%} ({len(found)} pictures of two chunks)"
    )
    premises = [
        Premise(
            "pictures that show what the caption says",
            f"{FEWEST} or more",
            f"{len(judged)} of {len(rows)}",
            len(judged) >= FEWEST,
        )
    ]
    return Finding(
        holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, [rows[i] for i in judged[:6]])
    )


def captions(n: int, seed: int) -> list[str]:
    """Of two objects of different colours."""
    dials = replace(painter.DIALS, objects=(2, 2))
    drawn = (painter.draw(viewer.HELD_OUT + seed, i, dials) for i in count())
    return [caption(scene) for scene in islice((s for s in drawn if len({o.colour for o in s.objects}) == 2), n)]


def confirmed(pictures: Sequence[NDArray[np.uint8]], said: Sequence[str]) -> list[bool]:
    """Whether the two labels that the viewer finds likeliest are those of the caption, of each picture."""
    model, processor = loading.load("viewer")
    with torch.inference_mode():
        inputs = processor(images=[Image.fromarray(one) for one in pictures], return_tensors="pt")
        top = model(**inputs).logits.topk(2).indices
    wanted = [{chunk.split(" ", 1)[1] for chunk in text.split(" and ")} for text in said for _ in range(PICTURES)]
    return [{viewer.PAIRS[i] for i in row} == pairs for row, pairs in zip(top.tolist(), wanted)]


def masks(row: dict[str, Any]) -> list[NDArray[np.bool_]]:
    """Patches of which more than half shows the colour of each chunk."""
    side = painter.SIZE // painter.PATCH
    colours = [chunk.split()[0] for chunk in row["chunks"]]
    pixels = painter.shown(row["image"], colours)
    return [pixels[c].reshape(side, painter.PATCH, side, painter.PATCH).mean((1, 3)) > 0.5 for c in colours]


def _read(folder: Path) -> list[dict[str, Any]]:
    """Rows with their pictures, and maps that can be compared."""
    rows = []
    for line in (folder / METADATA).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["image"] = np.array(Image.open(folder / row["file_name"]))
        levels = [np.array(Image.open(folder / name), float) / 255 for name in row["maps_file_names"]]
        row["maps"] = [low + (high - low) * one for one, low, high in zip(levels, row["lows"], row["highs"])]
        rows.append(row)
    return rows


def _draw(rows: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots(3, len(rows))
    for line, row in zip(axes.T, rows):
        line[0].imshow(row["image"])
        for axis, one, chunk in zip(line[1:], row["maps"], row["chunks"]):
            axis.imshow(one, cmap="magma")
            axis.set_title(chunk, fontsize=8)
        for axis in line:
            axis.set_axis_off()
