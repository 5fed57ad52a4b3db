"""`regard features`: what the heads of a layer write, as features of an autoencoder, beside one that is untrained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ..circuits._gates import frozen
from ..circuits._outputs import of_layer, side_by_side
from ..circuits._sae_files import ABOUT, WEIGHTS
from ..circuits.attention_sae import (
    AttentionSAE,
    Recovered,
    Training,
    density,
    head_outputs,
    loss_recovered,
    outputs,
)
from ..files import MARK, replaced
from ..loading import load, positions
from ..prediction import writes
from ..profile import read
from ..seam import record
from ..sites import find
from .inputs import InputError, writable
from .printed import Printed

HELD, EVERY = 128, 8  # rows held out at most: each eighth of the text, from its beginning
ROWS = 16  # of a pass
BATCH = 256  # tokens of a step
ANEW = 5  # features that do not fire start anew after each fifth of the steps, but the last
PLACES, AROUND = 6, 10  # exemplars of a feature, and the tokens shown on either side
HELPS = 0.02  # nats that a layer takes off the loss at least, for their share to mean anything
FILES = ("features.html", "features.json")
FOLDER = "sae"
FIRED = (178, 84, 0)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{mark}">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #18181b;
  background: #fff }}
h1 {{ font-size: 1.3rem; margin-bottom: 0 }} h2 {{ font-size: 1rem; margin: 1.8rem 0 .2rem }}
p {{ margin: .3rem 0; color: #52525b }} table {{ border-collapse: collapse; font-size: .95rem; margin: 1rem 0 }}
td, th {{ text-align: right; padding: .1rem .8rem .1rem 0 }} td:first-child, th:first-child {{ text-align: left }}
ol {{ margin: .3rem 0; padding-left: 4.2em; line-height: 1.7; overflow-wrap: anywhere }}
li::marker {{ color: #52525b; font-size: .85em }} li span {{ border-radius: .2em; white-space: pre-wrap }}
li b {{ font-weight: inherit; outline: 2px solid rgb{fired}; border-radius: .2em; white-space: pre-wrap }}
</style></head><body>
<h1>{title}</h1><p>{about}</p>
{table}
{notes}
<p>Below, {chosen}. Each place is the strongest in its row of text; the colour is how strongly the feature fires, from
white for nothing; the outline is the token that it is told of.</p>
{body}
</body></html>
"""


class Text(NamedTuple):
    """Rows of tokens, of one length: those to learn from, and those held out."""

    learned: list[Tensor]
    held: list[Tensor]


class Place(NamedTuple):
    """One place where a feature fires: tokens around it, how strongly it fires at each, and which of them it is."""

    tokens: list[str]
    values: list[float]
    at: int


class Measured(NamedTuple):
    """One autoencoder on the text held out. recovered: None of a model that does not write."""

    rates: np.ndarray
    active: float
    dead: int
    explained: float
    recovered: Recovered | None

    @property
    def share(self) -> float | None:
        """The loss recovered; None where the layer hardly helps, so that there is nothing to recover."""
        of = self.recovered
        return None if of is None or of.without - of.whole < HELPS else of.share


def run(
    name: str,
    *,
    layer: int,
    data: Path,
    field: str | None,
    features: int | None,
    sparsity: float,
    steps: int,
    length: int,
    shown: int,
    out: Path,
    seed: int,
    trust_remote_code: bool = False,
    console: Console,
) -> tuple[Printed, list[Path]]:
    """Train an autoencoder on a text, judge it on a part held out, write all; returns the paths."""
    source = read(data, field)
    writable(out, *FILES)
    writable(out / FOLDER, ABOUT, WEIGHTS)
    with console.status(f"loading {name}"):
        model, processor = load(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
    tokenizer = _reads(name, model, processor)
    heads, dim = _heads(model, layer)
    length = min(length, positions(model) or length)
    with console.status("reading the text"):
        needed = -(-steps * BATCH // length) + HELD
        text = _rows((item.text for item in source), tokenizer, length, needed, str(data))
    device = next(model.parameters()).device

    def given(rows: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([*rows]).to(device)}

    sae, blank = (AttentionSAE(heads * dim, features, sparsity=sparsity, seed=seed).to(device) for _ in range(2))
    training = Training(
        sae, batch=BATCH, mix=min(16, steps), resample=max(2, steps // ANEW), resamples=ANEW - 1, seed=seed
    )
    with Progress(console=console, transient=True) as bar, frozen(model), torch.inference_mode():
        task = bar.add_task("training", total=steps)
        with record(model, outputs=outputs, processor=processor, sink=training.of(layer)):
            rows = islice(_again(text.learned, seed), -(-steps * BATCH // length))
            while some := [*islice(rows, ROWS)]:
                model(**given(some))
                bar.update(task, completed=len(training.steps))
    told = training.finish()
    held = [given(text.held[i : i + ROWS]) for i in range(0, len(text.held), ROWS)]
    with console.status("measuring on the text held out"):
        measured = {kind: _measured(model, one, layer, held) for kind, one in (("trained", sae), ("untrained", blank))}
    rates = measured["trained"].rates
    order = [int(i) for i in np.argsort(-rates, kind="stable") if rates[i] > 0]
    ranks = np.unique(np.geomspace(1, max(len(order), 1), min(shown, max(len(order), 1))).round().astype(int))
    chosen = [order[rank - 1] for rank in ranks] if order else []
    with console.status("looking for exemplars"):
        places = _places(model, sae, layer, held, chosen, tokenizer) if chosen else {}
    shares = sae.head_attribution(heads).cpu().numpy()

    notes = _notes(measured, len(text.held) * length)
    numbers = {
        "model": name,
        "layer": layer,
        "seed": seed,
        "tokens": {"learned": int(told.attrs["tokens"]), "held": len(text.held) * length, "row": length},
        "features": len(rates),
        "sparsity": sparsity,
        "steps": len(training.steps),
        "anew": training.anew,
        **{kind: _plain(of) for kind, of in measured.items()},
        "rate": rates.round(6).tolist(),
        "heads": shares.round(4).tolist(),
        "exemplars": {str(feature): [place._asdict() for place in of] for feature, of in places.items()},
        "written": MARK,
    }
    out.mkdir(parents=True, exist_ok=True)
    sae.save(out / FOLDER, model_name=name, layer=layer, tokens=numbers["tokens"]["learned"])
    with replaced(out / FILES[0]) as draft:
        title = f"{name}: features of what the heads of layer {layer} write"
        draft.write_text(_page(title, numbers, measured, notes, places, rates, shares), encoding="utf-8")
    with replaced(out / FILES[1]) as draft:
        draft.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return Printed([_table(numbers, measured)], notes), [out / FOLDER, *(out / file for file in FILES)]


def _reads(name: str, model: Any, processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(model, "main_input_name", "") != "input_ids" or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(f"{name} reads no text; from Python: regard.circuits.attention_sae takes any inputs")
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{name} reads and writes, and what it is to write is not in the text; from Python: "
            f"regard.circuits.attention_sae with inputs for both"
        )
    return tokenizer


def _heads(model: nn.Module, layer: int) -> tuple[int, int]:
    """Heads of a layer, and the dim of what each gives."""
    calls: dict[int, tuple[int, int]] = {}

    def keep(_: str, call: Any, seen: Tensor) -> None:
        calls[call.site.layer] = seen.shape[1], seen.shape[3]

    ids = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    with frozen(model), torch.inference_mode(), record(model, outputs=outputs, sink=keep):
        model(input_ids=ids)
    if layer not in calls:
        known = sorted(calls) or sorted({site.layer for site in find(model).values()})
        raise InputError(f"--layer {layer}: there are {', '.join(map(str, known))}")
    return calls[layer]


def _rows(texts: Iterator[str | None], tokenizer: Any, length: int, needed: int, where: str) -> Text:
    """Rows of tokens, the special ones that the tokenizer puts around a text around each; as many as are needed."""
    around = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(around)) if around[i : i + len(plain)] == plain), 0)
    before, after = around[:start], around[start + len(plain) :]
    room = length - len(before) - len(after)
    found: list[Tensor] = []
    waiting: list[int] = []
    for text in texts:
        if text is None:
            raise InputError(f"{where} holds pictures, and features are of texts here")
        waiting += tokenizer(f"{text}\n", add_special_tokens=False, verbose=False)["input_ids"]
        while len(waiting) >= room and len(found) < needed:
            found.append(torch.tensor([*before, *waiting[:room], *after]))
            waiting = waiting[room:]
        if len(found) >= needed:
            break
    if len(found) < EVERY:
        raise InputError(
            f"{where} makes {len(found)} rows of {length} tokens, and {EVERY} are needed: give more text, or a smaller "
            f"--length"
        )
    held = range(0, len(found), EVERY)[:HELD]
    return Text([row for i, row in enumerate(found) if i not in held], [found[i] for i in held])


def _again(rows: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    """Rows in an order that is drawn, over and over."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return (rows[i] for i in cycle(order))


def _measured(model: nn.Module, sae: AttentionSAE, layer: int, held: Sequence[dict[str, Tensor]]) -> Measured:
    told = density(sae, head_outputs(model, held, layer))
    recovered = None
    if writes(model):
        whole = {"input_ids": torch.cat([inputs["input_ids"] for inputs in held])}

        def loss(model: nn.Module) -> Tensor:
            found = []
            for ids in whole["input_ids"].split(ROWS):
                logits = model(input_ids=ids).logits[:, :-1].float()
                each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                found.append(each.mean(1))
            return torch.cat(found)

        recovered = loss_recovered(model, loss, sae, layer=layer)
    attrs = told.attrs
    return Measured(told["rate"].values, attrs["active"], attrs["dead"], attrs["explained"], recovered)


def _plain(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {"active": measured.active, "dead": measured.dead, "explained": measured.explained}
    if measured.recovered is not None:
        found |= {"loss": measured.recovered._asdict(), "recovered": measured.share}
    return found


@torch.no_grad()
def _places(
    model: nn.Module,
    sae: AttentionSAE,
    layer: int,
    held: Sequence[dict[str, Tensor]],
    features: Sequence[int],
    tokenizer: Any,
) -> dict[int, list[Place]]:
    """The rows held out in which each feature fires most, and where."""
    ids = torch.cat([inputs["input_ids"] for inputs in held]).cpu()
    values = torch.cat(
        [sae.encode(side_by_side(of_layer(model, inputs, layer)[1]))[..., list(features)].cpu() for inputs in held]
    )
    found: dict[int, list[Place]] = {}
    for column, feature in enumerate(features):
        strongest, where = values[..., column].max(1)
        rows = [int(i) for i in strongest.argsort(descending=True, stable=True)[:PLACES] if strongest[i] > 0]
        found[feature] = []
        for row in rows:
            at = int(where[row])
            span = slice(max(at - AROUND, 0), at + AROUND + 1)
            tokens = [tokenizer.decode([i]) for i in ids[row, span].tolist()]
            found[feature].append(Place(tokens, values[row, span, column].tolist(), at - span.start))
    return found


def _notes(measured: Mapping[str, Measured], tokens: int) -> list[str]:
    found = [f"judged on {tokens:,} tokens that were held out"]
    of = measured["trained"].recovered
    if of is None:
        found.append("the model writes no text, so there is no loss to recover")
    elif measured["trained"].share is None:
        found.append(
            f"without the layer the loss goes from {of.whole:.3f} to {of.without:.3f}: of this text the layer brings "
            f"nothing that could be recovered"
        )
    return found


def _cells(measured: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    """Name, trained, untrained."""
    rows = [
        ("features a token", *(f"{of.active:.1f}" for of in measured.values())),
        ("features that never fire", *(f"{of.dead} of {len(of.rates)}" for of in measured.values())),
        ("variance explained", *(f"{of.explained:.1%}" for of in measured.values())),
    ]
    losses = [of.recovered for of in measured.values() if of.recovered is not None]
    if losses:
        rows += [
            ("loss with the layer as it is", *(f"{of.whole:.3f}" for of in losses)),
            ("loss with its reconstruction", *(f"{of.coded:.3f}" for of in losses)),
            ("loss without the layer", *(f"{of.without:.3f}" for of in losses)),
            ("loss recovered", *("-" if of.share is None else f"{of.share:.1%}" for of in measured.values())),
        ]
    return rows


def _table(numbers: Mapping[str, Any], measured: Mapping[str, Measured]) -> Table:
    table = Table(
        title=f"{numbers['model']}: {numbers['features']} features of layer {numbers['layer']}",
        title_justify="left",
        header_style="bold",
        title_style="bold",
    )
    for column in ("on the text held out", *measured):
        table.add_column(column, justify="left" if not table.columns else "right")
    for row in _cells(measured):
        table.add_row(*row)
    return table


def _page(
    title: str,
    numbers: Mapping[str, Any],
    measured: Mapping[str, Measured],
    notes: Sequence[str],
    places: Mapping[int, Sequence[Place]],
    rates: np.ndarray,
    shares: np.ndarray,
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("on the text held out", *measured))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _cells(measured))
    body = []
    for feature, of in places.items():
        most = max(max(place.values) for place in of)
        writers = sorted(enumerate(shares[feature]), key=lambda pair: -pair[1])[:3]
        by = ", ".join(f"{numbers['layer']}.{head} ({share:.0%})" for head, share in writers)
        body.append(
            f"<h2>feature {feature}</h2><p>fires at {rates[feature]:.2%} of tokens, up to {most:.3g}; written most by "
            f"heads {by}</p><ol>{''.join(f'<li>{_shown(place, most)}</li>' for place in of)}</ol>"
        )
    alive = int((rates > 0).sum())
    return PAGE.format(
        mark=MARK,
        title=escape(title),
        about=f"{numbers['steps']:,} steps, {numbers['tokens']['learned']:,} tokens, sparsity {numbers['sparsity']:g}",
        fired=FIRED,
        table=f"<table><tr>{head}</tr>{rows}</table>",
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
        chosen=f"{len(places)} of the {alive} features that fire, from the most frequent to the rarest by ranks that "
        f"grow by one factor, none chosen by hand",
        body="\n".join(body),
    )


def _shown(place: Place, most: float) -> str:
    parts = []
    for i, (token, value) in enumerate(zip(place.tokens, place.values)):
        share = value / most
        fill = tuple(round(255 + (end - 255) * share) for end in FIRED)
        ink = "#18181b" if sum(fill) > 380 else "#fff"
        tag = "b" if i == place.at else "span"
        style = f' style="background: rgb{fill}; color: {ink}" title="{value:.3g}"' if share > 0 else ""
        parts.append(f"<{tag}{style}>{escape(token.replace(chr(10), '↵'))}</{tag}>")
    return "".join(parts)
