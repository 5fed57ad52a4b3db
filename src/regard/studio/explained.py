"""What a prediction rests on: maps by methods side by side, and what the prediction does as parts are taken away."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import xarray as xr
from pydantic import BaseModel, Field

from .. import catalog, report
from ..attribution import attribute
from ..cli import look
from ..cli.explain import Part, as_given, named_target, shown_parts, spectrogram
from ..cli.inputs import InputError
from ..evaluation.judgement import curves
from ..prediction import predict
from .jobs import PLAIN, Job
from .steps import Name

if TYPE_CHECKING:
    from .work import Again, Desk

MAP = 64  # blocks a side of a map of pixels
STEPS, DRAWS = 20, 5  # points of a curve, and random maps
QUICK = {"steps": 2}  # with which it is found out whether a method fits


class Asked(BaseModel):
    """What a prediction rests on, by one or two methods of attribution."""

    recording: Name
    methods: Annotated[list[Name], Field(max_length=2)] = []
    target: Name | None = None  # a class, or a text of one token; None for the model's own
    # of what was generated, the token that is explained
    word: Annotated[int, Field(strict=True, ge=0, le=100_000)] | None = None


def fitting(desk: Desk, job: Job, asked: Asked) -> None:
    """Tell which methods can be had of this prediction: each is asked, in as few steps as it can do."""
    again = _again(desk, job, asked)
    fits: list[str] = []
    others: dict[str, str] = {}
    for name in catalog.methods("attribution"):
        job.check()
        job.tell("progress", what=f"trying {name}")
        method = catalog.method("attribution", name)
        first, *rest = inspect.signature(method).parameters
        if first != "model":
            others[name] = "it is of models that paint"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # so few steps are too few
                few = {k: v for k, v in QUICK.items() if k in rest}
                attribute(again.loaded.model, again.inputs, method=name, **few)
            fits.append(name)
        except PLAIN as error:
            others[name] = str(error)
    job.tell("methods", fits=fits, others=others)


def explain(desk: Desk, job: Job, asked: Asked) -> None:
    """Tell the scores of the words or pixels, method by method, and then their curves."""
    if not asked.methods:
        raise InputError("name a method")
    for method in asked.methods:
        catalog.method("attribution", method)  # a wrong name is told before anything runs
    again = _again(desk, job, asked)
    model, processor = again.loaded
    target: int | str | None = int(asked.target) if asked.target and asked.target.isdecimal() else asked.target or None
    if asked.word is not None:
        target = int(again.next)
    shown = as_given(again.ready.picture, again.inputs, processor) if again.ready.picture else None
    if "input_features" in again.inputs:
        shown = spectrogram(again.inputs["input_features"][0], again.inputs.get("attention_mask"))
    maps = []
    for method in asked.methods:
        job.check()
        job.tell("progress", what=f"asking {method}")
        takes = inspect.signature(catalog.method("attribution", method)).parameters
        knobs = {"progress": partial(_step, job, f"asking {method}")} if "progress" in takes else {}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            found = attribute(model, again.inputs, target, method=method, processor=processor, **knobs)
        parts = [_told(part) for part in shown_parts(found[0], shown)]
        told = {"method": method, "target": named_target(again.loaded, found[0], [again.given.text])}
        notes = list(dict.fromkeys(str(one.message) for one in warned))
        job.tell("scores", **told, notes=notes, score=float(found[0].score), parts=parts)
        maps.append(found)
    for method, found in zip(asked.methods, maps):
        tick = partial(_tick, job, f"taking parts away, as {method} says", itertools.count())
        judged = curves(model, again.inputs, found, steps=STEPS, draws=DRAWS, tick=tick).isel(batch=0)
        job.tell("curves", method=method, **{str(k): v.values.tolist() for k, v in judged.variables.items()})


def _step(job: Job, told: str, done: int, of: int) -> None:
    job.check()
    job.tell("progress", what=told, done=done, of=of)


def _tick(job: Job, told: str, done: Iterator[int]) -> None:
    _step(job, told, next(done), DRAWS + 1)


def _again(desk: Desk, job: Job, asked: Asked) -> Again:
    """The run of a recording, as far as the word that is asked for."""
    job.tell("progress", what="preparing")
    again = desk.again(asked.recording)
    model = again.loaded.model
    if hasattr(again.loaded.processor, "scheduler"):
        raise InputError(f"{type(model).__name__} makes no prediction of a class or token to explain")
    if asked.word is None:
        return again
    wrote = desk.answer(asked.recording, again).wrote
    if wrote is None or asked.word >= len(wrote.scores):
        raise InputError(f"there is no generated token {asked.word}")
    ids, end = wrote.ids[None], wrote.start + asked.word
    again.next = int(ids[0, end])
    if getattr(model.config, "is_encoder_decoder", False):
        if asked.word:
            with predict(model, again.inputs) as prediction:  # it begins as `generate` does
                begun = prediction.inputs["decoder_input_ids"]
            more = ids[:, wrote.start : end].to(begun)
            again.inputs = {**again.inputs, "decoder_input_ids": torch.cat([begun, more], 1)}
        return again
    again.inputs = {**again.inputs, "input_ids": ids[:, :end], "attention_mask": torch.ones_like(ids[:, :end])}
    return again


def _told(part: Part) -> dict[str, Any]:
    """Words with their scores; of a picture, means of blocks, at most `MAP` a side, and itself."""
    found = part.found
    if found.dims == ("token",):
        patch = found.image.values >= 0 if "image" in found.coords else np.zeros(found.size, bool)
        words = found.text.values.tolist() if "text" in found.coords else [str(i) for i in range(found.size)]
        return {
            "heading": part.heading,
            "words": [word for word, is_patch in zip(words, patch) if not is_patch],
            "values": found.values[~patch].tolist(),
        }
    blocks: xr.DataArray = found.coarsen(
        {dim: -(-found.sizes[dim] // MAP) for dim in found.dims},
        boundary="pad",
    ).mean()  # type: ignore[attr-defined]
    told: dict[str, Any] = {"heading": part.heading, "map": np.nan_to_num(blocks.values).tolist()}
    if part.picture is not None:
        told["picture"] = report.picture(look.enlarged(part.picture))
    return told
