"""Attention mechanisms under four patterns: what they can recall, and from which length on they pay.

Zhang et al., CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling (arXiv:2210.07661), by the authors'
repository; we had that and the abstract, not the whole text. Attention is self or cross, causal or not; in causal cross
attention, what a query gives may depend on no later query.

Deviation: the paper trains seven published models on data of 300 to 16,000 tokens. Here each
pattern has one task of recall, made afresh at every step, on which one layer is trained from scratch in seconds: a key
that is asked for stands once among pairs of key and value. Recall is what attention is for and what efficient ones are
short of; the ranking of other tasks may differ. So the compositional index has one task a pattern, and its mean and
deviation are those of the mechanisms that are compared, where the paper's are of its own nine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
HEADS, DIM = 4, 16  # of the layer that is trained
SYMBOLS, PAIRS, ASKED = 64, 48, 16  # keys and values there are; pairs shown; pairs asked for

Operator = Callable[..., Tensor]


def cab(operators: Mapping[str, Operator], *, steps: int = 300, seed: int = 0) -> xr.Dataset:
    """What each mechanism recalls in each pattern that it supports. [mechanism, pattern]

    `accuracy`, 0 to 1 (chance is 1 in 64), NaN where the pattern is not supported; `index`, the compositional index:
    standard deviations above the mean of the mechanisms that support the pattern. operators: with a `spec`, such as
    `regard.mechanisms.operators()`, or such with knobs, as `functools.partial`. steps: of training, for each.

    >>> from regard.mechanisms import operators
    >>> found = cab({"memory_efficient": operators()["memory_efficient"]}, steps=2)
    >>> dict(found.sizes)
    {'mechanism': 1, 'pattern': 4}
    """
    found = xr.DataArray(
        np.full((len(operators), len(PATTERNS)), np.nan),
        dims=("mechanism", "pattern"),
        coords={"mechanism": list(operators), "pattern": list(PATTERNS)},
    )
    for name, operator in operators.items():
        for pattern in supported(operator):
            found.loc[name, pattern] = recall(operator, pattern, steps=steps, seed=seed)
    return xr.Dataset({"accuracy": found, "index": compositional_index(found)})


def supported(operator: Operator) -> list[str]:
    """The patterns that a mechanism supports: as it declares, and causal cross where later queries change nothing."""
    declared = _spec(operator).patterns
    found = [p for p, has in zip(PATTERNS, ("full" in declared, "causal" in declared, "cross" in declared)) if has]
    if "cross" in declared:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 2, n, 8, generator=generator) for n in (9, 21, 21))
        whole = operator(query, key, value, causal=False)
        parts = [operator(query[:, :, :n], key, value, causal=False) for n in (1, 4, 8)]
        if all(torch.allclose(part, whole[:, :, : part.shape[2]], atol=1e-4) for part in parts):
            found.append("causal cross")
    return found


def recall(operator: Operator, pattern: str, *, steps: int = 300, batch: int = 32, seed: int = 0) -> float:
    """Share of asked keys whose value one layer with this attention gives after training, 0 to 1.

    noncausal self: pairs, of some of which the value is hidden and shown with the same key elsewhere. causal self: the
    same, shown before. noncausal cross: keys asked of a source of pairs. causal cross: the value of one pair is the key
    that is asked for next, so that looking ahead would give it away.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = _Layer(operator, pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        *given, answer = task(pattern, batch, generator)
        loss = F.cross_entropy(model(*given).flatten(0, 1), answer.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *given, answer = task(pattern, 256, torch.Generator().manual_seed(seed + 10**6))
    with torch.no_grad():
        right = model(*given).argmax(-1) == answer
    return float(right[answer >= 0].float().mean())


def compositional_index(scores: xr.DataArray) -> xr.DataArray:
    """Standard deviations above the mean of the mechanisms; higher is better. [mechanism, pattern]

    NaN where there is no score, and 0 where all are equal.
    """
    deviation = scores.std("mechanism")
    index = (scores - scores.mean("mechanism")) / deviation.where(deviation > 0)
    return index.fillna(0.0).where(scores.notnull())


def efficiency_length(lengths: Sequence[float], costs: Sequence[float], vanilla: Sequence[float]) -> float:
    """The length from which on a mechanism costs less than vanilla attention: 0, from any; infinite, never.

    costs, vanilla: seconds, or bytes, at each of `lengths`. A line is fitted to the one and a parabola to the other, as
    in the paper; the length is where they meet. So it says nothing of a mechanism whose cost is no line.

    >>> round(efficiency_length([1, 2, 3, 4], [6, 8, 10, 12], [1, 4, 9, 16]), 3)
    3.236
    """
    if not len(lengths) == len(costs) == len(vanilla) >= 3:
        raise ValueError(
            f"efficiency_length: give both costs at each length, three or more; got {len(lengths)} lengths, "
            f"{len(costs)} and {len(vanilla)} costs"
        )
    over = np.polynomial.Polynomial.fit(lengths, vanilla, 2).convert().coef
    under = np.polynomial.Polynomial.fit(lengths, costs, 1).convert().coef
    apart = np.pad(over, (0, 3 - len(over))) - np.pad(under, (0, 3 - len(under)))
    if apart[2] <= 0:
        return math.inf
    meets = np.roots(apart[::-1])
    return max(0.0, float(meets.real.max())) if np.isreal(meets).all() else 0.0


class _Layer(nn.Module):
    """Embeddings, one attention layer, a feed-forward layer, and the values."""

    def __init__(self, operator: Operator, pattern: str) -> None:
        super().__init__()
        self.operator, self.causal = operator, pattern == "causal self"
        width = HEADS * DIM
        self.keys = nn.Embedding(SYMBOLS, width // 2)
        self.values = nn.Embedding(SYMBOLS + 1, width // 2)  # the last: hidden
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.write = (nn.Linear(width, width) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.read = nn.Linear(width, SYMBOLS)

    def forward(self, key: Tensor, value: Tensor, asked: Tensor | None) -> Tensor:
        source = self._embedded(key, value)
        hidden = source if asked is None else self._embedded(asked, torch.full_like(asked, SYMBOLS))
        heads = [
            some.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for some in (self.query(hidden), self.key(source), self.value(source))
        ]
        hidden = hidden + self.write(self.operator(*heads, causal=self.causal).transpose(1, 2).flatten(2))
        return self.read(hidden + self.feed(self.after(hidden)))

    def _embedded(self, key: Tensor, value: Tensor) -> Tensor:
        return self.norm(torch.cat([self.keys(key), self.values(value)], -1))


def task(pattern: str, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys and values shown, keys asked for (None: those shown whose value is hidden), answers (-1: none)."""

    def shuffled(n: int) -> Tensor:
        return torch.rand(batch, n, generator=generator).argsort(1)

    key, value = shuffled(SYMBOLS)[:, :PAIRS], shuffled(SYMBOLS)[:, :PAIRS]
    if pattern == "causal cross":  # a ring of keys, each the value of the one before
        value = key.roll(-1, 1)
        start = torch.randint(PAIRS, (batch, 1), generator=generator)
        place = (start + torch.arange(ASKED)) % PAIRS
        asked, answer, order = key.gather(1, place), value.gather(1, place), shuffled(PAIRS)
        return key.gather(1, order), value.gather(1, order), asked, answer
    place = shuffled(PAIRS)[:, :ASKED]
    asked, answer = key.gather(1, place), value.gather(1, place)
    if pattern == "noncausal cross":
        return key, value, asked, answer
    hidden = torch.full_like(asked, SYMBOLS)
    key, value = torch.cat([key, asked], 1), torch.cat([value, hidden], 1)
    answer = torch.cat([torch.full((batch, PAIRS), -1), answer], 1)
    if pattern == "noncausal self":
        order = shuffled(PAIRS + ASKED)
        key, value, answer = (some.gather(1, order) for some in (key, value, answer))
    return key, value, None, answer


def _spec(operator: Any) -> Any:
    while hasattr(operator, "func"):
        operator = operator.func
    if not hasattr(operator, "spec"):
        raise TypeError(f"{operator!r} is not a mechanism: declare it with @regard.mechanisms.mechanism(...)")
    return operator.spec
