"""`regard circuits`: which heads do a task, how faithful they are, and where; of texts, or of questions on pictures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import catalog
from ..circuits._gates import Head
from ..circuits._patching import Component, Contrast, Receiver, answering, ranked
from ..data import prompts
from ..data.prompts import Asked, Encoded, Prompt, encode, stacked
from ..extras import shortened
from ..files import MARK, replaced
from ..loading import Loaded, load
from . import drawn
from .inputs import InputError, open_picture, prepare, writable
from .printed import Printed

TASKS = ("ioi", "greater_than", "docstring", "induction")
KEYS = ("clean", "corrupted", "answer", "wrong")
SEEN = ("image", "corrupted_image")  # paths of pictures, beside the file or whole; one of them is enough
FILES = ("graph.svg", "faithfulness.svg", "patching.svg", "circuit.json")
RANDOM = 5  # circuits of each size
RIGHT = 0.5  # share of prompts with the answer ahead, below which there may be no circuit of the task
LAST = 16  # tokens that are patched one by one, where words have no names
DRAWS = 20  # prompts tried for each that is used
STYLES = {"query": "2 3", "key": "8 4", "value": "", "answer": "12 3 2 3"}  # how a head acts on the next: dashes
PATHS: tuple[Component, ...] = ("query", "key", "value")
ANSWER = "answer"


def methods() -> dict[str, Callable[..., Any]]:
    """Methods of the room `circuits` that score heads, by name: those that ask for no more than a task has."""
    found = {}
    for name in catalog.methods("circuits"):
        function = catalog.method("circuits", name)
        if inspect.isfunction(function) and _gives_scores(function):
            _, *rest = inspect.signature(function).parameters.values()
            needed = {p.name for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
            if needed and needed <= set(PARTS):
                found[name] = function
    return found


def _gives_scores(function: Callable[..., Any]) -> bool:
    return str(inspect.signature(function).return_annotation).rpartition(".")[2] in ("DataArray", "Dataset")


# What a method may ask for, by the name of the argument.
PARTS: dict[str, Callable[[Asked], Any]] = {
    "loss": lambda asked: asked.losses,
    "inputs": lambda asked: asked.inputs,
    "clean": lambda asked: asked.inputs,
    "positive": lambda asked: asked.inputs,
    "corrupted": lambda asked: asked.corrupted,
    "negative": lambda asked: asked.corrupted,
    "reference": lambda asked: asked.corrupted,
    "score": lambda asked: asked.difference,
}


def scores(model: nn.Module, asked: Asked, method: str) -> xr.DataArray:
    """What a method says of each head. [layer, head]"""
    function = methods()[method]
    parameters = inspect.signature(function).parameters
    given = {name: part(asked) for name, part in PARTS.items() if name in parameters}
    if "stack" in parameters:
        given["stack"] = answering(model)
    found = function(model, **given)
    tables = found.data_vars.values() if isinstance(found, xr.Dataset) else [found]
    for table in tables:
        if set(table.dims) == {"layer", "head"} and table.dtype.kind in "fiu":
            return table.transpose("layer", "head").astype(float)
    raise TypeError(f"{method} gave no scores of heads [layer, head]")


def asked_of(task: str, loaded: Loaded, name: str, *, n: int, seed: int) -> tuple[Asked, list[str]]:
    """Prompts of a task, or of a JSONL file, and what was left out of them."""
    tokenizer, notes = reads(loaded, name), []
    if task in TASKS:
        kept: list[Encoded] = []
        tried, problem = 0, ""
        # Names of several tokens and the like make prompts that cannot be compared, depending on the tokenizer.
        for prompt in getattr(prompts, task)(DRAWS * n, seed=seed):
            tried += 1
            try:
                kept.append(encode(prompt, tokenizer))
            except ValueError as error:
                problem = str(error)
            if len(kept) == n:
                break
        if len(kept) < n:
            raise InputError(f"--task {task}: of {tried} prompts {len(kept)} fit this tokenizer: {problem}")
        if tried > n:
            notes.append(f"{tried - n} of {tried} prompts left out: their corruption falls into other tokens")
        return stacked(kept, tokenizer), notes
    path = Path(task)
    if not path.is_file():
        raise InputError(f"--task {shortened(task)}: neither {', '.join(TASKS)} nor a file")
    lines = _lines(path)
    if any(key in line for _, line in lines for key in SEEN):
        return _pictured(lines, loaded, name, path), notes
    return stacked([_read(*line, tokenizer, path) for line in lines], tokenizer), notes


def _lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    found = []
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    for number, text in enumerate(whole.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if isinstance(line, dict) and {*SEEN} & {*line} and "clean" in line:
            line = {"corrupted": line["clean"], **line}  # of a question on pictures, either may differ
        wanted = (*KEYS, *(key for key in SEEN if isinstance(line, dict) and key in line))
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) and line[key] for key in wanted):
            raise InputError(f"{path}, line {number}: an object with the texts {', '.join(wanted)} is needed")
        found.append((number, line))
    if not found:
        raise InputError(f"{path} has no prompts; give a line of JSON a prompt, with {', '.join(KEYS)}")
    return found


def encoded(line: Mapping[str, Any], tokenizer: Any) -> Encoded:
    """A clean and a corrupted text with the answer and a wrong one; ValueError where they do not go together."""
    prompt = Prompt(
        task="file",
        words=(line["clean"],),
        corrupted=(line["corrupted"],),
        answers=(line["answer"],),
        distractors=(line["wrong"],),
        positions={"END": 0},
    )
    return encode(prompt, tokenizer)._replace(positions={})


def _read(number: int, line: Mapping[str, Any], tokenizer: Any, path: Path) -> Encoded:
    try:
        return encoded(line, tokenizer)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: {error}") from error


def _pictured(lines: Sequence[tuple[int, Mapping[str, Any]]], loaded: Loaded, name: str, path: Path) -> Asked:
    """Questions on pictures, padded on the left to one length."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    rows: dict[str, list[dict[str, Any]]] = {"clean": [], "corrupted": []}
    marks = torch.zeros(2, len(lines), len(tokenizer), dtype=torch.bool)
    for row, (number, line) in enumerate(lines):
        shown = [line.get(key) or line.get(other) for key, other in (SEEN, SEEN[::-1])]
        if shown[0] is None:
            raise InputError(f"{path}, line {number}: no picture, and other lines have some: give image")
        try:
            for kind, image in zip(rows, shown):
                inputs, _ = prepare(loaded, name, line[kind], open_picture(path.parent / image), False, 0)
                rows[kind].append(inputs)
            lengths = [rows[kind][-1]["input_ids"].shape[1] for kind in rows]
            if lengths[0] != lengths[1]:
                raise ValueError(f"clean has {lengths[0]} tokens and corrupted {lengths[1]}: change words for as many")
            ids = [tokenizer(line[key], add_special_tokens=False)["input_ids"][:1] for key in ("answer", "wrong")]
            if ids[0] == ids[1] or not all(ids) or [tokenizer.unk_token_id] in ids:
                raise ValueError("answer and wrong begin with the same token, or with one that the tokenizer lacks")
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        marks[0, row, ids[0]] = marks[1, row, ids[1]] = True
    clean, corrupted = (_joined(of, tokenizer.pad_token_id or 0) for of in rows.values())
    return Asked(clean, corrupted, marks[0], marks[1])


def _joined(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    """Inputs of one row each as those of a batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, Tensor] = {}
    for key, first in rows[0].items():
        if isinstance(first, Tensor):
            along = first.shape[:2] == rows[0]["input_ids"].shape[:2]  # of tokens
            fill = pad if key == "input_ids" else 0
            short = [longest - row["input_ids"].shape[1] if along else 0 for row in rows]
            pads = [nn.functional.pad(row[key], (n, 0), value=fill) if n else row[key] for row, n in zip(rows, short)]
            if len({part.shape[1:] for part in pads}) > 1:
                raise InputError(f"pictures of these shapes make {key} that do not fit together: make them alike")
            found[key] = torch.cat(pads)
    return found


def run(
    name: str,
    *,
    task: str,
    method: str | None,
    prompts: int,
    heads: int,
    out: Path,
    seed: int,
    trust_remote_code: bool = False,
    console: Console,
) -> tuple[Printed, list[Path]]:
    """Find a circuit, write its pictures and numbers into `out`, and say what was found; returns their paths too."""
    if method is not None and method not in methods():
        raise InputError(f"--method {shortened(method)}: there are {', '.join(methods())}")
    writable(out, *FILES)
    with console.status(f"loading {name}"):
        loaded = load(name, trust_remote_code=trust_remote_code)
    asked, notes = asked_of(task, loaded, name, n=prompts, seed=seed)
    model = loaded.model
    device = next(model.parameters()).device
    asked = asked._replace(
        inputs={name: value.to(device) for name, value in asked.inputs.items()},
        corrupted={name: value.to(device) for name, value in asked.corrupted.items()},
        answers=asked.answers.to(device),
        distractors=asked.distractors.to(device),
    )
    try:
        contrast = Contrast(model, asked.inputs, asked.corrupted, asked.difference, stack=answering(model))
    except ValueError as error:
        raise InputError(f"--task {shortened(task)}: {error}") from error
    with console.status("scoring heads"):
        table = contrast.by_head() if method is None else scores(model, asked, method)
    order = [head for head in ranked(table) if head in set(contrast.heads)]
    circuit = order[: min(heads, len(order))]
    with console.status("measuring faithfulness"):
        sizes, ours, random = faithful(contrast, order, seed)
    with console.status("patching heads by position"):
        where = _by_position(contrast, asked, circuit)
    with console.status("following paths"):
        edges = edges_of(contrast, circuit)

    out.mkdir(parents=True, exist_ok=True)
    by = method or "patching"
    title = f"{name}: {Path(task).stem if task not in TASKS else task}, {len(circuit)} heads by {by}"
    _draw_graph(out / "graph.svg", contrast, table, circuit, edges, title)
    low, high = random.min(1).tolist(), random.max(1).tolist()
    drawn.curves(
        out / "faithfulness.svg",
        sizes,
        {f"heads by {by}": ours, f"random heads, mean of {RANDOM}": random.mean(1).tolist()},
        {"random": (low, high)},
        labels=("heads in the circuit", "faithfulness"),
        title=f"{name}: faithfulness against size",
    )
    rows = [f"{layer}.{head}" for layer, head in circuit]
    places = [str(place) for place in where["position"].values]
    drawn.heatmap(out / "patching.svg", where.values, rows, places, title="Effect of patching a head")
    told = {
        "model": name,
        "task": task,
        "method": by,
        "seed": seed,
        "prompts": len(asked.answers),
        "right": asked.right(model),
        "score": {"clean": float(contrast.whole.mean()), "corrupted": float(contrast.broken.mean())},
        "heads": [{"layer": a, "head": h, "score": float(table.sel(layer=a, head=h))} for a, h in order],
        "circuit": [list(head) for head in circuit],
        "faithfulness": {"size": sizes, "circuit": ours, "random": random.tolist()},
        "patching": {"head": rows, "position": places, "effect": where.values.tolist()},
        "edges": [edge._asdict() for edge in edges],
        "written": MARK,
    }
    with replaced(out / "circuit.json") as draft:
        draft.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return _printed(told, table, contrast, circuit, sizes, ours, random, notes), [out / file for file in FILES]


def reads(loaded: Loaded, name: str) -> Any:
    """The tokenizer of a model that writes."""
    model: Any
    model, processor = loaded
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(model, "main_input_name", "") != "input_ids" or model.get_output_embeddings() is None:
        raise InputError(f"{name} does not say which token comes next, so it has no such task")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name} has no fast tokenizer beside it, to say where words are; save one into the folder")
    return tokenizer


def faithful(contrast: Contrast, order: Sequence[Head], seed: int) -> tuple[list[int], list[float], np.ndarray]:
    """Sizes, how faithful the first so many heads are, and random ones. [size], [size], [size, draw]"""
    sizes = [size for size in (0, 1, 2, 4, 8, 16, 32, 64, 128) if size < len(order)] + [len(order)]
    rng = np.random.default_rng(seed)
    try:
        ours = [contrast.faithfulness(order[:size]) for size in sizes]
    except ValueError as error:
        raise InputError(str(error)) from error
    draws = [rng.permutation(len(order)) for _ in range(RANDOM)]
    random = [
        [contrast.faithfulness([order[i] for i in draw[:size]]) for draw in draws]
        if 0 < size < len(order)
        else [ours[at]] * RANDOM
        for at, size in enumerate(sizes)
    ]
    return sizes, ours, np.array(random)


def _by_position(contrast: Contrast, asked: Asked, circuit: Sequence[Head]) -> xr.DataArray:
    """Effect of each head of the circuit at each telling word, or at each of the last tokens. [head, position]"""
    places: dict[str, Any] = dict(sorted(asked.positions.items(), key=lambda item: float(item[1].double().mean())))
    if not places:
        n = contrast.tokens
        places = {str(token - n): token for token in range(max(n - LAST, 0), n)}
    wanted = [(head, token) for head in circuit for token in places.values()]
    effects = contrast.patched(wanted).view(len(circuit), len(places))
    return xr.DataArray(effects.numpy(), {"position": list(places)}, ("head", "position"))


def edges_of(contrast: Contrast, circuit: Sequence[Head]) -> list[drawn.Edge]:
    """The paths within a circuit that carry a twentieth of the strongest or more."""
    found = []
    last = contrast.paths([Receiver(max(contrast.sites))], "residual", None, senders=circuit)
    for layer, head in circuit:
        found.append(drawn.Edge(_name((layer, head)), ANSWER, float(last.sel(layer=layer, head=head)), ANSWER))
    for receiver in circuit:
        before = [head for head in circuit if head[0] < receiver[0]]
        for component in PATHS if before else ():
            told = contrast.paths([Receiver(*receiver)], component, None, senders=before)
            for layer, head in before:
                effect = float(told.sel(layer=layer, head=head))
                found.append(drawn.Edge(_name((layer, head)), _name(receiver), effect, component))
    most = max((abs(edge.weight) for edge in found), default=0.0)
    return [edge for edge in found if abs(edge.weight) >= 0.05 * most > 0]


def _name(head: Head) -> str:
    return f"{head[0]}.{head[1]}"


def _draw_graph(
    path: Path, contrast: Contrast, table: xr.DataArray, circuit: Sequence[Head], edges: list[drawn.Edge], title: str
) -> None:
    layers = sorted({layer for layer, _ in circuit})
    members = {layer: sorted(head for at, head in circuit if at == layer) for layer in layers}
    columns = max(map(len, members.values()))
    nodes = {
        _name((layer, head)): (row, i, float(table.sel(layer=layer, head=head)))
        for row, (layer, of) in enumerate(members.items())
        for i, head in enumerate(of)
    }
    nodes[ANSWER] = (len(layers), columns // 2, 0.0)
    labels = [*(f"layer {layer}" for layer in layers), ""]
    styles = {style: dash for style, dash in STYLES.items() if any(edge.style == style for edge in edges)}
    drawn.graph(path, nodes, edges, layers=labels, columns=columns, styles=styles, title=title)


def _printed(
    told: Mapping[str, Any],
    table: xr.DataArray,
    contrast: Contrast,
    circuit: Sequence[Head],
    sizes: Sequence[int],
    ours: Sequence[float],
    random: np.ndarray,
    notes: list[str],
) -> Printed:
    title = f"{told['model']}: heads of {told['task']}, by {told['method']}"
    of_heads = Table(
        title=title, title_justify="left", header_style="bold", title_style="bold", min_width=len(title) + 2
    )
    for column in ("head", "score"):
        of_heads.add_column(column, justify="right")
    for layer, head in circuit:
        of_heads.add_row(_name((layer, head)), f"{float(table.sel(layer=layer, head=head)):.3f}")
    of_sizes = Table(header_style="bold")
    for column in ("heads", "faithfulness", f"random, {RANDOM} draws"):
        of_sizes.add_column(column, justify="right")
    for size, value, draws in zip(sizes, ours, random):
        of_sizes.add_row(str(size), f"{value:.2f}", f"{draws.min():.2f} to {draws.max():.2f}")
    clean, corrupted = told["score"]["clean"], told["score"]["corrupted"]
    lines = [
        f"{told['prompts']} prompt{'s' * (told['prompts'] != 1)}, {told['right']:.0%} right; score {clean:.2f}, "
        f"corrupted {corrupted:.2f}",
        *notes,
    ]
    if told["right"] < RIGHT:
        lines.append("the model is wrong on most of these prompts: its heads may do something else with them")
    return Printed([of_heads, of_sizes], lines)
