"""Chu et al. (arXiv:2104.13840): windows cost in proportion to the picture, and need sub-sampled attention beside them.

Two cells stand out in a picture of 8 x 8 noisy ones. Two blocks have to tell, at the one, what colour the other has.
Far apart, in different windows of 4, windows alone cannot know. The control is the same question with both in one
window. Whether colours are alike was asked first, which neither way learned in as few steps; rate and steps were chosen
on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.twins import ConditionalPositions, GlobalSubSampledAttention, LocallyGroupedAttention, twins
from .._measure import exponent, mean, seconds

SIDE, WINDOW, RATIO, COLOURS, DIM, STEPS, BATCH, RATE, RUNS = 8, 4, 2, 3, 32, 150, 64, 3e-3, 1
SIDES = 28, 56, 84
TESTED = 2000


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Seconds of windows over the side of a picture, and how often two cells are compared rightly."""
    expected = (
        "seconds of windows grow with pixels to a power of 1.15 or less; sub-sampling by 8 leaves 1/64 of full "
        "attention's operations at 112 x 112; far apart, windows and sub-sampled keys in turns are right 15 points "
        "more often than windows twice, and in one window not by more than 5 points more, by two standard errors"
    )
    torch.manual_seed(seed)
    right: dict[tuple[str, str], list[Tensor]] = {}
    for run in range(RUNS):
        for where in ("far", "near"):
            tested = _pictures(TESTED, where, torch.Generator().manual_seed(10_000 + RUNS * seed + run))
            for way in ("in turns", "windows"):
                right.setdefault((way, where), []).append(_judged(way, where, tested, RUNS * seed + run))
    far, near = (
        mean((torch.stack(right["in turns", where]) - torch.stack(right["windows", where])).flatten())
        for where in ("far", "near")
    )
    rates = {of: float(torch.stack(found).mean()) for of, found in right.items()}
    times = _seconds()
    power = exponent([side**2 for side in SIDES], times)
    n = 112 * 112
    share = GlobalSubSampledAttention.cost(n, 64, ratio=8).operations / (4 * 64 * n * n)
    holds = power <= 1.15 and share <= 0.10 and far.above(0.15) and near.below(0.05)
    learned = rates["in turns", "far"] >= 0.7
    premises = [
        Premise("the task is learned in turns", "70% or more", f"{rates['in turns', 'far']:.1%}", learned),
        Premise(
            "windows learn it in one window",
            "70% or more",
            f"{rates['windows', 'near']:.1%}",
            rates["windows", "near"] >= 0.7,
        ),
    ]
    shares = ", ".join(f"{where}, {way} {rate:.1%}" for (way, where), rate in rates.items())
    measured = (
        f"seconds of windows grow with pixels to the power of {power:.2f}; sub-sampled keys take {share:.3f} of full "
        f"attention's operations; {shares}: in turns more by "
        f" {far:.3f} far and {near:.3f} near"
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, rates=rates, times=times))


def _draw(figure: Any, *, rates: dict[tuple[str, str], float], times: list[float]) -> None:
    left, right = figure.subplots(1, 2)
    left.bar([f"{way},\n{where}" for way, where in rates], [100 * rate for rate in rates.values()])
    left.axhline(100 / COLOURS, color="grey", linestyle=":")
    left.set(ylabel="right, %")
    right.loglog([side**2 for side in SIDES], times, "o-")
    right.set(xlabel="pixels", ylabel="seconds of windows")


@torch.no_grad()
def _seconds() -> list[float]:
    pictures = [(torch.randn(1, 4, side**2, 32), (side, side)) for side in SIDES]
    return seconds(*(partial(twins, x, x, x, shape=shape) for x, shape in pictures), least=7)


def _pictures(count: int, where: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [picture, cell, colour and mark], the cell that is marked, and the colour of the other one."""
    cells = 0.1 * torch.randn(count, SIDE, SIDE, COLOURS + 1, generator=generator)
    colours = torch.randint(COLOURS, (count,), generator=generator)
    # one cell in the upper left window, the other in the lower right one, or in the same one's other half
    at = torch.randint(WINDOW, (count, 2, 2), generator=generator)
    if where == "near":
        at[:, 0, 0], at[:, 1, 0] = at[:, 0, 0] % 2, 2 + at[:, 1, 0] % 2
    else:
        at[:, 1] += WINDOW
    each = torch.arange(count)
    cells[each, at[:, 0, 0], at[:, 0, 1], COLOURS] += 2
    cells[each, at[:, 1, 0], at[:, 1, 1], colours] += 2
    return cells.flatten(1, 2), at[:, 0, 0] * SIDE + at[:, 0, 1], colours


class _Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed = nn.Linear(COLOURS + 1, DIM)
        last = GlobalSubSampledAttention(DIM, 2, ratio=RATIO) if way == "in turns" else None
        self.attentions = nn.ModuleList(
            [LocallyGroupedAttention(DIM, 2, window=WINDOW), last or LocallyGroupedAttention(DIM, 2, window=WINDOW)]
        )
        self.places = ConditionalPositions(DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        mlps = (nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)) for _ in range(2))
        self.mlps, self.output = nn.ModuleList(mlps), nn.Linear(DIM, COLOURS)

    def forward(self, cells: Tensor, asked: Tensor) -> Tensor:
        hidden, shape = self.embed(cells), (SIDE, SIDE)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            hidden = hidden + attention(self.norms[2 * i](hidden), shape)
            hidden = hidden + mlp(self.norms[2 * i + 1](hidden))
            hidden = hidden if i else self.places(hidden, shape)
        return self.output(hidden[torch.arange(len(cells)), asked])


def _judged(way: str, where: str, tested: tuple[Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """Whether the colour in each picture is told rightly after training."""
    torch.manual_seed(seed)
    model, generator = _Model(way), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        *seen, colours = _pictures(BATCH, where, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(*seen), colours).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(*tested[:2]).argmax(-1) == tested[2]).double()
