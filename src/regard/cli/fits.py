"""`regard steer --list`: which interventions fit a model, by asking each of them on the model.

Each is made by its `fit` for a short input of the kind that the model takes, and the model runs on it, a step or two,
with and without. What a method refuses, it refuses here as anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import catalog
from ..call import UnreachableAttention
from ..data import paragraph
from ..data.scenes import Dials, render, sample
from ..interventions import painted
from ..loading import Loaded, load, parameters
from ..prediction import writes
from ..seam import intervene
from .inputs import hear, prepare, written
from .sound import Sound

STEPS = 2  # tokens, or steps of painting
LETTERS = 160  # of a text, at most
RATE, SECONDS = 16_000, 1  # of a sound
PAINTED = ("a red circle and a blue star", "a red circle and a green star")
QUOTED = 60  # letters of what a message quotes


@dataclass(frozen=True)
class Asked:
    """What became of a method on a model. why: its refusal, "" where it fits.

    changed: whether what the model gave differed. needs: what `fit` finds first. seconds: of processor time,
    to find it.
    """

    method: str
    why: str = ""
    changed: bool = False
    needs: str = ""
    seconds: float = 0.0


def listing(
    name: str | None, methods: Sequence[str] = (), *, trust_remote_code: bool = False, progress: Console | None = None
) -> Group:
    """Without a model all interventions there are; with one those that fit it, and why the others do not.

    methods: to ask these alone.
    """
    names = [method.replace("-", "_") for method in methods] or catalog.methods("interventions")
    for method in names:
        catalog.method("interventions", method)  # one that is none is found before a model is loaded
    if name is None:
        return Group(_known(names))
    progress = progress or Console(quiet=True)
    with progress.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    inputs = probe(loaded, name)
    found = []
    columns = SpinnerColumn(), TextColumn("asking {task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=progress, transient=True) as shown:
        task = shown.add_task("")
        for one in asked(loaded, inputs, _announced(names, lambda said: shown.update(task, description=said))):
            found.append(one)
    return Group(_fitting(type(loaded.model).__name__, [f for f in found if not f.why]), *_refused(found))


def _announced(names: Sequence[str], say: Any) -> Iterator[str]:
    for name in names:
        say(_key(name))
        yield name


def probe(loaded: Loaded, name: str) -> dict[str, Any]:
    """Something short for a model to read, see, hear or paint."""
    model, processor = loaded
    if hasattr(processor, "scheduler"):
        return {"prompt": list(PAINTED), "num_inference_steps": STEPS}
    if model.main_input_name == "input_features":
        chance = np.random.default_rng(0).normal(size=RATE * SECONDS) / 10
        return hear(loaded, name, Sound(chance.astype(np.float32), RATE), False)
    sees = any("pixel_values" in parameters(part) for part in model.modules() if hasattr(part, "config"))
    picture = render(sample(Dials(), 0, 0)).image(0) if sees else None
    text = None if sees else paragraph()[:LETTERS].rpartition(" ")[0]
    return prepare(loaded, name, text, picture, True, STEPS)[0]


def asked(loaded: Loaded, inputs: dict[str, Any], names: Iterator[str] | Sequence[str]) -> Iterator[Asked]:
    """Of each method, by its name, what became of it; the model is left as it was."""
    model, processor = loaded
    plain = _gives(loaded, inputs)
    for name in names:
        method = catalog.method("interventions", name)
        began = time.process_time()
        try:
            made = method.fit(model, inputs, processor)
            seconds = time.process_time() - began
            if callable(made) and not writes(model):
                raise ValueError(f"{_key(name)} changes words that are said, and {type(model).__name__} says none")
            changed = not torch.equal(plain, _gives(loaded, inputs, made))
            yield Asked(name, changed=changed, needs=method.needs, seconds=seconds)
        except (ValueError, NotImplementedError, UnreachableAttention) as error:
            yield Asked(name, _brief(str(error)))
        except Exception as error:  # of no refusal; the others are listed all the same
            yield Asked(name, f"it broke off, which it should not: {type(error).__name__}: {_brief(str(error))}")


def _gives(loaded: Loaded, inputs: dict[str, Any], made: Any = None) -> Tensor:
    """Scores of the next tokens, or what else a model gives, under a method."""
    model, pipeline = loaded
    with torch.inference_mode(), nullcontext() if made is None or callable(made) else intervene(model, made):
        if "prompt" in inputs:
            told = {"callback_on_step_end": made.on_step_end} if hasattr(made, "on_step_end") else {}
            return torch.from_numpy(painted(pipeline, inputs, **told))
        if not writes(model):
            given = model(**inputs)
            return next(value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point())
        options = {"logits_processor": [made]} if callable(made) else {}
        return written(loaded, inputs, STEPS, min_new_tokens=STEPS, **options).scores


def _brief(message: str) -> str:
    """A refusal in one line, with long quotes cut."""
    parts = " ".join(message.split()).split("'")
    for i in range(1, len(parts) - 1, 2):
        if len(parts[i]) > QUOTED:
            parts[i] = f"{parts[i][: QUOTED - 20]} ... {parts[i][-15:]}"
    return "'".join(parts)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "intervention")
    return table


def _known(names: Sequence[str]) -> Table:
    table = _table("intervention", "what it does", "finds first")
    for name in names:
        method = catalog.method("interventions", name)
        table.add_row(_key(name), Text((method.__doc__ or "").strip().splitlines()[0]), Text(method.needs or "-"))
    return table


def _fitting(kind: str, found: Sequence[Asked]) -> Table | Text:
    if not found:
        return Text(f"No intervention fits {kind}.")
    table = _table("intervention", "finds first", "in", "on a short input")
    for one in found:
        took = f"{one.seconds:.1f} s" if one.needs else "-"
        table.add_row(
            _key(one.method), Text(one.needs or "-"), took, "changes what comes" if one.changed else "changes nothing"
        )
    return table


def _refused(found: Sequence[Asked]) -> list[Table | Text]:
    if not any(one.why for one in found):
        return []
    table = _table("intervention", "does not fit, because")
    for one in found:
        if one.why:
            table.add_row(_key(one.method), Text(one.why.removeprefix(f"{_key(one.method)}: ")))
    return [Text(), table]
