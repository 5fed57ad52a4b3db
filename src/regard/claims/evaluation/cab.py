"""Declared mechanisms under four attention patterns: what it recalls, and from which length on it pays.

Quality is `regard.evaluation.cab`'s: one layer trained on tasks of recall. Blocks, where a mechanism has them, are of 4
tokens there, so that what is sparse is sparse on its short sequences. Lengths are measured forward, at the mechanisms'
own knobs, against attention that holds its map, which is the paper's vanilla attention, and against PyTorch's own,
which does not. The small scale has a few of each kind; `regard compare` has them all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...evaluation.cab import PATTERNS, cab, efficiency_length
from ...mechanisms import operators, spec_of
from .._measure import peak_bytes, seconds

SCALES = "small", "large"
STEPS = {"small": 400, "large": 2000}
LENGTHS = {"small": (256, 512, 1024, 2048, 4096), "large": (256, 512, 1024, 2048, 4096, 8192)}
# Softmax attention with and without a bias, and some of each other kind: linear, decayed, block-sparse, windowed.
SMALL = (
    *("memory_efficient", "flashbias", "efficient_attention", "lightning_2"),
    *("moba", "neighborhood", "power"),
)
HEADS, DIM = 2, 32
EXACT = "memory_efficient"  # softmax attention itself
BLOCK = 4  # tokens, of mechanisms that have blocks, where they are trained: sequences are short
SQUARE = 3.5  # growth of operations with twice the length, above which a cost is no line

EXPECTED = (
    "softmax attention is within 2 points of the best in every pattern; no mechanism of linear cost comes within 2 "
    "points of it in cross attention or in causal self attention; one of linear cost has an efficiency length in time "
    "within the lengths measured, and each has a shorter one in memory than in time"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """One command ranks mechanisms by quality in each pattern and by efficiency length."""
    found = ranked(scale=scale, seed=seed)
    exact = found["accuracy"].sel(mechanism=EXACT)
    linear = found.sel(mechanism=found["linear"])
    best = bool((exact >= found["accuracy"].max("mechanism") - 0.02).all())
    short = linear["accuracy"].sel(pattern=list(PATTERNS[1:]))
    behind = bool((short.isnull() | (short < exact.sel(pattern=list(PATTERNS[1:])) - 0.02)).all())
    pays = bool((linear["length"].sel(cost="time", beside="map") <= max(LENGTHS[scale])).any())
    lengths = linear["length"].sel(beside="map")
    sooner = bool((lengths.sel(cost="memory") <= lengths.sel(cost="time")).all())
    shares = found["accuracy"].transpose("mechanism", "pattern").values
    recalls = [", ".join(f"{p} {a:.0%}" for p, a in zip(PATTERNS, row) if not math.isnan(a)) for row in shares]
    measured = "; ".join(f"{name}: {recall}" for name, recall in zip(found["mechanism"].values, recalls))
    said = "; ".join(
        f"{name} {_said(found, name, 'time')} in time, {_said(found, name, 'memory')} in memory"
        for name in linear["mechanism"].values
    )
    measured = (
        f"Recall after {STEPS[scale]} steps, best first: {measured}. Efficiency length beside a map: "
        f"{said or 'none is linear'}."
    )
    return Finding(best and behind and pays and sooner, measured, EXPECTED, seed, draw=partial(_draw, found))


def ranked(*, scale: str = "small", seed: int = 0) -> xr.Dataset:
    """`cab` of all declared mechanisms, best first by mean index, with `linear` and `length` [mechanism, cost, beside].

    length: `efficiency_length` in time and memory, beside attention that holds its map and PyTorch's own; in time
    infinite of a mechanism whose operations grow with the square of length, which are those that are not `linear`.
    """
    ways = {n: op for n, op in operators().items() if (scale != "small" or n in SMALL) and not spec_of(op).ahead}
    found = cab({name: _small(op) for name, op in ways.items()}, steps=STEPS[scale], seed=seed)
    linear, lengths = {}, {}
    for name, operator in ways.items():
        linear[name], lengths[name] = _lengths(operator, LENGTHS[scale])
    dims = ("mechanism", "cost", "beside")
    coords = {"mechanism": list(lengths), "cost": ["time", "memory"], "beside": ["map", "torch"]}
    found["length"] = xr.DataArray(list(lengths.values()), dims=dims, coords=coords)
    found["linear"] = xr.DataArray(list(linear.values()), dims="mechanism", coords={"mechanism": list(linear)})
    return found.sortby(-found["index"].mean("pattern"))


def _small(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(operator, block=BLOCK) if "block" in inspect.signature(operator).parameters else operator


def _lengths(operator: Callable[..., Tensor], lengths: tuple[int, ...]) -> tuple[bool, list[list[float]]]:
    """Whether its operations grow less than with the square of length; its efficiency lengths [cost, beside]."""
    spec = spec_of(operator)
    causal, n = "full" not in spec.patterns, lengths[-1]
    once, twice = (spec.cost(n, n, DIM, causal=causal).operations for n in (n, 2 * n))
    ways = [
        lambda x: operator(x, x, x, causal=causal),
        partial(_map, causal),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=causal),
    ]
    inputs = [torch.randn(1, HEADS, n, DIM) for n in lengths]
    own, *peers = zip(*([float(peak_bytes(partial(way, x))) for way in ways] for x in inputs))
    memory = [efficiency_length(lengths, own, peer) for peer in peers]
    if twice / once > SQUARE:
        return False, [[math.inf] * len(peers), memory]
    own, *peers = zip(*(seconds(*(partial(way, x) for way in ways)) for x in inputs))
    return True, [[efficiency_length(lengths, own, peer) for peer in peers], memory]


def _map(causal: bool, x: Tensor) -> Tensor:
    scores = x @ x.mT * DIM**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ x


def _said(found: xr.Dataset, name: Any, cost: str, beside: str = "map") -> str:
    length = float(found["length"].sel(mechanism=name, cost=cost, beside=beside))
    return "never" if math.isinf(length) else f"{length:,.0f}"


def _draw(found: xr.Dataset, figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = found["mechanism"].values
    for i, pattern in enumerate(PATTERNS):
        places = [k + 0.2 * (i - 1.5) for k in range(len(names))]
        left.bar(places, found["accuracy"].sel(pattern=pattern).fillna(0), width=0.18, label=pattern)
    left.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    left.set(ylabel="asked keys answered", ylim=(0, 1.3), yticks=(0, 0.5, 1), title="Recall; no bar: not supported")
    left.legend(frameon=False, ncols=2, fontsize=8, loc="upper left")
    right.axis("off")
    columns = [("time", "map"), ("time", "torch"), ("memory", "map")]
    rows = [[name.replace("_", " "), *(_said(found, name, *column) for column in columns)] for name in names]
    heads = ["beside", "map\ntime", "PyTorch\ntime", "map\nmemory"]
    table = right.table(rows, colLabels=heads, loc="center", colWidths=(0.42, 0.18, 0.2, 0.2))
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.8)
    right.set_title("Efficiency length, tokens")
