"""Qiao (arXiv:2508.08289): how many associations linear attention recalls, and how errors spread over layers.

Keys and values are random vectors of length 1. At worst, the value of each other association points along the recalled
one's error. Layers form a chain: what one recalls is the cue of the next. Capacity is the number of associations,
between two tried, at which the error passes one half. The control has keys that are orthogonal: it recalls without
error, as the theory of random keys does not say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...studies.pavlovian import error_propagation, pavlovian, recall_error, worst_error
from .._measure import exponent

SCALES = "small", "large"
DIMS, COUNTS = (16, 32, 64, 128, 256), (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TRIALS = {"small": 200, "large": 2000}
CHAIN, DEPTH = 64, 6  # dimensions, layers
CHAINS = ((16, 1), (48, 1), (96, 1), (48, 4))  # associations, heads

EXPECTED = (
    "the mean error is within 10% of sqrt((n - 1) / d) for all n and d tried; the number of associations at which it "
    "passes one half grows as d to the 1 (+-0.1), and at worst as d to the 0.5 (+-0.1); over six layers the error is "
    "within 15% of what is predicted, below and above capacity, with one head and with four; the same counts of "
    "orthogonal keys are recalled without error"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Recall fails where theory says, in the mean and at worst; errors grow over depth as it says."""
    generator = torch.Generator().manual_seed(seed)
    trials = TRIALS[scale]
    mean: dict[int, list[float]] = {}
    worst: dict[int, list[float]] = {}
    spreads: list[float] = []
    for dim in DIMS:
        mean[dim], worst[dim] = [], []
        for count in COUNTS:
            key, value = (_units(trials, count, dim, generator=generator) for _ in range(2))
            squared = (pavlovian(key, value, key) - value).square().sum(-1).mean(1)  # of each trial
            mean[dim].append(float(squared.mean().sqrt()))
            spreads.append(float(squared.std() / trials**0.5 / squared.mean() / 2))  # of the root, relative
            others = (key @ key.mT).abs().sum(-1) - 1
            worst[dim].append(float(others.mean()))
    off = max(
        abs(error / recall_error(count, dim) - 1)
        for dim in DIMS
        for count, error in zip(COUNTS, mean[dim])
        if count > 1
    )
    grown = {name: exponent(DIMS, [_crossing(errors[dim]) for dim in DIMS]) for name, errors in _named(mean, worst)}
    chains = {at: _chain(*at, trials, generator) for at in CHAINS}
    predicted = {(n, heads): error_propagation(n, CHAIN, DEPTH, heads=heads) for n, heads in CHAINS}
    astray = max(abs(a / b - 1) for at in CHAINS for a, b in zip(chains[at], predicted[at]))
    straight = torch.eye(64, dtype=torch.float64).expand(8, 64, 64)
    value = _units(8, 64, 64, generator=generator)
    control = float((pavlovian(straight, value, straight) - value).abs().max())
    noise = max(spreads)
    measured = (
        f"mean errors are within {off:.0%} of the prediction (standard errors {noise:.1%} at most; with 64 orthogonal "
        f"keys {control:.0e}); capacity grows as d to the {grown['mean']:.2f} in the "
        f"mean (d = 256: {_crossing(mean[256]):.0f} associations) and {grown['worst']:.2f} at worst "
        f"({_crossing(worst[256]):.0f}); over {DEPTH} layers errors are within {astray:.0%} of the prediction: with 96 "
        f"associations in {CHAIN} dimensions {chains[96, 1][0]:.1f} becomes {chains[96, 1][-1]:.1f}, with 48 "
        f"{chains[48, 1][-1]:.1f}, with 48 and four heads {chains[48, 4][-1]:.1f}."
    )
    holds = off <= 0.1 and abs(grown["mean"] - 1) <= 0.1 and abs(grown["worst"] - 0.5) <= 0.1 and astray <= 0.15
    holds = holds and control <= 1e-9

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for i, dim in enumerate(DIMS[::2]):
            left.loglog(COUNTS, mean[dim], "o", color=f"C{i}", ms=4, label=f"d = {dim}")
            left.loglog(COUNTS, [recall_error(n, dim) for n in COUNTS], color=f"C{i}")
            left.loglog(COUNTS, worst[dim], "x--", color=f"C{i}", ms=4)
        left.axhline(0.5, color="grey", linestyle=":")
        left.plot([], [], "x--", color="grey", label="at worst")
        left.set(xlabel="associations", title="Error of recall")
        left.legend()
        lines = {"mean": [1 + dim / 4 for dim in DIMS], "worst": [1 + 0.5 / worst_error(2, dim) for dim in DIMS]}
        for (name, errors), marker in zip(_named(mean, worst), "ox"):
            middle.loglog(DIMS, [_crossing(errors[dim]) for dim in DIMS], marker, color="black", label=name)
            middle.loglog(DIMS, lines[name], color="grey")
        middle.minorticks_off()
        middle.set_xticks(DIMS, [str(dim) for dim in DIMS])
        middle.set_yticks((4, 8, 16, 32, 64), ["4", "8", "16", "32", "64"])
        middle.set(xlabel="dimensions", title="Associations at error 1/2")
        middle.legend()
        for i, (at, errors) in enumerate(chains.items()):
            name = f"{at[0]} pairs, {at[1]} head{'s' * (at[1] > 1)}"
            right.semilogy(range(1, DEPTH + 1), errors, "o", color=f"C{i}", label=name)
            right.semilogy(range(1, DEPTH + 1), predicted[at], color=f"C{i}")
        right.set(xlabel="layer", title=f"Error over layers, d = {CHAIN}", ylim=(0.3, 300))
        right.legend()

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _named(mean: dict[int, list[float]], worst: dict[int, list[float]]) -> list[tuple[str, dict[int, list[float]]]]:
    return [("mean", mean), ("worst", worst)]


def _units(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def _crossing(errors: list[float], at: float = 0.5) -> float:
    """Number of associations at which the error passes `at`, on the line between the two tried."""
    after = next(i for i, error in enumerate(errors) if error > at)
    if after == 0:
        return float(COUNTS[0])
    (a, b), (low, high) = (COUNTS[after - 1], COUNTS[after]), (errors[after - 1], errors[after])
    return a + (b - a) * (at - low) / (high - low)


def _chain(count: int, heads: int, trials: int, generator: torch.Generator) -> list[float]:
    """Error after each layer. A state holds one code of length 1 for each head."""
    now = _units(trials, count, heads, CHAIN, generator=generator)
    given, errors = now, []
    for _ in range(DEPTH):
        then = _units(trials, count, heads, CHAIN, generator=generator)
        recalled = [pavlovian(now[:, :, h], then.flatten(2), given[:, :, h]) for h in range(heads)]
        given = torch.stack(recalled).mean(0).unflatten(-1, (heads, CHAIN))
        errors.append(float((given - then).square().sum(-1).mean().sqrt()))
        now = then
    return errors
