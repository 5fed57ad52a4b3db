"""Liu et al. (arXiv:2406.08128): short and long convolutions give linear attention the sense of place that it lacks.

A model has to name the symbol after a marker, at the last of the tokens: a short range to bind the two, a long one to
bring them to the end. The ablation is linear attention with the same gates and no convolution; its premise, that linear
attention itself can do it, is met where it learns with a learned code of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.chela import Chela, linear
from .._marked import SYMBOLS, TOKENS, WIDTH, right, trained
from .._measure import exponent, mean, peak_bytes, seconds

SCALES = "small", "large"
STEPS, RUNS = {"small": 200, "large": 1000}, {"small": 2, "large": 5}
LENGTHS = {"small": (1024, 4096, 16384), "large": (4096, 16384, 65536)}
WAYS = ("both", "short only", "none")


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Symbols named with both convolutions, the short one and none; merging, tiles, and time and memory over length."""
    expected = (
        "with both convolutions 90% or more of symbols named, without them 30% or fewer; merged equals unmerged within "
        "1e-12 and tiles their map within 1e-9, in float64; time and memory grow with a power of length of 1.2 at most"
    )
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    at = torch.arange(TOKENS - 1)
    for run in range(RUNS[scale]):
        for way, of in found.items():
            if way == "short only" and run:
                continue
            where = RUNS[scale] * seed + run
            model = trained(lambda way=way: _layer(way), pooled=False, steps=STEPS[scale], seed=where)
            of.append(right(model, at, where))
    shares = {way: sum(of) / len(of) for way, of in found.items()}
    gain = mean([a - b for a, b in zip(found["both"], found["none"])])
    merged, tiles = _off(seed)
    layer, times, memory = Chela(32, z=16, length=LENGTHS[scale][-1], causal=True), [], []
    with torch.no_grad():
        for n in LENGTHS[scale]:
            hidden = torch.randn(1, n, 32)
            times.append(seconds(lambda hidden=hidden: layer(hidden))[0])
            memory.append(peak_bytes(lambda hidden=hidden: layer(hidden)))
    powers = [exponent(LENGTHS[scale], of) for of in (times, memory)]
    premises = [
        Premise(
            "the task is more than guessing",
            f"half or more named, chance {1 / SYMBOLS:.0%}",
            f"{shares['both']:.0%}",
            shares["both"] >= 0.5,
        )
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar(list(shares), list(shares.values()))
        axes.axhline(1 / SYMBOLS, color="grey", linewidth=1)
        axes.set(ylabel="symbols named", ylim=(0, 1.05))

    measured = (
        f"named {', '.join(f'{share:.0%} ({way})' for way, share in shares.items())}, both over none {gain:+.2f}; "
        f"merged off by {merged:.1e}, tiles by {tiles:.1e}; time grows with a power of length of {powers[0]:.2f}, "
        f"memory of {powers[1]:.2f}"
    )
    holds = shares["both"] >= 0.9 and shares["none"] <= 0.3 and gain.above()
    holds = holds and merged <= 1e-12 and tiles <= 1e-9 and max(powers) <= 1.2
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _layer(way: str) -> Chela:
    layer = Chela(WIDTH, z=16, length=TOKENS, causal=True)
    if way == "short only":
        nn.init.zeros_(layer.move.long)
        layer.move.long.requires_grad_(False)
    if way == "none":
        layer.move = _Still()  # type: ignore[assignment]
    return layer


class _Still(nn.Module):
    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return hidden


def _off(seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    layer, hidden = Chela(16, z=8, length=200, causal=True).double(), torch.randn(2, 150, 16, dtype=torch.float64)
    with torch.no_grad():
        before = layer(hidden)
        layer.move.merge()
        merged = float((layer(hidden) - before).abs().max())
    query, key, value = (torch.randn(2, 1, 150, 8, dtype=torch.float64) for _ in range(3))
    dense = (query @ key.mT).tril() @ value
    return merged, float((linear(query, key, value, causal=True, chunk=16) - dense).abs().max())
