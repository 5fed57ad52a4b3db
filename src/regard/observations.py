"""What a recording shows, in words: heads whose keys follow a rule, sinks, and where the picture is looked at.

Counts are of positions whose largest weight is on the key that the rule names; nothing here needs more than the largest
keys of each row. A head is named when the rule holds in at least half of the positions that it applies to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from .padding import evenly, real, visible

ENOUGH = 8  # positions that a rule must apply to
OFTEN = 0.5
SINK_SHARE, SINK_TIMES = 0.1, 3.0  # of a layer's attention, and times what even attention gives a key of its place
MOST_SINKS = 3


@dataclass(frozen=True)
class Observation:
    """One sentence, and where to look."""

    text: str
    stack: str
    layer: int | None = None
    head: int | None = None
    score: float = float("nan")


def observe(tree: xr.DataTree) -> list[Observation]:
    """Sentences about a recording, stack by stack, the clearest first."""
    found: list[Observation] = []
    for stack, node in tree.children.items():
        dataset = node.to_dataset()
        if {"top_keys", "rows"} & set(dataset) and dataset.attrs.get("kind") == "self":
            found += _rules(stack, dataset)
        if "received" in dataset:
            found += _sinks(stack, dataset)
        if "mass" in dataset:
            found += _picture(stack, dataset)
    return found


def _rules(stack: str, dataset: xr.Dataset) -> list[Observation]:
    best: dict[str, Observation] = {}
    for name, (hits, applies) in rule_hits(dataset).items():
        share, count = hits.sum((0, -1)), applies.sum()
        if count < ENOUGH:
            continue
        layer, head = np.unravel_index(np.argmax(share), share.shape)
        if share[layer, head] < OFTEN * count:
            continue
        number = int(dataset["layer"].values[layer])
        text = f"{_name(stack)} layer {number} head {head} looks at {name} in {_of(share[layer, head], count)}"
        more = int((share >= OFTEN * count).sum()) - 1
        if more:
            text += f"; {more} more head{'s do' if more > 1 else ' does'} so in at least half"
        best[name] = Observation(f"{text}.", stack, number, int(head), float(share[layer, head] / count))
    return list(best.values())


def rule_hits(dataset: xr.Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each rule: where the largest weight obeys it [batch, layer, head, query], where it applies [batch, query]."""
    top, at = _largest(dataset), dataset["query"].values
    batch = top.shape[0]
    there = np.broadcast_to(real(dataset, "query").values, (batch, len(at)))
    first = np.where(there.any(1), at[np.argmax(there, axis=1)], at[0])[:, None]
    here = np.broadcast_to(at, (batch, len(at)))

    def hits(key: np.ndarray, applies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (top == key[:, None, None]) & applies[:, None, None], applies

    if "query_role" in dataset.coords and (dataset["query_role"] == "image").any():  # pictures have no order
        return {"its own position": hits(here, there)}
    rules = {
        "the previous token": hits(here - 1, there & (here > first + 1)),
        "the first token": hits(np.broadcast_to(first, here.shape), there & (here > first + 1)),
        "itself": hits(here, there & (here > first + 1)),
    }
    if "query_token" in dataset.coords:
        after, same, repeated = _earlier(np.atleast_2d(dataset["query_token"].values), at, there)
        for name, keys in {
            "what followed an earlier copy of the token (induction)": after,
            "an earlier copy of the token": same,
        }.items():
            hit = (top[..., None] == keys[:, None, None]).any(-1) & repeated[:, None, None]
            rules[name] = hit, repeated
    return rules


def _largest(dataset: xr.Dataset) -> np.ndarray:
    """Position of the key that each query looks at most, -1 where there is none. [batch, layer, head, query]"""
    if "top_keys" in dataset:
        return dataset["top_keys"].transpose("batch", "layer", "head", "query", "rank").values[..., 0]
    rows = dataset["rows"].transpose("batch", "layer", "head", "query", "key").values
    found, at = np.full(rows.shape[:4], -1), dataset["key"].values
    for head in np.ndindex(rows.shape[:3]):  # a head at a time: a copy of all would be as large again
        weights = np.nan_to_num(rows[head])
        found[head] = np.where(weights.any(-1), at[weights.argmax(-1)], -1)
    return found


def _earlier(texts: np.ndarray, at: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions after, and of, earlier copies of each token [batch, query, copies] (-2: none), and where there are any.

    A copy right before does not count: what followed it is the token itself. Nor do positions where copies fill more
    than a quarter of what can be seen: there a rule says little.
    """
    keys: list[list[list[int]]] = []
    for row, use in zip(texts, there):
        seen: dict[str, list[int]] = {}
        keys.append([])
        for i, (token, length) in enumerate(zip(row, np.cumsum(use))):
            copies = [j for j in seen.get(token, []) if j < i - 1] if use[i] else []
            keys[-1].append(copies if 4 * len(copies) <= length else [])
            if use[i]:
                seen.setdefault(token, []).append(i)
    width = max((len(k) for row in keys for k in row), default=0) or 1
    same = np.full((*texts.shape, width), -2)
    for b, row in enumerate(keys):
        for i, copies in enumerate(row):
            same[b, i, : len(copies)] = at[copies] if copies else []
    return np.where(same >= 0, same + 1, -2), same, same[..., 0] >= 0


def sinks(dataset: xr.Dataset) -> xr.Dataset:
    """How far each key is a sink, of a stack with "received"; the one rule for all that speaks of sinks.

    share [batch, layer, key]: of all attention of the layer, mean over its heads. times [batch, layer, key]: `share`
    over what even attention would give a key of its place, among as many queries and as much padding. found
    [batch, key]: where in some layer share is `SINK_SHARE` or more and times is `SINK_TIMES` or more; nowhere in texts
    of less than `ENOUGH` tokens. Padding is NaN, and never found.
    """
    received = dataset["received"].transpose("batch", "layer", "head", "key").mean("head", dtype=float)
    asked, even = real(dataset, "query").sum("query"), evenly(dataset)
    share = (received / asked.where(asked > 0)).where(even.notnull()).transpose("batch", "layer", "key")
    times = (received / even.where(even > 0)).transpose("batch", "layer", "key")
    found = ((share >= SINK_SHARE) & (times >= SINK_TIMES)).any("layer") & (asked >= ENOUGH)
    return xr.Dataset({"share": share, "times": times, "found": found.transpose("batch", "key")})


def _sinks(stack: str, dataset: xr.Dataset) -> list[Observation]:
    """Of a batch: tokens that are a sink in most of its texts, counted from each text's first."""
    judged, there = sinks(dataset), real(dataset, "key").values
    # Texts padded on the left begin later: column r is the r-th token of each text.
    order = np.argsort(~there, axis=1, kind="stable")
    found, lasts = np.take_along_axis(judged["found"].values, order, 1), there.sum(1)
    share = np.take_along_axis(judged["share"].values, order[:, None], 2)
    often = found.sum(0) * 2 > (np.arange(there.shape[1]) < lasts[:, None]).sum(0)
    layers, out = dataset["layer"].values, []
    for place in np.flatnonzero(often):
        by_layer = np.nanmean(share[:, :, place], axis=0)
        overall, top = float(np.nanmean(by_layer)), int(np.nanargmax(by_layer))
        what = _place(dataset, order[0, place], first=place == 0)
        if "key_token" in dataset.coords:
            texts = np.atleast_2d(dataset["key_token"].values)
            words = {str(row[at[place]]).strip() for row, at, last in zip(texts, order, lasts) if place < last}
            what += f" ({words.pop()!r})" if len(words) == 1 and words != {""} else ""
        text = (
            f"{_name(stack)}: {overall:.0%} of all attention goes to {what}, most in layer {int(layers[top])} "
            f"({by_layer[top]:.0%})."
        )
        out.append(Observation(text, stack, int(layers[top]), None, overall))
    return sorted(out, key=lambda one: -one.score)[:MOST_SINKS]


def _picture(stack: str, dataset: xr.Dataset) -> list[Observation]:
    """Which head looks at the picture most, from tokens after it, where that is well more than an even share."""
    if "image" not in dataset["role"].values or not dataset.attrs.get("causal") or "key_role" not in dataset.coords:
        return []
    patches = dataset["key_role"] == "image"
    asks = real(dataset, "query") & (dataset["query"] > dataset["key"].where(patches).max("key"))
    if not bool(asks.any()):
        return []
    share = dataset["mass"].sel(role="image").where(asks).mean(("batch", "query")).transpose("layer", "head")
    even = float((patches.sum("key") / visible(dataset)).where(asks).mean())
    layer, head = np.unravel_index(np.nanargmax(share.values), share.shape)
    most, number = float(share[layer, head]), int(dataset["layer"].values[layer])
    if most < min(1.25 * even, 0.5 + even / 2):
        return []
    text = (
        f"{_name(stack)} layer {number} head {head} looks at the picture most: {most:.0%} of its attention from later "
        f"tokens, where all heads give it {float(share.mean()):.0%} and even attention would give it {even:.0%}."
    )
    return [Observation(text, stack, number, int(head), most)]


def _place(dataset: xr.Dataset, key: int, *, first: bool) -> str:
    at = dataset.isel(batch=0, key=key)
    if "key_image" in dataset.coords and int(at["key_image"]) >= 0:
        return f"the patch in row {int(at['key_row']) + 1}, column {int(at['key_column']) + 1}"
    return "the first token" if first else f"token {int(at['key'])}"


def _of(hits: float, count: int) -> str:
    return f"{hits / count:.0%} of positions ({int(hits)} of {count})"


def _name(stack: str) -> str:
    return stack.replace("_", " ").capitalize()
