"""What a recording shows, in words: heads whose keys follow a rule, sinks, and where the picture is looked at.

Counts are of positions whose largest weight is on the key that the rule names; nothing here needs more than the largest
keys of each row. A head is named when the rule holds in at least half of the positions that it applies to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

ENOUGH = 8  # positions that a rule must apply to
OFTEN = 0.5
SINK_SHARE, SINK_TIMES = 0.1, 3.0  # of all attention, and times what even attention would give a key of its place


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
        if "top_keys" in dataset and dataset.attrs.get("kind") == "self":
            found += _rules(stack, dataset)
        if "received" in dataset and dataset.attrs.get("kind") == "self":
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
    top = dataset["top_keys"].transpose("batch", "layer", "head", "query", "rank").values[..., 0]
    at = dataset["query"].values
    batch = top.shape[0]
    roles = dataset["query_role"].values if "query_role" in dataset.coords else np.full((batch, len(at)), "other")
    real = roles != "pad"
    first = np.where(real.any(1), at[np.argmax(real, axis=1)], at[0])[:, None]
    here = np.broadcast_to(at, (batch, len(at)))

    def hits(key: np.ndarray, applies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (top == key[:, None, None]) & applies[:, None, None], applies

    if (roles == "image").any():  # pictures have no order to speak of
        return {"its own position": hits(here, real)}
    rules = {
        "the previous token": hits(here - 1, real & (here > first + 1)),
        "the first token": hits(np.broadcast_to(first, here.shape), real & (here > first + 1)),
        "itself": hits(here, real & (here > first + 1)),
    }
    if "query_token" in dataset.coords:
        after, same, repeated = _earlier(dataset["query_token"].values, at, real)
        for name, keys in {
            "what followed an earlier copy of the token (induction)": after,
            "an earlier copy of the token": same,
        }.items():
            hit = (top[..., None] == keys[:, None, None]).any(-1) & repeated[:, None, None]
            rules[name] = hit, repeated
    return rules


def _earlier(texts: np.ndarray, at: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions after, and of, earlier copies of each token [batch, query, copies] (-2: none), and where there are any.

    A copy right before does not count: what followed it is the token itself. Nor do positions where copies fill more
    than a quarter of what can be seen: there a rule says little.
    """
    keys: list[list[list[int]]] = []
    for row, use in zip(texts, real):
        seen: dict[str, list[int]] = {}
        keys.append([])
        for i, token in enumerate(row):
            copies = [j for j in seen.get(token, []) if j < i - 1] if use[i] else []
            keys[-1].append(copies if 4 * len(copies) <= i + 1 else [])
            if use[i]:
                seen.setdefault(token, []).append(i)
    width = max((len(k) for row in keys for k in row), default=0) or 1
    same = np.full((*texts.shape, width), -2)
    for b, row in enumerate(keys):
        for i, copies in enumerate(row):
            same[b, i, : len(copies)] = at[copies] if copies else []
    return np.where(same >= 0, same + 1, -2), same, same[..., 0] >= 0


def _sinks(stack: str, dataset: xr.Dataset) -> list[Observation]:
    received = dataset["received"].transpose("batch", "layer", "head", "key", ...).values.mean((0, 2), dtype=float)
    n = dataset.sizes["query"]
    if n < ENOUGH or dataset.sizes["key"] != n or not np.isfinite(received).any():
        return []
    even = np.ones(n)
    if dataset.attrs.get("causal"):  # query i would spread over i + 1 keys
        even = np.cumsum(1 / np.arange(n, 0, -1))[::-1]
    layers, overall = dataset["layer"].values, np.nanmean(received, axis=0)
    found = []
    for key in np.argsort(-overall)[:3]:
        if overall[key] < SINK_SHARE * n or overall[key] < SINK_TIMES * even[key]:
            continue
        by_layer = received[:, key] / n
        top = int(np.nanargmax(by_layer))
        what = "the first token" if key == 0 else f"token {int(dataset['key'].values[key])}"
        if "key_token" in dataset.coords and str(dataset["key_token"].values[0, key]).strip():
            what += f" ({str(dataset['key_token'].values[0, key]).strip()!r})"
        text = (
            f"{_name(stack)}: {overall[key] / n:.0%} of all attention goes to {what}, most in layer {int(layers[top])} "
            f"({by_layer[top]:.0%})."
        )
        found.append(Observation(text, stack, int(layers[top]), None, float(overall[key] / n)))
    return found


def _picture(stack: str, dataset: xr.Dataset) -> list[Observation]:
    """Which head looks at the picture most, from tokens after it, where that is well more than an even share."""
    if "image" not in dataset["role"].values or not dataset.attrs.get("causal") or "key_role" not in dataset.coords:
        return []
    patches = dataset["key_role"] == "image"
    asks = (dataset["query_role"] != "pad") & (dataset["query"] > dataset["key"].where(patches).max("key"))
    if not bool(asks.any()):
        return []
    share = dataset["mass"].sel(role="image").where(asks).mean(("batch", "query")).transpose("layer", "head")
    even = float((patches.sum("key") / (dataset["query"] + 1)).where(asks).mean())
    layer, head = np.unravel_index(np.nanargmax(share.values), share.shape)
    most, number = float(share[layer, head]), int(dataset["layer"].values[layer])
    if most < min(1.25 * even, 0.5 + even / 2):
        return []
    text = (
        f"{_name(stack)} layer {number} head {head} looks at the picture most: {most:.0%} of its attention from later "
        f"tokens, where all heads give it {float(share.mean()):.0%} and even attention would give it {even:.0%}."
    )
    return [Observation(text, stack, number, int(head), most)]


def _of(hits: float, count: int) -> str:
    return f"{hits / count:.0%} of positions ({int(hits)} of {count})"


def _name(stack: str) -> str:
    return stack.replace("_", " ").capitalize()
