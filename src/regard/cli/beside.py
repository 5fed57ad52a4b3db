"""A page that shows what a model does without and with interventions, beside each other; one file, as the report is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from PIL import Image, ImageChops
from torch import Tensor

from .. import catalog
from ..files import replaced
from ..loading import Loaded
from ..padding import unpadded
from ..recording import spec_of
from ..report import Standalone, picture
from ..seam import record
from ..statistics import BASIC
from ..tokens import Tokens

SHOWN, RARE, FEWEST = 8, 0.005, 3  # next tokens in bars, of which those are left out that are rarer, but not all
LEAST = 1e-4  # of the largest number: a statistic of which no head changes by more is left out
LARGE = 256  # pixels, to which small pictures are drawn larger


class About(NamedTuple):
    """Which model, of which class, under which methods with which knobs."""

    model: str
    kind: str
    methods: Mapping[str, Mapping[str, Any]]


class Said(NamedTuple):
    """What a model wrote. ids: [token]; scores: what each token was chosen by, [token, vocabulary]."""

    text: str
    ids: Tensor
    scores: Tensor


class View(NamedTuple):
    """A picture, and the one in its place under the methods; None where it is the same."""

    title: str
    before: Image.Image
    after: Image.Image | None


class Step(NamedTuple):
    """The first step at which another token is chosen, or else the one at which probabilities move most.

    rows: the likeliest tokens, with their probabilities before and after.
    """

    at: int
    before: str  # the text up to it
    changed: bool  # whether another token is chosen
    rows: list[tuple[str, float, float]]


Heads = Mapping[str, xr.Dataset]  # stack -> statistics of each layer and head


Pieces = list[tuple[str, bool]]


def pieces(before: str, after: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, and whether the words of a piece stand in the one alone.

    >>> pieces("a red ring", "a blue ring")[1]
    [('a ', False), ('blue', True), (' ring', False)]
    """
    a, b = (re.findall(r"(\s*)(\S+)", text) for text in (before, after))  # blanks, and the word after them
    left, right = [], []
    same = difflib.SequenceMatcher(None, [word for _, word in a], [word for _, word in b], autojunk=False)
    for kind, i, j, k, n in same.get_opcodes():
        for found, words in ((left, a[i:j]), (right, b[k:n])):
            text = "".join(blank + word for blank, word in words)
            if words and kind != "equal" and words[0][0]:  # marks begin with a word
                _add(found, words[0][0], False)
                text = text[len(words[0][0]) :]
            if words:
                _add(found, text, kind != "equal")
    return left, right


def _add(found: Pieces, text: str, own: bool) -> None:
    if found and found[-1][1] == own:
        found[-1] = (found[-1][0] + text, own)
    else:
        found.append((text, own))


def step(before: Said, after: Said, processor: Any) -> Step:
    """Where what is said begins to differ, and how likely the next tokens were there."""
    chances, first = parting(before, after)
    at = int((chances[0] - chances[1]).abs().sum(-1).argmax()) if first is None else first
    both = chances[:, at]
    shares, likely = both.amax(0).topk(min(SHOWN, both.shape[1]))
    likely = likely[: max(FEWEST, int((shares >= RARE).sum()))]
    ids = likely[both[0, likely].argsort(descending=True)]
    tokens = Tokens.plain("generated", 1, len(ids), ids[None]).texts(processor)[0]
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = [(token, *both[:, i].tolist()) for token, i in zip(tokens, ids.tolist())]
    return Step(at, tokenizer.decode(before.ids[:at], skip_special_tokens=True), first is not None, rows)


def parting(before: Said, after: Said) -> tuple[Tensor, int | None]:
    """Probabilities at the steps that both have, [before and after, step, vocabulary], and the first step at which
    another token is chosen; None where there is none.
    """
    n = min(len(before.ids), len(after.ids))
    differ = (before.ids[:n] != after.ids[:n]).nonzero()
    chances = torch.stack([one.scores[:n].float().softmax(-1) for one in (before, after)])
    return chances, int(differ[0]) if len(differ) else None


def heads(loaded: Loaded, run: Callable[[], Any]) -> Heads:
    """The mean of the report's statistics of each head over all that a run looks at: [layer, head] or with a role."""
    chosen = [name for name in BASIC if "rank" not in spec_of(catalog.statistic(name)).dims]
    with record(loaded.model, *chosen, processor=loaded.processor) as recording:
        run()
    found: dict[str, list[xr.Dataset]] = {}
    for tree in recording:
        for stack, node in tree.children.items():
            data = unpadded(node.to_dataset()).drop_vars([f"{s}_{n}" for s in ("query", "key") for n in ("token",)],
                                                         errors="ignore")  # fmt: skip
            others = set(data.dims) - {"layer", "head", "role"}
            found.setdefault(stack, []).append(data.mean(others, keep_attrs=True))
    return {
        stack: xr.concat(runs, "run", coords="minimal", compat="override").mean("run", keep_attrs=True)
        for stack, runs in found.items()
    }


def _variables(before: xr.Dataset, after: xr.Dataset) -> list[dict[str, Any]]:
    """Statistics that change in some head, most first."""
    found = []
    for name in map(str, before.data_vars):
        both = [some[name] for some in (before, after)]
        label, units = both[0].attrs.get("long_name", name), str(both[0].attrs.get("units", ""))
        for role in both[0]["role"].values if "role" in both[0].dims else [None]:
            values = [(one if role is None else one.sel(role=role)).transpose("layer", "head").values for one in both]
            size, change = (np.nanmax(abs(x), initial=0.0) for x in (np.stack(values), values[1] - values[0]))
            if change <= LEAST * size:
                continue
            found.append(
                {
                    "name": name if role is None else f"{name}/{role}",
                    "label": str(label) if role is None else f"{label}: {role}",
                    "units": units,
                    "about": str(both[0].attrs.get("about", "")),
                    "before": _numbers(values[0]),
                    "after": _numbers(values[1]),
                    "share": float(change / size),
                }
            )
    return sorted(found, key=lambda one: -one["share"])


def _numbers(values: np.ndarray) -> list[list[float | None]]:
    return [[float(f"{x:.4g}") if np.isfinite(x) else None for x in row] for row in values.tolist()]


def _stacks(ways: Sequence[Heads]) -> list[dict[str, Any]]:
    if not ways:
        return []
    before, after = ways
    return [
        {
            "name": stack.replace("_", " "),
            "layers": [int(x) for x in data["layer"].values],
            "heads": [int(x) for x in data["head"].values],
            "variables": _variables(data, after[stack]),
        }
        for stack, data in before.items()
        if stack in after and {"layer", "head"} <= set(data.sizes)
    ]


def shown(view: View) -> dict[str, Any]:
    """A view for the page: pictures as data addresses, small ones drawn larger, and where they differ."""

    def large(image: Image.Image) -> Image.Image:
        times = max(1, LARGE // max(image.size))
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)

    found: dict[str, Any] = {"title": view.title, "before": picture(large(view.before)), "after": None, "apart": None}
    if view.after is not None:
        found["after"] = picture(large(view.after))
        if view.before.size == view.after.size:
            apart = ImageChops.difference(view.before.convert("RGB"), view.after.convert("RGB")).convert("L")
            most = max(1, int(np.asarray(apart).max()))
            found["apart"] = picture(large(apart.point([min(255, 255 * i // most) for i in range(256)])))
    return found


def write(
    path: Path,
    about: About,
    processor: Any,
    *,
    said: tuple[Said, Said] | None = None,
    classes: Sequence[tuple[str, float, float]] = (),
    pictures: Sequence[View] = (),
    asked: str | None = None,
    heads: Sequence[Heads] = (),
    facts: Iterable[str] = (),
) -> None:
    """Write the page, whole or not at all; FileExistsError where it would replace what Regard did not write.

    said: both texts. classes: with their probabilities before and after, where a model gives these. heads: of both
    ways, on the same tokens; none where the methods leave attention as it is.
    """
    first = step(*said, processor) if said and min(len(one.ids) for one in said) else None
    paints = said is None and not classes
    page = Standalone("beside.html", "report.css", "answers.css", "beside.css", script="beside.js")
    named = [
        " ".join([method, *(f"{knob}={value}" for knob, value in knobs.items())])
        for method, knobs in about.methods.items()
    ]
    header = {
        "paints": paints,
        "asked": asked,
        "views": [shown(view) for view in pictures],
        "said": said and dict(zip(("before", "after"), pieces(*(one.text for one in said)))),
        "step": first and first._asdict(),
        "classes": [dict(zip(("label", "before", "after"), row)) for row in classes],
        "stacks": _stacks(heads),
    }
    html = page.html(
        header,
        title=f"{about.model} under {' and '.join(about.methods)}",
        model=about.model,
        methods=named,
        kind=about.kind,
        facts=list(facts),
        paints=paints,
        classes=bool(classes),
        versions=[f"{package} {version(package)}" for package in ("regard", "transformers", "torch")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as draft:
        draft.write_bytes(html)
