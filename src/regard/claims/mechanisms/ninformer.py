"""Abdullah and Aydin (arXiv:2403.02411): a gate of mixed tokens does what attention does, for fewer operations.

Handwritten digits in 16 patches, two blocks of 32 channels. The gate's MLPs are 24 wide, where it costs less than
attention; as wide as the authors' it would cost more. Beside attention stand the mixer alone, without the gate, and a
gate that is learned but the same for every picture, which is the control. The number of digits and epochs was chosen on
seed 1, where all are above 90%.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.ninformer import GatingUnit, Mixer, attention_cost, cost
from .._measure import mean
from ._digits import digits, fit, judged

DIM, TOKENS, HIDDEN, HEADS = 32, 16, 24, 4
TRAINED, TESTED, EPOCHS, RUNS = 4000, 3000, 10, 2
WAYS = "gate", "attention", "mixer alone", "constant gate"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Digits that are named, with each of the four in the place of attention."""
    expected = (
        "fewer operations than attention as counted; with the gate at most 1 point below attention, and above a gate "
        f"that is the same for every picture, both by two standard errors over digits and {RUNS} trainings"
    )
    right: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    for run in range(RUNS):
        at = RUNS * seed + run
        trained, tested = digits(7, TRAINED, TESTED, seed=seed)
        for way in WAYS:
            torch.manual_seed(at)
            model = _Model(way)
            fit(model, trained, EPOCHS, seed=at)
            right[way].append(judged(model, tested)[0])
    rates = {way: float(torch.stack(of).mean()) for way, of in right.items()}
    beside, alone, over = (mean((torch.stack(right["gate"]) - torch.stack(right[way])).mean(0)) for way in WAYS[1:])
    cheaper = cost(TOKENS, DIM, hidden=HIDDEN).operations / attention_cost(TOKENS, DIM).operations
    holds = cheaper < 1 and beside.above(-0.01) and over.above()
    learned = rates["attention"] >= 0.9
    premises = [Premise("attention learns the task", "90% or more", f"{rates['attention']:.1%}", learned)]
    measured = (
        f"{', '.join(f'{way} {rates[way]:.1%}' for way in WAYS)}; gate less attention {beside:+.3f}, less the mixer "
        f"alone {alone:+.3f}, less the constant gate {over:+.3f}; {cheaper:.2f} of attention's operations"
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, rates=rates))


def _draw(figure: Any, *, rates: dict[str, float]) -> None:
    axes = figure.subplots()
    axes.bar(list(rates), [100 * rate for rate in rates.values()])
    axes.set(ylabel="right, %", ylim=(80, 100))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.output = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.parts(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _Constant(nn.Module):
    """A gating unit whose gate belongs to token and channel, not to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(DIM, DIM), nn.Parameter(torch.randn(TOKENS, DIM))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden) * self.gate


def _mixing(way: str) -> nn.Module:
    if way == "gate":
        return GatingUnit(DIM, tokens=TOKENS, hidden=HIDDEN)
    if way == "mixer alone":
        return Mixer(DIM, TOKENS, HIDDEN)
    return _Attention() if way == "attention" else _Constant()


class _Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.patch, self.places = nn.Linear(49, DIM), nn.Parameter(0.02 * torch.randn(TOKENS, DIM))
        self.mixings = nn.ModuleList(_mixing(way) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        mlps = (nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2))
        self.mlps, self.output = nn.ModuleList(mlps), nn.Linear(DIM, 10)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.patch(patches) + self.places
        for i, (mixing, mlp) in enumerate(zip(self.mixings, self.mlps, strict=True)):
            hidden = hidden + mixing(self.norms[2 * i](hidden))
            hidden = hidden + mlp(self.norms[2 * i + 1](hidden))
        return self.output(hidden.mean(1))
