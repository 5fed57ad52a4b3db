"""The report: a recording as one html file which needs nothing else, neither network nor Python.

The file holds a header (JSON), then blocks (base64 of raw deflate), which the page's modules in `view/` open when they
are needed. Blocks, all in C order:

- weights of a layer and sample: one byte a weight, `round(255 * sqrt(weight))`. Either every row (head, query, key; a
  causal row ends with the query's own position), or the largest weights of each row as planes: by rank one plane of
  weights and one for each byte of the key's index, each (head, query).
- a variable: 16 or 8 bits between its lowest and highest number, the last code being NaN;
  (batch, layer, head, role, query or key), where not all fit of `pooled` neighbours together.
- the means of every variable over all but (batch, layer, head): float32.

Padding has no row and no number, so that what is said of a sample is what would be said of its text alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup, escape
from PIL import Image

from .data import media
from .extras import listed
from .files import MARK, replaced
from .observations import SINK_SHARE, SINK_TIMES, sinks
from .padding import real, unpadded
from .statistics.rollout import rollout

if TYPE_CHECKING:
    from .observations import Observation

BUDGET = 12_000_000
LARGEST_PICTURE = 512  # pixels, longest side
MOST_KEYS = 64  # of a row, where not every row fits
MOST_SINKS = 8
ROLLOUT_SHARE = 0.1  # of the budget, at most
STATISTICS_SHARE = 0.5
MOST_POOLED = 64  # neighbours in one number
STRUCTURE = {"rows", "top_keys", "top_weights"}
ROW = ("batch", "layer", "head", "query", "key")
TOP = ("batch", "layer", "head", "query", "rank")


def write(
    tree: xr.DataTree,
    path: Path,
    *,
    findings: Sequence[Observation] = (),
    pictures: Sequence[Image.Image] = (),
    budget: int = BUDGET,
) -> Path:
    """Write the report of a recording as one html file of at most `budget` bytes; returns its path.

    A picture belongs to the patches whose `key_image` is its place in `pictures`. Where not every weight fits, each row
    keeps as many of its largest weights as do, or the stack keeps none, and the page says so. Statistics of long texts
    are kept as means of neighbouring positions. ValueError where the budget holds not even that.

    >>> import os, tempfile
    >>> import regard
    >>> from regard import report
    >>> from regard.observations import observe
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "entropy", "received", processor=tokenizer) as recording:
    ...     _ = model(**tokenizer("It was the best of times", return_tensors="pt"))
    >>> page = os.path.join(tempfile.mkdtemp(), "run.html")
    >>> report.write(recording.tree, page, findings=observe(recording.tree)).name
    'run.html'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"report: the folder {path.parent} does not exist; create it first")
    page = html(tree, findings=findings, pictures=pictures, budget=budget)
    try:
        with replaced(path) as draft:
            draft.write_bytes(page)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"the report could not be written to {path}: {error.strerror}") from error
    return path


def html(
    tree: xr.DataTree,
    *,
    findings: Sequence[Observation] = (),
    pictures: Sequence[Image.Image] = (),
    budget: int = BUDGET,
) -> bytes:
    """The report of a recording, as `write` writes it."""
    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"report: tree is a {type(tree).__name__}; give a DataTree, such as recording.tree")
    page, blocks = _packed(tree, findings, pictures, budget)
    made = page.html(blocks)
    if len(made) > budget:
        raise ValueError(_too_large(len(made), budget))
    return made


class Shown:
    """A report in a notebook: a frame that holds all of it, where HTML is shown, and otherwise the summary."""

    def __init__(self, page: bytes, words: str, height: int) -> None:
        self.page, self.words, self.height = page, words, height

    def __repr__(self) -> str:
        return self.words

    def _repr_html_(self) -> str:
        # The frame may run the page's script, and has no way to the notebook around it.
        inner = escape(self.page.decode())
        style = f"width:100%;height:{self.height}px;border:1px solid #8884;border-radius:6px"
        return (
            f'<iframe title="Regard" sandbox="allow-scripts allow-downloads" style="{style}" srcdoc="{inner}"></iframe>'
        )


Block = bytes | Callable[[], bytes]


def pack(
    tree: xr.DataTree, *, findings: Sequence[Observation] = (), pictures: Sequence[Image.Image] = ()
) -> tuple[dict[str, Any], list[Block]]:
    """What the page's modules draw a recording from, all of it: the header of a report, and its blocks, raw deflate.

    Blocks of weights are made when they are asked for, by a call. The header also holds `facts`, `notices` and
    `findings`, the words that a report says above its views.
    """
    page, blocks = _packed(tree, findings, pictures, None)
    known = {stack.name: stack for stack in page.stacks}
    model = page.model
    words = {"model": model, "facts": page._facts(model), "notices": page._notices()}
    return page.header() | words | {"findings": [page._finding(one, known) for one in findings]}, blocks


def _packed(
    tree: xr.DataTree, findings: Sequence[Observation], pictures: Sequence[Image.Image], budget: int | None
) -> tuple[_Page, list[Any]]:
    blocks: list[Any] = []
    stacks = [_Stack(name, node, blocks, level=9 if budget else 1) for name, node in _nodes(tree).items()]
    page = _Page(tree, stacks, findings, [picture(one) for one in pictures])
    if budget is None:
        _add_statistics(stacks, blocks, math.inf)
        for stack in stacks:
            stack.add_later(blocks)
        return page, blocks
    for stack in stacks:
        stack.add_rollout(blocks, ROLLOUT_SHARE * budget)
    _add_statistics(stacks, blocks, budget * STATISTICS_SHARE)
    _fit(stacks, blocks, lambda: len(page.html(blocks)), budget)
    return page, blocks


def _too_large(size: int, budget: int) -> str:
    return (
        f"report: {size:,} bytes without any weights, over budget={budget:,}. Raise budget=, or record fewer layers, "
        "fewer statistics or a shorter text"
    )


def _wrong_attribute(of: str, name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"report: the attribute {name} of {of} is {value!r:.60}; it needs {expected}")


def _nodes(tree: xr.DataTree) -> dict[str, xr.DataTree]:
    nodes = {name: node for name, node in tree.children.items() if {"layer", "head"} <= set(node.sizes)}
    if not nodes:
        raise ValueError(
            f"report: the tree holds no stack: of its nodes {list(tree.children)} none has the dims layer and head; "
            "give a recording's tree"
        )
    return nodes


def _fit(stacks: list[_Stack], blocks: list[bytes], fixed: Any, budget: int) -> None:
    """Append the weights' blocks: every row where that fits, and else as many keys a row as do."""
    stacks = [stack for stack in stacks if stack.holds_weights]
    count = sum(stack.samples * len(stack.layers) for stack in stacks)
    # Around each block: its tags, its number in the header, base64's padding.
    room = (budget - fixed() - 90 * count - 1000) * 3 // 4
    others = []
    # The smallest first, each with a fair part of what is left, so that a large stack does not starve the others.
    for i, stack in enumerate(sorted(stacks, key=lambda stack: stack.dense_size)):
        packed = stack.dense(room // (len(stacks) - i))
        if packed is None:
            others.append(stack)
            continue
        stack.weights |= {"blocks": stack.place(blocks, packed)}
        room -= sum(map(len, packed))
    growing = {stack.name: _Ranks(stack) for stack in others}
    kept = list(growing.values())
    while growing:
        for name, ranks in list(growing.items()):
            size = ranks.next_size()
            if size is None or size > room:
                del growing[name]
            else:
                ranks.take()
                room -= size
    for ranks in kept:
        if not ranks.k:
            ranks.stack.leave_out_weights()
            continue
        ranks.stack.weights |= {"k": ranks.k, "blocks": ranks.stack.place(blocks, ranks.packed())}
        ranks.stack.note_error(ranks.k)


def _add_statistics(stacks: list[_Stack], blocks: list[bytes], room: float) -> None:
    """Append the variables' blocks, in 16 bits, in 8, or as means of 2, 4, ... neighbours, as they fit."""
    bits, pooled = 16, 1
    while True:
        packed = [stack.pack_statistics(bits=bits, pooled=pooled) for stack in stacks]
        size = 4 * sum(len(one) for parts in packed for _, one in parts) / 3
        if size <= room or pooled >= MOST_POOLED:
            break
        bits, pooled = (8, 1) if bits == 16 else (8, 2 * pooled)
    for parts in packed:
        for variable, block in parts:
            variable.header["block"] = len(blocks)
            blocks.append(block)


def _deflate(data: bytes, level: int = 9) -> bytes:
    squeeze = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush()


def _codes(weights: np.ndarray) -> np.ndarray:
    """Weights as 8-bit roots; NaN is 0."""
    return np.rint(255 * np.sqrt(np.clip(np.nan_to_num(weights.astype(np.float32)), 0, 1))).astype(np.uint8)


def _error(weights: np.ndarray, codes: np.ndarray) -> float:
    off = np.abs(np.nan_to_num(weights.astype(np.float32)) - (codes / np.float32(255)) ** 2)
    return float(off.max(initial=0.0))


def _mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=axes)
    total = np.where(known, values, 0).sum(axis=axes, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _pooled(values: np.ndarray, n: int) -> np.ndarray:
    """Means of each `n` neighbours along the last axis, the last of fewer."""
    if n == 1:
        return values
    short = -values.shape[-1] % n
    wide = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)], constant_values=np.nan)
    return _mean(wide.reshape(*wide.shape[:-1], -1, n), (wide.ndim,)).astype(np.float32)


@dataclass
class _Variable:
    name: str
    label: str
    values: np.ndarray  # (batch, layer, head[, role][, query or key])
    along: str  # "query", "key" or ""
    roles: list[str] | None
    attrs: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)


class _Stack:
    """One node of the tree, checked, with its part of the page's header."""

    def __init__(self, name: str, node: xr.DataTree, blocks: list[Any], level: int) -> None:
        data, self.level = node.to_dataset(), level
        self.name, self.left_out, self.notices, self.error = name, [], [], 0.0
        self.data = unpadded(data if "batch" in data.dims else data.expand_dims("batch"))
        self.kind = str(data.attrs.get("kind", "self"))
        self.causal = bool(data.attrs.get("causal", False))
        self.samples = self.data.sizes["batch"]
        self.layers = self._labels("layer")
        self.heads = self._labels("head")
        self.query, self.key = self._side("query"), self._side("key")
        self.weights: dict[str, Any] = {}
        self._check_weights()
        self.variables = list(self._variables())
        if not any(one.along == "key" for one in self.variables):
            self.variables += self._received()
        self.sinks = self._sinks()
        self.rollout: dict[str, Any] = {}
        atlas = []
        for variable in self.variables:
            variable.header["atlas"] = len(atlas)
            atlas += list(self._reduced(variable))
        self.means = atlas
        self.atlas = len(blocks)
        blocks.append(_deflate(np.asarray(atlas, "<f4").tobytes(), level))

    def _labels(self, dim: str) -> list[int]:
        labels = self.data[dim].values  # xarray counts from 0 where there is no coordinate
        if labels.dtype.kind not in "iu":
            raise ValueError(f"report: stack {self.name!r}: coordinate {dim} is {labels.dtype}; it needs integers")
        return [int(x) for x in labels]

    def _side(self, side: str) -> dict[str, Any]:
        if side not in self.data.dims:
            # Only statistics without this dim: a self-attention stack still has its tokens on the other side.
            other = {"query": "key", "key": "query"}[side]
            known = self.kind == "self" and other in self.data.dims
            return (
                self._side(other)
                if known
                else {"position": [], "token": [[]] * self.samples, "role": [[]] * self.samples, "ids": False}
            )
        position = self._labels(side)
        side_of = {"position": position}
        for part, otherwise in (("token", [f" {x}" for x in position]), ("role", ["text"] * len(position))):
            side_of[part] = [[str(x) for x in row] for row in self._coordinate(f"{side}_{part}", side, otherwise)]
        # Without a processor tokens are ids, which would run into one another.
        side_of["ids"] = all(not token or token.isdigit() for row in side_of["token"] for token in row)
        if f"{side}_image" in self.data.coords:
            for part in ("image", "row", "column"):
                rows = self._coordinate(f"{side}_{part}", side, [-1] * len(position))
                side_of[part] = [[int(x) for x in row] for row in rows]
        return side_of

    def _coordinate(self, name: str, side: str, otherwise: list[Any]) -> np.ndarray:
        values = self.data.coords.get(name)
        if values is None:
            return np.broadcast_to(np.asarray(otherwise, dtype=object), (self.samples, len(otherwise)))
        if not {side} <= set(values.dims) <= {"batch", side}:
            raise ValueError(
                f"report: stack {self.name!r}: {name} has the dims {values.dims}; it needs (batch, {side})"
            )
        if "batch" not in values.dims:
            values = values.expand_dims(batch=self.samples)
        return values.transpose("batch", side).values

    def _array(self, name: str, dims: tuple[str, ...]) -> np.ndarray:
        values = self.data[name]
        if "batch" not in values.dims:
            values = values.expand_dims("batch")
        if set(values.dims) != set(dims):
            raise ValueError(f"report: stack {self.name!r}: {name} has the dims {values.dims}; it needs {dims}")
        return values.transpose(*dims).values

    def _check_weights(self) -> None:
        self.rows = self._array("rows", ROW) if "rows" in self.data else None
        pair = {"top_keys", "top_weights"} & set(self.data.data_vars)
        if len(pair) == 1:
            raise ValueError(
                f"report: stack {self.name!r} holds {pair.pop()} alone; top_keys and top_weights go together"
            )
        self.top = (self._array("top_keys", TOP), self._array("top_weights", TOP)) if pair else None
        weights = self.rows if self.rows is not None else self.top[1] if self.top else np.empty(0)
        if self.top and self.top[0].shape != self.top[1].shape:
            raise ValueError(f"report: stack {self.name!r}: top_keys and top_weights differ in shape")
        self.holds_weights = weights.size > 0
        if not self.holds_weights:
            return
        low, high = float(np.nanmin(weights, initial=0)), float(np.nanmax(weights, initial=0))
        if low < -1e-3 or high > 1 + 1e-2:
            self.notices.append(
                f"Some weights of this stack lie outside 0 to 1 (from {low:.2g} to {high:.2g}); "
                "they are drawn at the nearer end."
            )
        # A causal row is stored up to the query's own position, if nothing but zeros lies beyond.
        positions = np.asarray(self.key["position"]), np.asarray(self.query["position"])
        self.lengths = np.full(len(positions[1]), len(positions[0]))
        self.triangle = False
        if self.causal and self.rows is not None and bool((np.diff(positions[0]) > 0).all()):
            lengths = np.searchsorted(positions[0], positions[1], side="right")
            beyond = np.arange(len(positions[0])) >= lengths[:, None]
            self.triangle = not any(
                np.nan_to_num(self.rows[at][:, beyond]).any() for at in np.ndindex(self.samples, len(self.layers))
            )
            if self.triangle:
                self.lengths = lengths
        self.dense_size = (
            self.samples * len(self.layers) * len(self.heads) * int(self.lengths.sum())
            if self.rows is not None
            else 2**62
        )

    def _variables(self) -> Iterator[_Variable]:
        for name in map(str, self.data.data_vars):
            if name in STRUCTURE:
                continue
            values = self.data[name]
            rest = set(values.dims) - {"batch", "layer", "head"}
            along = rest & {"query", "key"}
            if not {"layer", "head"} <= set(values.dims) or rest - {"query", "key", "role"} or len(along) > 1:
                self.left_out.append(f"{name} of {self.name}, which has the dims {', '.join(map(str, values.dims))}")
                continue
            if values.dtype.kind not in "fiub":
                self.left_out.append(f"{name} of {self.name}, which holds no real numbers")
                continue
            if not values.notnull().any():
                self.left_out.append(f"{name} of {self.name}, which is not defined there")
                continue
            order = ["batch", "layer", "head", *(["role"] if "role" in rest else []), *along]
            roles = [str(x) for x in values["role"].values] if "role" in rest else None
            yield _Variable(
                name=name,
                label=str(values.attrs.get("long_name") or name.replace("_", " ")),
                values=self._array(name, tuple(order)).astype(np.float32),
                along="".join(along),
                roles=roles,
                attrs=values.attrs,
            )

    def _received(self) -> list[_Variable]:
        """What each key receives, out of the weights, for a recording without any variable by key."""
        if not self.holds_weights:
            return []
        about = "Sum over the queries of the weight that they give to the key."
        if self.rows is not None:
            values, label = np.nansum(self.rows, axis=3, dtype=np.float32), "Weight summed over the queries"
        else:
            keys, weights = self.places
            values = np.zeros((*keys.shape[:3], len(self.key["position"])), np.float32)
            for at in np.ndindex(keys.shape[:3]):
                values[at] = np.bincount(keys[at].ravel(), weights[at].ravel(), values.shape[-1])
            label, about = (
                "Weight summed over the queries, largest only",
                f"{about} Only of each row’s largest weights.",
            )
        return [_Variable("rows", label, values, "key", None, {"about": about})]

    def _sinks(self) -> list[list[dict[str, Any]]] | None:
        """Of each sample, the keys that are sinks, most attention first; where there is none, what comes closest."""
        received = [self.data["received"]] if "received" in self.data else [x.values for x in self._received()]
        if not received or not {"query", "key"} <= set(self.data.dims):
            return None
        dims = ("batch", "layer", "head", "key")
        values = received[0] if isinstance(received[0], np.ndarray) else self._array("received", dims)
        bare = self.data.drop_vars(set(self.data.data_vars))
        judged = sinks(bare.assign(received=(dims, values)))
        overall = judged["share"].mean("layer").transpose("batch", "key").values
        closest = np.nan_to_num(judged["times"].where(judged["share"] >= SINK_SHARE).max("layer").values)
        out = []
        for b in range(self.samples):
            keys = np.flatnonzero(judged["found"].values[b])
            keys = keys[np.argsort(-overall[b, keys], kind="stable")][:MOST_SINKS]
            found = [True] * len(keys)
            if not len(keys) and np.isfinite(overall[b]).any():
                best = closest[b].argmax() if closest[b].any() else np.nanargmax(overall[b])
                keys, found = np.array([best]), [False]
            parts = {name: judged[name].values[b][:, keys].T for name in ("share", "times")}
            out.append(
                [
                    {"key": int(key), "found": there, **{name: _numbers(part[i]) for name, part in parts.items()}}
                    for i, (key, there) in enumerate(zip(keys, found))
                ]
            )
        return out

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The largest weights of each row, descending, and their keys' indices; (batch, layer, head, query, rank)."""
        if self.top is None:
            k = min(MOST_KEYS, self.rows.shape[-1])
            keys = np.empty((*self.rows.shape[:-1], k), np.int32)
            weights = np.empty(keys.shape, np.float32)
            for at in np.ndindex(self.rows.shape[:3]):  # a head at a time: the indices of all would take gigabytes
                rows = np.nan_to_num(self.rows[at].astype(np.float32))
                keys[at] = np.argpartition(rows, rows.shape[-1] - k, axis=-1)[:, -k:]
                weights[at] = np.take_along_axis(rows, keys[at], -1)
        else:
            position, keys = np.asarray(self.key["position"]), self.top[0].astype(np.int64)
            weights = np.where(keys < 0, 0, np.nan_to_num(self.top[1]).astype(np.float32))
            order = np.argsort(position)
            places = order[np.searchsorted(position, keys, sorter=order).clip(0, len(position) - 1)]
            unknown = (keys >= 0) & (position[places] != keys)
            if unknown.any():
                raise ValueError(
                    f"report: stack {self.name!r}: top_keys holds the position {keys[unknown][0]}, which the "
                    f"coordinate key lacks ({position.min()} to {position.max()}); give absolute positions"
                )
            keys = np.where(keys < 0, 0, places)
        if (np.diff(weights, axis=-1) > 0).any():
            order = np.argsort(-weights, axis=-1, kind="stable")
            keys, weights = np.take_along_axis(keys, order, -1), np.take_along_axis(weights, order, -1)
        return keys, weights

    def _reduced(self, variable: _Variable) -> np.ndarray:
        """Means as (role or 1, batch, layer, head)."""
        values = variable.values
        if variable.along:
            values = _mean(values, (values.ndim - 1,))
        return np.moveaxis(values, -1, 0) if variable.roles is not None else values[None]

    def place(self, blocks: list[bytes], packed: list[bytes]) -> list[list[int]]:
        """Append a block for each sample and layer; their numbers by sample."""
        numbers = range(len(blocks), len(blocks) + len(packed))
        blocks.extend(packed)
        return np.reshape(numbers, (self.samples, len(self.layers))).tolist()

    def pack_statistics(self, *, bits: int, pooled: int) -> list[tuple[_Variable, bytes]]:
        packed = []
        for variable in self.variables:
            values = np.where(np.isfinite(variable.values), variable.values, np.nan)
            if variable.along:
                values = _pooled(values, pooled)
            known = values[~np.isnan(values)]
            low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
            none = 2**bits - 1
            limits = variable.attrs.get("range")
            variable.header |= {
                "name": variable.name,
                "label": variable.label,
                "units": str(variable.attrs.get("units", "")),
                "about": str(variable.attrs.get("about", "")),
                "range": None if limits is None else self._range(variable.name, limits),
                "along": variable.along,
                "roles": variable.roles,
                "low": low,
                "high": high,
                "bits": bits,
                "pooled": pooled,
                "block": None,
            }
            if variable.along:
                scaled = (values - low) / ((high - low) or 1) * (none - 1)
                codes = np.where(np.isnan(values), none, np.rint(np.nan_to_num(scaled))).astype(
                    "<u2" if bits == 16 else "u1"
                )
                packed.append((variable, _deflate(codes.tobytes(), self.level)))
        return packed

    def _range(self, name: str, limits: Any) -> list[float]:
        try:
            low, high = (float(x) for x in np.ravel(limits))
        except (ValueError, TypeError):
            low = high = np.nan
        if not np.isfinite([low, high]).all():
            raise _wrong_attribute(f"{name} of {self.name}", "range", limits, "two numbers")
        return [low, high]

    def leave_out_weights(self) -> None:
        self.weights = {}
        self.notices.append(
            "Weights are not shown: not even the largest of each row fits into this page. Its numbers are whole. "
            "Record fewer layers or a shorter text, or give the report a larger budget."
        )

    def dense(self, room: int) -> list[bytes] | None:
        """Every row, a block for each sample and layer, or None where that takes more than `room` bytes."""
        if self.rows is None:
            return None
        inside = np.arange(len(self.key["position"])) < self.lengths[:, None]
        packed, used, error = [], 0, 0.0
        for at in np.ndindex(self.samples, len(self.layers)):
            weights = self.rows[at]
            codes = _codes(weights)
            error = max(error, _error(weights, codes))
            packed.append(_deflate(codes[:, inside].tobytes()))
            used += len(packed[-1])
            # After one layer it shows: do not pack gigabytes which will not fit.
            if used > room or used / len(packed) * self.samples * len(self.layers) > 1.5 * room:
                return None
        self.weights = {"form": "dense", "triangle": self.triangle}
        self.error = max(self.error, error)
        return packed

    def add_rollout(self, blocks: list[bytes], room: float) -> None:
        """The rows of all layers multiplied up, half of each left to the residual stream."""
        self.rollout = {"blocks": None, "reason": self._no_rollout()}
        if self.rollout["reason"]:
            return
        packed = []
        inside = np.arange(self.rows.shape[-1]) < self.lengths[:, None]
        for rolled in self._all_rolled:
            codes = _codes(rolled)
            self.error = max(self.error, _error(rolled, codes))
            packed.append(_deflate(codes[inside].tobytes()))
        if 4 * sum(map(len, packed)) / 3 > room:
            self.rollout["reason"] = "the matrix is too large for this page"
            return
        self.rollout = {"blocks": list(range(len(blocks), len(blocks) + len(packed))), "triangle": self.triangle}
        blocks.extend(packed)

    def add_later(self, blocks: list[Any]) -> None:
        """Append blocks of weights and of their rollout that are made when they are called: none is left out."""
        reason = self._no_rollout()
        self.rollout = {"blocks": None, "reason": reason}
        if not reason:
            numbers = range(len(blocks), len(blocks) + self.samples)
            blocks.extend(partial(self._rolled, sample) for sample in range(self.samples))
            self.rollout |= {"blocks": list(numbers), "triangle": self.triangle}
        if not self.holds_weights:
            return
        if self.rows is not None:
            self.weights, make = {"form": "dense", "triangle": self.triangle}, self._dense_block
        else:
            keys = len(self.key["position"])
            width, k = (1 if keys <= 2**8 else 2 if keys <= 2**16 else 3), self.places[0].shape[-1]
            self.weights, make = {"form": "top", "width": width, "k": k}, self._top_block
        at = np.ndindex(self.samples, len(self.layers))
        self.weights["blocks"] = self.place(blocks, [partial(make, *one) for one in at])

    def _dense_block(self, *at: int) -> bytes:
        inside = np.arange(len(self.key["position"])) < self.lengths[:, None]
        return _deflate(_codes(self.rows[at])[:, inside].tobytes(), self.level)

    def _top_block(self, *at: int) -> bytes:
        keys, codes = self.places[0][at], _codes(self.places[1][at])
        planes = [
            plane.tobytes()
            for rank in range(keys.shape[-1])
            for plane in (
                codes[..., rank],
                *((keys[..., rank] >> 8 * i).astype(np.uint8) for i in range(self.weights["width"])),
            )
        ]
        return _deflate(b"".join(planes), self.level)

    @cached_property
    def _all_rolled(self) -> np.ndarray:
        there = real(self.data, "query").values[..., None]
        return rollout(self.data).values[:, -1] * there  # padding passes on what it has: no row of a text

    def _rolled(self, sample: int) -> bytes:
        inside = np.arange(self.rows.shape[-1]) < self.lengths[:, None]
        return _deflate(_codes(self._all_rolled[sample])[inside].tobytes(), self.level)

    def _no_rollout(self) -> str:
        if self.rows is None:
            return "it needs every row of every layer, and the recording holds none or only the largest weights"
        if self.kind != "self":
            return "it is defined for self attention"
        if self.query["position"] != self.key["position"]:
            return "it needs the rows of all tokens, and some were not recorded"
        if self.layers != list(range(len(self.layers))):
            return f"it needs every layer, and only {', '.join(map(str, self.layers))} were recorded"
        return ""

    def header(self) -> dict[str, Any]:
        grids = self.data.attrs.get("grids", [])
        try:
            grids = [[int(x), int(y)] for x, y in (json.loads(grids) if isinstance(grids, str) else grids)]
        except (ValueError, TypeError, RecursionError):
            raise _wrong_attribute(self.name, "grids", grids, "pairs of rows and columns") from None
        return {
            "name": self.name,
            "kind": self.kind,
            "causal": self.causal,
            "samples": self.samples,
            "layers": self.layers,
            "heads": self.heads,
            "sites": [str(x) for x in np.ravel(self.data.attrs.get("sites", []))],
            "grids": grids,
            "kinds": self._kinds(),
            "query": self.query,
            "key": self.key,
            "variables": [variable.header for variable in self.variables],
            "atlas": self.atlas,
            "weights": self.weights or None,
            "rollout": self.rollout,
            "notices": self.notices,
            "sinks": self.sinks,
            "unread": self._unread(),
        }

    def _unread(self) -> list[str] | None:
        """Of each sample, the token that was generated last: it was never run, so it is neither query nor key."""
        last = self.data.attrs.get("unread")
        last = [last] if isinstance(last, str) else last
        if not isinstance(last, (list, tuple, np.ndarray, type(None))):
            raise _wrong_attribute(self.name, "unread", last, "a text for each sample")
        return None if last is None or len(last) != self.samples else [str(x) for x in last]

    def tokens(self) -> int:
        """Of the longest sample, padding not counted; of cross attention, those that look."""
        side = "key" if self.kind == "self" else "query"
        if not self.query["position"] and not self.key["position"]:
            return 0
        side = side if side in self.data.dims else {"query": "key", "key": "query"}[side]
        return int(real(self.data, side).sum(side).max())

    def _kinds(self) -> list[list[str]] | None:
        """What an atlas says of each head, in words."""
        if "kinds" not in self.data.coords:
            return None
        kinds, stages = (self.data[name].transpose("layer", "head").values for name in ("kinds", "stages"))
        return [[f"{k} ({s})" if s else str(k) for k, s in zip(*rows)] for rows in zip(kinds, stages)]

    def start(self, findings: Sequence[Any]) -> list[int]:
        """Indices of the layer and head to open with: the first one found, or the highest of the first variable."""
        for finding in findings:
            if finding.stack == self.name and finding.layer in self.layers and finding.head in self.heads:
                return [self.layers.index(finding.layer), self.heads.index(finding.head)]
        if not self.means or not np.isfinite(self.means[0][0]).any():
            return [0, 0]
        return [int(x) for x in np.unravel_index(np.nanargmax(self.means[0][0]), self.means[0][0].shape)]

    def note_error(self, k: int) -> None:
        _, weights = self.places
        self.error = max(self.error, _error(weights[..., :k], _codes(weights[..., :k])))


class _Ranks:
    """A stack's largest weights, packed rank by rank, so that what k ranks take is known without packing anew."""

    def __init__(self, stack: _Stack) -> None:
        self.stack, self.k = stack, 0
        self.keys, weights = stack.places
        self.codes = _codes(weights)
        keys = len(stack.key["position"])
        self.width = 1 if keys <= 2**8 else 2 if keys <= 2**16 else 3
        stack.weights = {"form": "top", "width": self.width}
        self.at = list(np.ndindex(self.keys.shape[:2]))
        self.squeeze = [zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS) for _ in self.at]
        self.parts: list[list[bytes]] = [[] for _ in self.at]
        self.next: list[bytes] = []

    def next_size(self) -> int | None:
        """Bytes of one rank more; None if there is none."""
        if self.k == self.keys.shape[-1]:
            return None
        self.next = []
        for at, squeeze in zip(self.at, self.squeeze, strict=True):
            keys = self.keys[at][..., self.k]
            planes = [self.codes[at][..., self.k], *((keys >> 8 * i).astype(np.uint8) for i in range(self.width))]
            data = b"".join(plane.tobytes() for plane in planes)
            # A flushed stream may be cut there, and ended with an empty last block.
            self.next.append(squeeze.compress(data) + squeeze.flush(zlib.Z_SYNC_FLUSH))
        return sum(map(len, self.next)) + (0 if self.k else 2 * len(self.at))

    def take(self) -> None:
        self.k += 1
        for parts, part in zip(self.parts, self.next, strict=True):
            parts.append(part)

    def packed(self) -> list[bytes]:
        return [b"".join(parts) + b"\x03\x00" for parts in self.parts]


def picture(image: Image.Image) -> dict[str, Any]:
    """The picture, no side longer than `LARGEST_PICTURE`, as a data address: PNG or JPEG, whichever is smaller."""
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"report: pictures holds a {type(image).__name__}; give PIL images (Image.fromarray, Image.open)"
        )
    image = media.picture(image, "report: a picture")
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    drawn = {}
    for kind, knobs in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        out = io.BytesIO()
        image.save(out, kind, **knobs)
        drawn[kind] = out.getvalue()
    kind = min(drawn, key=lambda kind: len(drawn[kind]))
    source = f"data:image/{kind};base64,{base64.b64encode(drawn[kind]).decode()}"
    return {"source": source, "width": image.width, "height": image.height}


class Standalone:
    """A page of `view/` as one file, which may load nothing and run nothing but its own style and modules.

    template: what stands in its body. script: the module that the page begins with; what it imports comes along.
    """

    def __init__(self, template: str, *styles: str, script: str) -> None:
        view = resources.files("regard") / "view"
        self.style = "".join((view / style).read_text("utf-8") for style in styles)
        self.script = _bundle(view, script)
        loader = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
        parts = [(view / part).read_text("utf-8") for part in ("head.html", template)]
        self.template = loader.from_string("".join(parts))
        self.policy = (
            f"default-src 'none'; img-src data:; style-src {_digest(self.style)}; script-src {_digest(self.script)}; "
            "base-uri 'none'; form-action 'none'"
        )

    def html(self, header: Any, **words: Any) -> bytes:
        """The file, with `words` in the template's places, and `header` for the script to read."""
        html = self.template.render(
            mark=MARK,
            policy=Markup(self.policy),  # made of constants and digests
            style=Markup(self.style),
            script=Markup(self.script),
            header=Markup(_json(header)),
            **words,
        )
        return html.encode("utf-8", "replace")  # half a surrogate pair in a name becomes a question mark


class _Page:
    """Everything around the data: words, template, modules."""

    def __init__(
        self, tree: xr.DataTree, stacks: list[_Stack], findings: Sequence[Any], pictures: list[dict[str, Any]]
    ) -> None:
        self.attrs, self.stacks, self.findings, self.pictures = tree.attrs, stacks, findings, pictures
        self.page = Standalone("report.html", "report.css", script="page.js")

    @property
    def model(self) -> str:
        return str(self.attrs.get("model") or self.attrs.get("architecture") or "A recording")

    def header(self) -> dict[str, Any]:
        known = [stack.name for stack in self.stacks]
        first = next((finding.stack for finding in self.findings if finding.stack in known), known[0])
        return {
            "stacks": [stack.header() for stack in self.stacks],
            "pictures": self.pictures,
            "starts": [stack.start(self.findings) for stack in self.stacks],
            "start": known.index(first),
            "sink": {"share": SINK_SHARE, "times": SINK_TIMES},
        }

    def html(self, blocks: list[bytes]) -> bytes:
        attrs, model = self.attrs, self.model
        known = {stack.name: stack for stack in self.stacks}
        return self.page.html(
            self.header(),
            title=f"{model}: where it looks",
            model=model,
            facts=self._facts(model),
            partial=bool(attrs.get("partial", False)),
            notices=self._notices(),
            findings=[self._finding(finding, known) for finding in self.findings],
            precision=self._precision(),
            left_out=[words for stack in self.stacks for words in stack.left_out],
            versions=[f"{name} {attrs[name]}" for name in ("regard", "transformers", "torch") if attrs.get(name)],
            blocks=[Markup(base64.b64encode(block).decode()) for block in blocks],
        )

    def _facts(self, model: str) -> list[str]:
        attrs, facts = self.attrs, []
        if attrs.get("architecture") and attrs["architecture"] != model:
            facts.append(str(attrs["architecture"]))
        for stack in self.stacks:
            size = f"{len(stack.layers)} layers × {len(stack.heads)} heads"
            count = stack.tokens()
            several = f"{stack.samples} samples of at most " if stack.samples > 1 else ""
            tokens = f"{several}{count} tokens, " if count else ""
            facts.append((f"{stack.name.replace('_', ' ')}: " if len(self.stacks) > 1 else "") + tokens + size)
        if attrs.get("attention") or attrs.get("dtype"):
            facts.append(" ".join(str(attrs[name]) for name in ("attention", "dtype") if attrs.get(name)))
        if attrs.get("created"):
            facts.append(_date(str(attrs["created"])))
        if attrs.get("seconds") is not None:
            try:
                facts.append(f"recorded in {float(attrs['seconds']):.3g} s")
            except (ValueError, TypeError):
                raise _wrong_attribute("the tree", "seconds", attrs["seconds"], "a number") from None
        return facts

    def _notices(self) -> list[str]:
        notices = []
        if self.attrs.get("partial"):
            notices.append(
                "Partial: the recording was interrupted. What is here was recorded before that; the rest is missing."
            )
        unreached = []
        for missing in (self.attrs.get("unreached", []), self.attrs.get("refused", [])):
            unreached += [missing] if isinstance(missing, str) else [str(x) for x in np.ravel(missing)]
        if any(unreached):
            notices.append(f"Not read, though they attend: {listed(unreached)}. Nothing on this page includes them.")
        if self.attrs.get("note"):
            notices.append(str(self.attrs["note"]))
        return notices

    def _finding(self, finding: Any, known: dict[str, _Stack]) -> dict[str, str]:
        stack = known.get(finding.stack)
        if stack is None or (finding.layer is not None and finding.layer not in stack.layers):
            return {"text": finding.text, "link": "", "where": ""}
        where = [stack.name.replace("_", " ")] if len(known) > 1 or finding.layer is None else []
        parts = [quote(finding.stack, safe="")]
        if finding.layer is not None:
            where.append(f"layer {finding.layer}")
            parts.append(str(finding.layer))
            if finding.head is not None and finding.head in stack.heads:
                where.append(f"head {finding.head}")
                parts.append(str(finding.head))
        return {"text": finding.text, "link": f"#{'/'.join(parts)}", "where": ", ".join(where)}

    def _precision(self) -> str:
        bits = {variable.header.get("bits") for stack in self.stacks for variable in stack.variables}
        words = []
        if any(stack.weights for stack in self.stacks):
            error = max(stack.error for stack in self.stacks)
            words.append(
                "Weights are kept in 8 bits on a square-root scale: none shown is off by more than "
                f"{100 * error:.2g} percentage points, small ones by far less."
            )
        for number in sorted(bits - {None}):
            words.append(
                f"Other numbers are kept in {number} bits: off by at most {50 / (2**number - 2):.1g}% of their range."
            )
        pooled = max((x.header.get("pooled", 1) for stack in self.stacks for x in stack.variables), default=1)
        if pooled > 1:
            words.append(f"Along the tokens each stands for the mean of {pooled} neighbours.")
        return " ".join(words)


def _bundle(view: Any, first: str) -> str:
    """The page's modules as one, each after what it imports. Their top-level names must differ."""
    seen: list[str] = []
    out: list[str] = []

    def add(name: str) -> None:
        if name in seen:
            return
        seen.append(name)
        source = (view / name).read_text("utf-8")
        for needed in re.findall(r'^import [^;]* from "\./([\w.]+)";$', source, re.M):
            add(needed)
        source = re.sub(r'^import [^;]* from "[^"]*";\n', "", source, flags=re.M)
        out.append(re.sub(r"^export ", "", source, flags=re.M))

    add(first)
    return "\n".join(out)


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _numbers(values: np.ndarray) -> list[float | None]:
    """Four digits; None where there is no number."""
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in values.tolist()]


def _json(value: Any) -> str:
    """JSON which cannot end the script element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only: no U+2028, no lone surrogate
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _date(text: str) -> str:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when.day} {when:%B %Y, %H:%M}"
