"""`regard steer`: what a model says or paints, and what it does under interventions."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .. import catalog
from ..files import written_aside
from ..interventions import painted
from ..loading import Loaded, load
from ..prediction import writes
from ..seam import intervene
from .inputs import InputError, generated, open_picture, png, prepare, read_text, writable

TIMED = 8  # tokens of a round of measuring
ROUNDS = (10, 50)  # at least and at most
SECONDS = 20.0  # after which no round begins beyond the least
SURE = 0.1  # of the ratio: where twice its standard error is more, it is not told


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
    out: Path | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Group:
    """What a model says before and after, the words that differ marked, and the time that a token takes.

    Of a model that paints: the pictures that it paints of each line of the text, written to `out`, and how they differ.
    """
    console = console or Console(quiet=True)
    chosen = {method: catalog.method("interventions", method.replace("-", "_")) for method in methods}
    turned = parsed(chosen, knobs)
    text, picture = read_text(text, file), open_picture(image, console)  # bad input is found before a model is loaded
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    model = loaded.model
    if hasattr(loaded.processor, "scheduler"):
        if picture is not None:
            raise InputError(f"--image: {type(model).__name__} paints pictures, and is given words only")
        if out is None:
            raise InputError(f"{type(model).__name__} paints pictures: name a folder for them with --out")
        if text is None:
            raise InputError(f"{type(model).__name__} paints what --text or --file says, one picture a line")
        return _painted(loaded, chosen, turned, text, out, console)
    if out is not None:
        raise InputError(f"--out is for models that paint, and {type(model).__name__} does not")
    if not writes(model):
        raise InputError(f"steer shows what a model says, and {type(model).__name__} does not generate")
    inputs, _ = prepare(loaded, name, text, picture, truncate, generate)

    began = time.process_time()
    with console.status("fitting"):
        made = [
            method.fit(model, inputs, loaded.processor, **_finer(method, picture), **turned[key])
            for key, method in chosen.items()
        ]
    fitted = time.process_time() - began
    inside = [thing for thing in made if not callable(thing)]
    after: dict[str, Any] = {"logits_processor": [thing for thing in made if callable(thing)]}
    with intervene(model, *inside):
        pass  # a model that one does not fit is refused before anything is generated
    with console.status("generating"):
        plain = _said(loaded, inputs, generate, nullcontext)
        steered = _said(loaded, inputs, generate, lambda: intervene(model, *inside), **after)
    with console.status("measuring"):
        costs = measured(
            lambda: _said(loaded, inputs, generate, nullcontext, min_new_tokens=generate),
            lambda: _said(
                loaded, inputs, generate, lambda: intervene(model, *inside), min_new_tokens=generate, **after
            ),
        )
    return shown(plain, steered, costs / generate, fitted)


def _painted(
    loaded: Loaded,
    chosen: dict[str, Any],
    turned: dict[str, dict[str, Any]],
    text: str,
    out: Path,
    console: Console,
) -> Group:
    """Pictures before and after in a folder, from the same noise, and how far they are apart."""
    model, pipeline = loaded
    said = [line.strip() for line in text.splitlines() if line.strip()]
    names = {when: [f"{i}-{when}.png" for i in range(1, len(said) + 1)] for when in ("before", "after")}
    writable(out, *(name for some in names.values() for name in some))
    inputs = {"prompt": said}
    began = time.process_time()
    with console.status("fitting"):
        made = [method.fit(model, inputs, pipeline, **turned[key]) for key, method in chosen.items()]
    fitted = time.process_time() - began
    if says := [key for key, thing in zip(chosen, made) if callable(thing)]:
        raise InputError(f"{says[0]} changes words that are said, and {type(model).__name__} paints")
    with intervene(model, *made):
        pass

    def after_step(pipe: Any, step: int, when: Any, kept: dict[str, Any]) -> dict[str, Any]:
        for thing in made:
            if hasattr(thing, "on_step_end"):
                kept = thing.on_step_end(pipe, step, when, kept)
        return kept

    with console.status("painting"):
        took, pictures = [], []
        ways: list[tuple[Any, dict[str, Any]]] = [
            (nullcontext(), {}),
            (intervene(model, *made), {"callback_on_step_end": after_step}),
        ]
        for around, options in ways:
            start = time.process_time()
            with torch.inference_mode(), around:
                pictures.append(painted(pipeline, inputs, **options))
            took.append(time.process_time() - start)
    out.mkdir(parents=True, exist_ok=True)
    for some, files in zip(pictures, names.values()):
        for picture, name in zip(some, files):
            with written_aside(out / name) as draft:
                draft.write_bytes(png(Image.fromarray((255 * picture).round().astype(np.uint8))))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("text", "before", "after", "change"):
        table.add_column(name)
    apart = abs(pictures[1] - pictures[0]).mean((1, 2, 3))
    for line, before, after, much in zip(said, *names.values(), apart):
        table.add_row(Text(line), before, after, f"{much:.1%}" if much else "none")
    cost = f"written to {out}; {took[0]:.1f} s of processor time before, {took[1]:.1f} s after"
    cost += f"; fitting took {fitted:.1f} s" if fitted > 0.01 else ""
    return Group(table, Text(), Text(cost if apart.any() else f"nothing changed; {cost}"))


def _finer(method: Any, picture: Image.Image | None) -> dict[str, Any]:
    """The picture as it is, for a method that can look at it more closely than the model does."""
    wanted = picture is not None and "images" in inspect.signature(method.fit).parameters
    return {"images": [picture]} if wanted else {}


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
    return {
        p.name: get_type_hints(maker).get(p.name)
        for maker in (method.__init__, method.fit)
        for p in inspect.signature(maker).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def _value(knob: str, text: str, kind: Any) -> str | float | tuple[float, ...]:
    several = get_origin(kind) in (Collection, Sequence)
    kinds = get_args(kind) or (kind,)
    number = next((n for n in (int, float) if n in kinds), None)
    words = [word for word in kinds if isinstance(word, str)]
    if str in kinds or text in words:
        return text
    if number is None:
        what = f"give {' or '.join(words)}" if words else "it can be given from Python only"
        raise InputError(f"--knob {knob}: {what}")
    try:
        numbers = tuple(number(part) for part in (text.split(",") if several else [text]))
    except ValueError:
        what = "a whole number" if number is int else "a number"
        raise InputError(f"--knob {knob}: give {what}{', or several with commas' if several else ''}") from None
    return numbers if several else numbers[0]


def _example(has: dict[str, dict[str, Any]]) -> str:
    return next((f"{name}=0.5" for some in has.values() for name in some), "alpha=0.5")


def _said(loaded: Loaded, inputs: dict[str, Any], steps: int, around: Any, **options: Any) -> str:
    """The text that a model generates."""
    decoder = bool(getattr(loaded.model.config, "is_encoder_decoder", False))
    begin = 1 if decoder else inputs["input_ids"].shape[1]
    with torch.inference_mode(), around():
        ids = generated(loaded, inputs, steps, **options)
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    return tokenizer.decode(ids[0, begin:], skip_special_tokens=True)


def measured(
    before: Callable[[], Any], after: Callable[[], Any], clock: Callable[[], float] = time.process_time
) -> NDArray[np.float64]:
    """Seconds of processor time that each takes, in turns, the one and the other first. [round, before and after]

    Both have run once. What else the machine does counts for neither, and a change of its pace for both.
    """
    rounds: list[list[float]] = []
    began = time.monotonic()
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.monotonic() - began < SECONDS):
        took = [0.0, 0.0]
        for i in (0, 1) if len(rounds) % 2 == 0 else (1, 0):
            start = clock()
            (before, after)[i]()
            took[i] = clock() - start
        rounds.append(took)
        if len(rounds) >= ROUNDS[0] and told(np.array(rounds)) is not None:
            break
    return np.array(rounds)


def told(costs: NDArray[np.float64]) -> tuple[float, float] | None:
    """After over before, the median of rounds, and twice its standard error; None where that is too much."""
    if (costs <= 0).any():  # the clock is too coarse
        return None
    each = np.log(costs[:, 1] / costs[:, 0])
    middle = np.median(each)
    spread = 1.48 * np.median(abs(each - middle))  # of a normal distribution, its standard deviation
    ratio, unsure = float(np.exp(middle)), float(2 * 1.25 * spread / len(each) ** 0.5)
    return (ratio, ratio * unsure) if unsure <= SURE else None


def shown(before: str, after: str, costs: NDArray[np.float64], fitted: float) -> Group:
    """A table of both texts, with the words that only one has marked, and what a token took."""
    table = Table(box=None, header_style="bold", expand=True, padding=(0, 2, 0, 0))
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*marked(before, after))
    ms = np.median(costs, axis=0) * 1e3
    cost = f"{ms[0]:.1f} ms of processor time a token before, {ms[1]:.1f} after: "
    if (found := told(costs)) is not None:
        cost += f"{found[0]:.2f} ± {found[1]:.2f} times, over {len(costs)} rounds"
    else:
        cost += f"how many times that is cannot be told, {len(costs)} rounds differ too much"
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
