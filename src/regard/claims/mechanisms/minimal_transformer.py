"""Bermeitinger et al. (arXiv:2410.13732): without MLPs, and with fewer matrices, a transformer is hardly worse.

Handwritten digits in 16 patches with learned places, three layers of one head. The control has no MLPs either, and
attends evenly to all patches. Sizes and epochs were chosen on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.minimal_transformer import MinimalAttention, parameters
from .._measure import mean
from ._digits import digits, fit, judged

DIM, LAYERS, TRAINED, TESTED, EPOCHS = 32, 3, 3000, 4000, 5
WAYS: dict[str, dict[str, Any]] = {
    "full": {"hidden": 4 * DIM},
    "no MLP": {},
    "symmetric": {"query_key": "symmetric"},
    "one matrix": {"query_key": "one"},
    "one matrix, no values": {"query_key": "one", "value_output": False},
    "even weights": {},
}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Digits that are named, weights, and what the loss rises from training to test, of each variant."""
    expected = (
        "sizes as the formula says; without MLPs, and with symmetric scores or one matrix, at most 1.5 points below "
        "the full model; even weights below no MLP by 3 points; each by two standard errors over digits"
    )
    trained, tested = digits(7, TRAINED, TESTED, seed=seed)
    right, rises, exact, sizes = {}, {}, True, {}
    for way, knobs in WAYS.items():
        torch.manual_seed(seed)
        model = _Model(even=way == "even weights", **knobs)
        sizes[way] = sum(p.numel() for p in model.layers.parameters())
        exact &= sizes[way] == parameters(DIM, layers=LAYERS, norms=1 + ("hidden" in knobs), **knobs)
        fit(model, trained, EPOCHS, seed=seed)
        right[way], loss = judged(model, tested)
        rises[way] = float(loss.mean() - judged(model, trained)[1].mean())
    rates = {way: float(of.mean()) for way, of in right.items()}
    beside = {way: mean(right[way] - right["full"]) for way in ("no MLP", "symmetric", "one matrix")}
    over = mean(right["no MLP"] - right["even weights"])
    holds = exact and all(of.above(-0.015) for of in beside.values()) and over.above(0.03)
    learned = rates["full"] >= 0.9
    premise = Premise("the full model learns the task", "90% or more", f"{rates['full']:.1%}", learned)
    measured = (
        ", ".join(f"{way} {rates[way]:.1%} ({sizes[way]:,} weights, loss {rises[way]:+.2f})" for way in WAYS)
        + "; less the full model "
        + ", ".join(f"{way} {of:+.3f}" for way, of in beside.items())
        + f"; no MLP less even weights {over:+.3f}"
    )
    draw = partial(_draw, rates=rates, sizes=sizes)
    return Finding(holds, measured, expected, seed, premises=[premise], draw=draw)


def _draw(figure: Any, *, rates: dict[str, float], sizes: dict[str, int]) -> None:
    axes = figure.subplots()
    for way, rate in rates.items():
        axes.plot(sizes[way], 100 * rate, "o", label=way)
    axes.set(xlabel="weights in the layers", ylabel="right, %")
    axes.legend()


class _Layer(nn.Module):
    def __init__(self, hidden: int | None = None, **knobs: Any) -> None:
        super().__init__()
        self.attention, self.norm = MinimalAttention(DIM, **knobs), nn.LayerNorm(DIM)
        self.mlp = None
        if hidden is not None:
            mlp = nn.Sequential(nn.Linear(DIM, hidden), nn.GELU(), nn.Linear(hidden, DIM))
            self.mlp = nn.Sequential(nn.LayerNorm(DIM), mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden if self.mlp is None else hidden + self.mlp(hidden)


class _Even(MinimalAttention):
    """Every patch weighs the same; queries and keys are there, and do nothing."""

    def query_and_key(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().query_and_key(hidden)
        return 0 * query, key


class _Model(nn.Module):
    def __init__(self, even: bool = False, **knobs: Any) -> None:
        super().__init__()
        self.patch, self.places = nn.Linear(49, DIM), nn.Parameter(0.02 * torch.randn(16, DIM))
        self.layers, self.norm = nn.ModuleList(_Layer(**knobs) for _ in range(LAYERS)), nn.LayerNorm(DIM)
        self.output = nn.Linear(DIM, 10)
        if even:
            for layer in self.layers:
                layer.attention.__class__ = _Even

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.patch(patches) + self.places
        for layer in self.layers:
            hidden = layer(hidden)
        return self.output(self.norm(hidden).mean(1))
