"""`regard steer`: what a model says or paints, and what it does under interventions."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import catalog
from ..evaluation.word_error import word_error_rate
from ..files import written_aside
from ..interventions import after_steps, painted
from ..loading import Loaded, load
from ..prediction import chances, writes
from ..seam import intervene
from . import beside, sound
from .inputs import (
    InputError,
    drawn,
    hear,
    open_picture,
    png,
    prepare,
    read_text,
    seen,
    writable,
    written,
)

ROUNDS = (10, 50)  # at least and at most
SECONDS = 20.0  # after which no round begins beyond the least
SURE = 0.1  # of the ratio: where twice its standard error is more, it is not told
PAGE = (".html", ".htm")  # what a page ends in
CLASSES = 5  # the likeliest, that are shown


def steer(
    name: str,
    methods: Sequence[str],
    *,
    knobs: Sequence[str] = (),
    text: str | None = None,
    file: Path | None = None,
    image: Path | None = None,
    audio: Path | None = None,
    truth: str | None = None,
    generate: int = 32,
    truncate: bool = False,
    out: Path | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Group:
    """What a model says before and after, the words that differ marked, and the time that a token takes.

    Of a model that scores classes: how likely each is. Of a model that paints: the pictures that it paints of each line
    of the text, and how they differ. out: a page that shows both beside each other, and what changed in the heads (see
    `beside`); of a model that paints also a folder for its pictures. truth: what is said in a sound, to count the words
    that are wrong.
    """
    console = console or Console(quiet=True)
    chosen = {method: catalog.method("interventions", method.replace("-", "_")) for method in methods}
    if not chosen:
        raise InputError("name an intervention with --with; --list says which fit the model")
    turned = parsed(chosen, knobs)
    text, picture = read_text(text, file), open_picture(image, console)  # bad input is found before a model is loaded
    heard = sound.read(audio) if audio is not None else None
    if truth is not None and (heard is None or not truth.split()):
        raise InputError("--truth is what is said in a sound: give both, the sound with --audio")
    page = out if out is not None and out.suffix in PAGE else None
    if page is not None:
        writable(page.parent, page.name)
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    model = loaded.model
    about = beside.About(name, type(model).__name__, {key: turned[key] for key in chosen})
    if hasattr(loaded.processor, "scheduler"):
        if picture is not None or heard is not None:
            raise InputError(
                f"{'--image' if heard is None else '--audio'}: {type(model).__name__} paints pictures, and is given "
                f"words only"
            )
        if out is None:
            raise InputError(f"{type(model).__name__} paints pictures: name a folder or a page for them with --out")
        if text is None:
            raise InputError(f"{type(model).__name__} paints what --text or --file says, one picture a line")
        return _painted(loaded, about, chosen, turned, text, out, console)
    if out is not None and page is None:
        raise InputError(
            f"--out is a page, such as page.html; a folder is for models that paint, and {type(model).__name__} does "
            f"not"
        )
    says = writes(model)
    if heard is not None or model.main_input_name == "input_features":
        inputs = hear(loaded, name, heard, text is not None or picture is not None)
    else:
        inputs, _ = prepare(loaded, name, text, picture, truncate, generate if says else 0)
    if not says:
        _scored(loaded, inputs)  # a model that gives no classes is refused before anything is fitted

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

    def under() -> Any:
        return intervene(model, *inside)

    if not says:
        if words := [key for key, thing in zip(chosen, made) if callable(thing)]:
            raise InputError(f"{words[0]} changes words that are said, and {type(model).__name__} says none")
        return _classes(loaded, about, inputs, picture, inside, fitted, page, console)
    with console.status("generating"):
        plain = _said(loaded, inputs, generate, nullcontext)
        steered = _said(loaded, inputs, generate, under, **after)
    with console.status("measuring"):
        costs = measured(
            lambda: _said(loaded, inputs, generate, nullcontext, min_new_tokens=generate),
            lambda: _said(loaded, inputs, generate, under, min_new_tokens=generate, **after),
        )
    lines = shown(plain.text, steered.text, costs / generate, fitted, moved(plain, steered))
    wrong = [] if truth is None else [word_error_rate(truth, one.text) for one in (plain, steered)]
    if wrong:
        lines.renderables.append(Text(f"words that are wrong: {wrong[0]:.0%} before, {wrong[1]:.0%} after"))
    if page is not None:
        with console.status("comparing the heads"):
            views = _views(loaded, inputs, picture, inside)
            ways = (nullcontext, under) if inside else ()
            heads = [
                beside.heads(loaded, partial(_said, loaded, inputs, generate, way, **_forced(plain))) for way in ways
            ]
        asked = None if heard is not None else text
        facts = [str(lines.renderables[2])] + [str(line) for line in lines.renderables[3:]]
        both = plain, steered
        beside.write(page, about, loaded.processor, said=both, pictures=views, asked=asked, heads=heads, facts=facts)
        lines.renderables.append(Text(f"page {page}"))
    return lines


def _scored(loaded: Loaded, inputs: dict[str, Any], around: Any = nullcontext) -> Tensor:
    """Probabilities of the classes of one input. [class] InputError where a model gives none."""
    with torch.inference_mode(), around():
        logits = getattr(loaded.model(**inputs), "logits", None)
    if logits is None or logits.ndim != 2 or logits.shape[-1] < 2:
        raise InputError(
            f"steer shows what a model says or paints, or the class that it chooses; {type(loaded.model).__name__} "
            f"gives {'no logits' if logits is None else f'logits {list(logits.shape)}'}: regard studio shows its heads "
            f"before and after"
        )
    return chances(loaded.model, logits[0].float())


def _classes(
    loaded: Loaded,
    about: beside.About,
    inputs: dict[str, Any],
    picture: Image.Image | None,
    inside: Sequence[Any],
    fitted: float,
    page: Path | None,
    console: Console,
) -> Group:
    """The likeliest classes before and after, and the time that a run takes."""
    plain = partial(_scored, loaded, inputs)
    changed = partial(plain, partial(intervene, loaded.model, *inside))
    with console.status("running"):
        both = torch.stack([plain(), changed()])
    with console.status("measuring"):
        costs = measured(plain, changed)
    names = getattr(loaded.model.config, "id2label", None) or {}
    among = both.amax(0).topk(min(CLASSES, both.shape[1])).indices
    among = among[both[0, among].argsort(descending=True)]
    rows = [(str(names.get(i, i)), *both[:, i].tolist()) for i in among.tolist()]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("class")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for label, before, after in rows:
        table.add_row(Text(label), f"{before:.1%}", f"{after:.1%}")
    fact = f"{_change(float((both[0] - both[1]).abs().max()))}; {_cost(costs, fitted, 'run')}"
    lines = Group(table, Text(), Text(fact))
    if page is not None:
        with console.status("comparing the heads"):
            heads = [beside.heads(loaded, run) for run in (plain, changed)]
        views = _views(loaded, inputs, picture, inside)
        beside.write(page, about, loaded.processor, classes=rows, pictures=views, heads=heads, facts=[fact])
        lines.renderables.append(Text(f"page {page}"))
    return lines


def moved(before: beside.Said, after: beside.Said) -> float:
    """By how much the probability of a token moves most, up to the first at which another one is chosen."""
    both, first = beside.parting(before, after)
    apart = (both[0] - both[1])[: None if first is None else first + 1].abs()
    return float(apart.max()) if apart.numel() else 0.0


def _change(apart: float) -> str:
    """By how much probabilities moved, in words."""
    if apart == 0:
        return "nothing changed"
    return f"probabilities moved by {f'up to {apart:.1%}' if apart >= 5e-4 else 'less than 0.1%'}"


def _forced(said: beside.Said) -> dict[str, Any]:
    """Options with which `generate` says this again, whatever the model would say."""
    return {"logits_processor": [_Forced(said.ids)], "max_new_tokens": len(said.ids), "min_new_tokens": 0}


class _Forced:
    def __init__(self, ids: Tensor) -> None:
        self.ids, self.start = ids, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.start = input_ids.shape[1] if self.start < 0 else self.start
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0.0
        return forced


def _views(
    loaded: Loaded, inputs: dict[str, Any], picture: Image.Image | None, inside: Sequence[Any]
) -> list[beside.View]:
    """The picture as the model is given it, and as it is given it under the methods, where that is another."""
    if picture is None:
        return []
    before, given = seen(loaded.processor, inputs, picture), inputs
    for thing in inside:
        given = thing.given(dict(given)) if hasattr(thing, "given") else given
    after = before if given is inputs else drawn(loaded.processor, given.get("pixel_values"))
    return [beside.View("", one, other if other is not one else None) for one, other in zip(before, after)]


def _painted(
    loaded: Loaded,
    about: beside.About,
    chosen: dict[str, Any],
    turned: dict[str, dict[str, Any]],
    text: str,
    out: Path,
    console: Console,
) -> Group:
    """Pictures before and after in a folder or on a page, from the same noise, and how far they are apart."""
    model, pipeline = loaded
    page = out if out.suffix in PAGE else None
    said = [line.strip() for line in text.splitlines() if line.strip()]
    names = {when: [f"{i}-{when}.png" for i in range(1, len(said) + 1)] for when in ("before", "after")}
    if page is None:
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

    def ways() -> list[tuple[Any, dict[str, Any]]]:
        return [(nullcontext(), {}), (intervene(model, *made), after_steps(made))]

    def again(around: Any, options: dict[str, Any]) -> NDArray[np.float32]:
        with torch.inference_mode(), around:
            return painted(pipeline, inputs, **options)

    with console.status("painting"):
        took, pictures = [], []
        for way in ways():
            start = time.process_time()
            pictures.append(again(*way))
            took.append(time.process_time() - start)
    images = [[Image.fromarray((255 * one).round().astype(np.uint8)) for one in some] for some in pictures]
    if page is None:
        out.mkdir(parents=True, exist_ok=True)
        for some, files in zip(images, names.values()):
            for picture, name in zip(some, files):
                with written_aside(out / name) as draft:
                    draft.write_bytes(png(picture))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("text", "before", "after", "change") if page is None else ("text", "change"):
        table.add_column(name)
    apart = abs(pictures[1] - pictures[0]).mean((1, 2, 3))
    for line, before, after, much in zip(said, *names.values(), apart):
        files = (before, after) if page is None else ()
        table.add_row(Text(line), *files, f"{much:.1%}" if much else "none")
    cost = f"{took[0]:.1f} s of processor time before, {took[1]:.1f} s after"
    cost += f"; fitting took {fitted:.1f} s" if fitted > 0.01 else ""
    cost = cost if apart.any() else f"nothing changed; {cost}"
    if page is not None:
        with console.status("comparing the heads"):
            heads = [beside.heads(loaded, partial(again, *way)) for way in ways()]
        views = [
            beside.View(line, before, after if much else None)
            for line, before, after, much in zip(said, *images, apart)
        ]
        beside.write(page, about, pipeline, pictures=views, heads=heads, facts=[cost])
    return Group(table, Text(), Text(f"{cost}; written to {out}"))


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


def _said(loaded: Loaded, inputs: dict[str, Any], steps: int, around: Any, **options: Any) -> beside.Said:
    """What a model generates."""
    with torch.inference_mode(), around():
        wrote = written(loaded, inputs, steps, **options)
    tokenizer, ids = getattr(loaded.processor, "tokenizer", loaded.processor), wrote.ids[wrote.start :]
    return beside.Said(tokenizer.decode(ids, skip_special_tokens=True), ids, wrote.scores)


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


def shown(before: str, after: str, costs: NDArray[np.float64], fitted: float, moved: float = 0.0) -> Group:
    """A table of both texts, with the words that only one has marked, and what a token took.

    moved: by how much probabilities did, which is told where the words did not.
    """
    table = Table(box=None, header_style="bold", expand=True, padding=(0, 2, 0, 0))
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*marked(before, after))
    cost = _cost(costs, fitted, "token")
    return Group(
        table,
        Text(),
        Text(cost if before != after else f"{'the same words, but ' if moved else ''}{_change(moved)}; {cost}"),
    )


def _cost(costs: NDArray[np.float64], fitted: float, unit: str) -> str:
    ms = np.median(costs, axis=0) * 1e3
    cost = f"{ms[0]:.1f} ms of processor time a {unit} before, {ms[1]:.1f} after: "
    if (found := told(costs)) is not None:
        cost += f"{found[0]:.2f} ± {found[1]:.2f} times, over {len(costs)} rounds"
    else:
        cost += f"how many times that is cannot be told, {len(costs)} rounds differ too much"
    return f"{cost}; fitting took {fitted:.1f} s" if fitted > 0.01 else cost


def marked(before: str, after: str) -> tuple[Text, Text]:
    """Both texts, words that differ between brackets and coloured."""
    left, right = Text(), Text()
    for pieces, text, style in zip(beside.pieces(before, after), (left, right), ("bold red", "bold green")):
        for words, own in pieces:
            text.append("[" * own)
            text.append(words, style=style if own else "")
            text.append("]" * own)
    return left, right
