"""`regard steer`: what a model says, and what it says under interventions."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .. import catalog
from ..loading import Loaded, load
from ..prediction import writes
from ..seam import intervene
from .inputs import InputError, generated, open_picture, prepare, read_text

WARM = 2  # tokens generated before the clock runs: what is done once is done then


def steer(
    name: str,
    methods: Sequence[str],
    *,
    knobs: Sequence[str] = (),
    text: str | None = None,
    file: Path | None = None,
    image: Path | None = None,
    generate: int = 32,
    truncate: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Group:
    """What a model says before and after, the words that differ marked, and the time that a token takes."""
    console = console or Console(quiet=True)
    chosen = {method: catalog.method("interventions", method.replace("-", "_")) for method in methods}
    turned = parsed(chosen, knobs)
    text, picture = read_text(text, file), open_picture(image, console)  # bad input is found before a model is loaded
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    model = loaded.model
    if not writes(model):
        raise InputError(f"steer shows what a model says, and {type(model).__name__} does not generate")
    inputs, _ = prepare(loaded, name, text, picture, truncate, generate)

    began = time.perf_counter()
    with console.status("fitting"):
        made = [method.fit(model, inputs, loaded.processor, **turned[key]) for key, method in chosen.items()]
    fitted = time.perf_counter() - began
    inside = [thing for thing in made if not callable(thing)]
    after: dict[str, Any] = {"logits_processor": [thing for thing in made if callable(thing)]}
    with intervene(model, *inside):
        pass  # a model that one does not fit is refused before anything is generated
    with console.status("generating"):
        plain, plain_cost = _said(loaded, inputs, generate, nullcontext)
        steered, steered_cost = _said(loaded, inputs, generate, lambda: intervene(model, *inside), **after)
    return shown(plain, steered, plain_cost, steered_cost, fitted)


def parsed(methods: dict[str, Any], knobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The knobs of each method, from `name=value` for all that have one of this name or `method.name=value`."""
    found: dict[str, dict[str, Any]] = {key: {} for key in methods}
    has = {key: _knobs(method) for key, method in methods.items()}
    for knob in knobs:
        left, equals, value = knob.partition("=")
        if not equals:
            raise InputError(f"--knob {knob}: write a name and a value, such as {_example(has)}")
        owner, _, name = left.rpartition(".")
        owners = [key for key in methods if name in has[key] and owner in ("", key)]
        if not owners:
            near = difflib.get_close_matches(name, [k for some in has.values() for k in some], n=3)
            listed = "; ".join(f"{key}: {', '.join(some)}" for key, some in has.items())
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise InputError(f"--knob {knob}: no such knob{hint}; there are, of {listed}")
        for key in owners:
            found[key][name] = _value(knob, value, has[key][name])
    return found


def _knobs(method: Any) -> dict[str, Any]:
    """Keyword-only parameters of what makes a method, and their types."""
    hints = get_type_hints(method.__init__)
    parameters = inspect.signature(method).parameters.values()
    return {p.name: hints.get(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _value(knob: str, text: str, kind: Any) -> float | tuple[float, ...]:
    several = get_origin(kind) in (Collection, Sequence)
    kinds = get_args(kind) or (kind,)
    number = next((n for n in (int, float) if n in kinds), None)
    if number is None:
        raise InputError(f"--knob {knob}: it can be given from Python only")
    try:
        numbers = tuple(number(part) for part in (text.split(",") if several else [text]))
    except ValueError:
        what = "a whole number" if number is int else "a number"
        raise InputError(f"--knob {knob}: give {what}{', or several with commas' if several else ''}") from None
    return numbers if several else numbers[0]


def _example(has: dict[str, dict[str, Any]]) -> str:
    return next((f"{name}=0.5" for some in has.values() for name in some), "alpha=0.5")


def _said(loaded: Loaded, inputs: dict[str, Any], steps: int, around: Any, **options: Any) -> tuple[str, float]:
    """The text that a model generates, and the seconds that a token takes."""
    decoder = bool(getattr(loaded.model.config, "is_encoder_decoder", False))
    begin = 1 if decoder else inputs["input_ids"].shape[1]
    with torch.inference_mode():
        with around():
            generated(loaded, inputs, min(WARM, steps), **options)
        began = time.perf_counter()
        with around():
            ids = generated(loaded, inputs, steps, **options)
        seconds = time.perf_counter() - began
    said = ids[0, begin:]
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return tokenizer.decode(said, skip_special_tokens=True), seconds / max(1, len(said))


def shown(before: str, after: str, before_cost: float, after_cost: float, fitted: float) -> Group:
    """A table of both texts, with the words that only one has marked, and what a token took."""
    table = Table(box=None, header_style="bold", expand=True, padding=(0, 2, 0, 0))
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*marked(before, after))
    ratio = after_cost / before_cost
    cost = f"{before_cost * 1e3:.1f} ms a token before, {after_cost * 1e3:.1f} after: {ratio:.2f} times"
    if fitted > 0.01:
        cost += f"; fitting took {fitted:.1f} s"
    return Group(table, Text(), Text(cost if before != after else f"nothing changed; {cost}"))


def marked(before: str, after: str) -> tuple[Text, Text]:
    """Both texts, words that differ between brackets and coloured."""
    a, b = before.split(), after.split()
    left, right = Text(), Text()
    for kind, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for text, words, style in ((left, a[i:j], "bold red"), (right, b[k:n], "bold green")):
            if words:
                same = kind == "equal"
                text.append(" " * bool(text) + ("" if same else "["))
                text.append(" ".join(words), style="" if same else style)
                text.append("" if same else "]")
    return left, right
