"""Where people looked on the picture (or text) of a recording, in time, and how well maps of the model tell it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from .. import gaze, report
from ..cli import look
from ..cli.inputs import InputError
from ..data.loaders import GazeData, Scanpath
from ..gaze.auc_judd import auc_judd
from ..gaze.cc import cc
from ..gaze.compare_pictures import SIDE, enlarged_map, model_maps, on_picture
from ..gaze.fixation_map import fixation_map
from ..gaze.kl import kl
from ..gaze.nss import nss
from ..gaze.score import EVEN, WIDE, on_screen
from .jobs import PLAIN, Job
from .readings import UNTIMED, reading
from .steps import Name, Upload
from .work import Desk

MOST = 20_000  # fixations that a page draws
Side = Annotated[int, Field(strict=True, ge=1, le=100_000)]


class Gazed(BaseModel):
    """A file of fixations on the picture of a recording. screen: of what x and y are in; None: the picture's own."""

    recording: Name
    upload: Upload
    stimulus: Annotated[str, Field(max_length=1000)] | None = None
    screen: tuple[Side, Side] | None = None
    placed: Literal["centre", "fit", "fill"] | None = None


def gazed(desk: Desk, job: Job, asked: Gazed) -> None:
    """Tell the fixations, trial by trial, and then the model's maps with their scores."""
    again = desk.again(asked.recording)
    picture = again.ready.picture
    if picture is None and again.ready.text:
        reading(job, again, desk.file(asked.upload))
        return
    if picture is None:
        raise InputError("fixations are laid over a picture or a text: look at one first")
    read = _read(desk.file(asked.upload), asked.screen or picture.size)
    stimulus = asked.stimulus if asked.stimulus in read.stimuli else read.stimuli[0]
    trials, paths, left = [], [], MOST
    for trial in read.of(stimulus):
        path_ = on_picture(trial.scanpath, picture.size, asked.placed)
        durations = np.full(len(path_), UNTIMED) if path_.durations is None else path_.durations
        starts = np.cumsum(durations) - durations if trial.starts is None else trial.starts - trial.starts[0]
        kept = slice(0, left)
        left -= min(left, len(path_))
        shares = path_.places[kept] / picture.size
        told = {"subject": trial.subject, "trial": trial.trial, "places": shares.tolist()}
        trials.append(told | {"durations": durations[kept].tolist(), "starts": starts[kept].tolist()})
        there = on_screen(path_)
        if there.any():
            paths.append(Scanpath(path_.places[there] / picture.size * SIDE, (SIDE, SIDE)))
    beside = sum(len(one["places"]) for one in trials) - sum(map(len, paths))
    job.tell(
        "gaze",
        summary=read.summary().split("\n"),
        stimuli=read.stimuli[:1000],
        stimulus=stimulus,
        beside=beside,
        picture=report.picture(look.enlarged(picture)),
        trials=trials,
    )
    if not paths:
        raise InputError(
            "no fixation lies on the picture; say how large the screen was, and how the picture stood on it"
        )
    job.tell("progress", what="looking at the picture")
    notes: dict[str, str] = {}
    try:
        maps = model_maps(again.loaded.model, again.loaded.processor, picture, notes)
    except PLAIN as error:
        job.tell("maps", maps=[], heads=None, notes=[str(error)])
        return
    job.check()
    seen = fixation_map(paths, (SIDE, SIDE), sigma=(SIDE * WIDE, SIDE * WIDE))
    whole = Scanpath(np.concatenate([path.places for path in paths]), (SIDE, SIDE))
    layers = 1 + max(kind[0] for kind in maps if isinstance(kind, tuple))
    heads = 1 + max(kind[1] for kind in maps if isinstance(kind, tuple))
    table: list[list[float | None]] = [[None] * heads for _ in range(layers)]
    told = [{"name": "people", "map": _short(seen), "scores": {}}]
    for kind, shown in maps.items():
        large = enlarged_map(shown)
        scores = _scores(large, whole, seen)
        name: Any = list(kind) if isinstance(kind, tuple) else kind
        if isinstance(kind, tuple):
            table[kind[0]][kind[1]] = scores["nss"]
        told.append({"name": name, "map": _short(shown), "scores": scores})
    job.tell("maps", maps=told, heads=table, notes=list(notes.values()))


def _read(data: bytes, screen: tuple[int, int]) -> GazeData:
    """A file of fixations; where it does not say who looked, or at what, it is one person, or the picture."""
    names = {"stimulus": "the picture", "subject": "one person"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fixations.{'asc' if data[:2] == b'**' else 'csv'}"
        path.write_bytes(data)
        for known in ({}, {"stimulus"}, {"subject"}, set(names)):
            try:
                return gaze.read(path, screen=screen, **{name: names[name] for name in known})
            except ValueError as error:
                why = error
                if "no column says wh" not in str(error):
                    break
    raise InputError(str(why).replace(str(path), "the file").replace(path.name, "the file"))


def _scores(shown: np.ndarray, path: Scanpath, seen: np.ndarray) -> dict[str, float]:
    """As `regard.gaze.compare_pictures` judges a map of one picture."""
    if np.ptp(shown) == 0:  # it says nothing
        return {"nss": 0.0, "auc_judd": 0.5}
    even = EVEN / shown.size + (1 - EVEN) * shown / shown.sum()
    return {"nss": nss(shown, path), "auc_judd": auc_judd(shown, path), "cc": cc(shown, seen), "kl": kl(even, seen)}


def _short(shown: np.ndarray) -> list[list[float]]:
    most = float(shown.max()) or 1.0
    return (shown / most).round(3).tolist()
