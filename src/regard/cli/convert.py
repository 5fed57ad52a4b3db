"""`regard convert`: a trained model with another mechanism, and what it lost."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import conversion
from ..data import paragraph
from ..loading import load
from ..mechanisms import operators
from .inputs import InputError, read_text
from .printed import Printed


def convert(
    name: str,
    key: str,
    *,
    steps: int,
    data: Path | None,
    knobs: Sequence[str],
    out: Path | None,
    seed: int,
    console: Console,
) -> Printed:
    """Convert, train, save, and say what was lost before and after; what cannot be saved is refused before the work."""
    function = conversion.known(key)
    chosen = parsed(function, knobs)
    if out is not None:
        conversion.refuse_other(out)
    text = read_text(None, data, "--data")
    with console.status(f"loading {name}"):
        original = load(name)
    looks = getattr(original.model, "main_input_name", "") == "pixel_values"
    if steps and text is None and not looks:
        raise InputError("to train it on, give a text with --data")
    torch.manual_seed(seed)
    of = conversion.items(original, text if text is not None or looks else 4 * f"{paragraph()}\n", seed=seed)
    with console.status("converting"):
        before = conversion.predicted(original.model, of)
        found = {"original": conversion.lost(original.model, before, of)}
        copied = copy.deepcopy(original.model)
        model = conversion.convert(copied, key, inputs=conversion.example(original), **chosen)
        found["converted"] = conversion.lost(model, before, of)
    if steps:
        columns = (TextColumn("training, loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=steps, loss=float("nan"))
            conversion.train(
                model,
                original.model,
                of,
                steps,
                key=key,
                seed=seed,
                progress=lambda step, loss: bar.update(task, completed=step, loss=loss),
            )
        found[f"after {steps:,} steps"] = conversion.lost(model, before, of)
    table = Table(title=f"{name} with {key}", title_justify="left", header_style="bold", title_style="bold")
    for head in ("", *(["loss, nats a token"] if of.text else []), "divergence, nats", "same prediction"):
        table.add_column(head, justify="left" if not head else "right")
    for label, lost in found.items():
        loss = [f"{lost.loss:.3f}"] if of.text else []
        table.add_row(label, *loss, f"{lost.divergence:.3f}", f"{lost.agreement:.1%}")
    what = f"{len(of.held_out)} {'pieces of text' if of.text else 'generated scenes'} that it was not trained on"
    printed = Printed([table], [f"divergence and predictions are from the original's, on {what}"])
    spec = getattr(operators().get(key.replace("-", "_")), "spec", None)
    if of.text and spec is not None and spec.ahead:
        printed.lines.append("which keys a token meets depends on later tokens too: no loss of a model of language")
    if out is not None:
        measured = {label: {k: v for k, v in lost._asdict().items() if v == v} for label, lost in found.items()}
        about = {"steps": steps, "seed": seed, "measured": measured}
        conversion.save(model, out, name=name, key=key, knobs=chosen, about=about)
        printed.lines.append(f'saved in {out}; load it again by regard.conversion.restored("{out}")')
    return printed


def parsed(function: Callable[..., Any], knobs: Sequence[str]) -> dict[str, Any]:
    """Knobs of a conversion from NAME=VALUE: numbers, true, false, null, or words."""
    _, *rest = inspect.signature(function).parameters.values()
    names = [p.name for p in rest if p.kind is not p.VAR_KEYWORD and p.name != "inputs"]
    found = {}
    for knob in knobs:
        name, equals, value = knob.partition("=")
        if not equals or name not in names:
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise InputError(f"--knob {knob}: write one of {', '.join(names)}, = and a value{hint}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    if problem := conversion.misgiven(function, found):
        raise InputError(f"--knob: {problem}")
    return found
