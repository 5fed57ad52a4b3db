"""Ma et al. (arXiv:2209.10655): cut into chunks, attention is linear, and the moving average carries what it cuts off.

A model has to name the symbol after a marker. Where the marker is the last of a chunk, its symbol is the first of the
next, and attention cannot put them together. The ablation has no moving average (the layers' input in its place).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.mega import Mega
from .._marked import TOKENS, WIDTH, right, trained
from .._measure import exponent, mean, seconds

SCALES = "small", "large"
CHUNK, ORDER = 8, 4
STEPS, RUNS = {"small": 200, "large": 1000}, {"small": 2, "large": 5}
LENGTHS = (1024, 2048, 4096)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Symbols named at borders of chunks and inside, with the moving average and without; time over length."""
    expected = (
        "with the moving average 95% or more of symbols named at borders, and within 3 points of inside; without it "
        "20% or fewer at borders; time grows with a power of length of 1.15 at most in chunks of 128, of 1.3 or more "
        "without chunks"
    )
    at = torch.arange(TOKENS - 1)
    border, inside = at[at % CHUNK == CHUNK - 1], at[at % CHUNK != CHUNK - 1]
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for run in range(RUNS[scale]):
        for way, of in found.items():
            where = RUNS[scale] * seed + run
            model = trained(lambda way=way: _layer(way), pooled=True, steps=STEPS[scale], seed=where)
            of.append((right(model, border, where), right(model, inside, where)))
    shares = {way: [mean(values) for values in zip(*of)] for way, of in found.items()}
    powers = [_power(chunk) for chunk in (128, None)]
    learned = shares["without"][1].value
    premises = [
        Premise("without the average it learns what a chunk holds", "85% or more", f"{learned:.0%}", learned >= 0.85)
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, (way, of) in enumerate(shares.items()):
            axes.bar([0.4 * i, 1 + 0.4 * i], [m.value for m in of], 0.4, label=f"{way} moving average")
        axes.set_xticks([0.2, 1.2], ["marker last of its chunk", "elsewhere"])
        axes.set(ylabel="symbols named", ylim=(0, 1.2))
        axes.legend()

    said = "; ".join(f"{way} {of[0].value:.0%} at borders, {of[1].value:.0%} inside" for way, of in shares.items())
    measured = (
        f"named {said}; time grows with a power of length of {powers[0]:.2f} in chunks, {powers[1]:.2f} without chunks"
    )
    (edge, middle), (lost, _) = shares["with"], shares["without"]
    holds = edge.value >= 0.95 and abs(edge.value - middle.value) <= 0.03 and lost.value <= 0.2
    holds = holds and powers[0] <= 1.15 and powers[1] >= 1.3
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _layer(way: str) -> Mega:
    layer = Mega(WIDTH, z=16, order=ORDER, chunk=CHUNK)
    if way == "without":
        layer.move = _Still()  # type: ignore[assignment]
    return layer


class _Still(nn.Module):
    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return hidden


def _power(chunk: int | None) -> float:
    layer = Mega(32, z=32, value=32, order=2, chunk=chunk, positions=LENGTHS[-1], causal=True)
    with torch.no_grad():
        times = [seconds(lambda n=n: layer(torch.randn(1, n, 32)))[0] for n in LENGTHS]
    return exponent(LENGTHS, times)
