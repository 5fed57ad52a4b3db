"""Zhang et al. (arXiv:2204.08446): windows grow where objects are large, which fixed ones cannot.

In a picture of 12 x 12 cells an object fills a square around the middle, of half a side from 1 to 5 cells; its colour
stands at its border alone, and a channel inside says how large it is. The colour is read from the middle window of 4 x
4, which does not hold the borders of objects from 3 on. The same layer with windows that stay plain is the comparison.
As a control, the sizes that are predicted are exchanged between pictures. Rate and steps were chosen on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.varied_size_window import VariedSizeWindow
from .._measure import mean

SIDE, WINDOW, SIZES, COLOURS, DIM, HEADS, STEPS, BATCH, RATE, TESTED = 12, 4, 5, 3, 24, 2, 250, 32, 1e-2, 1000


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How often the colour is told, with learned and plain windows, and how the middle window follows the object."""
    expected = (
        "learned windows tell more colours than plain ones, by 5 points and two standard errors; the rank correlation "
        "of the middle window's area with the object's size is 0.2 or more; exchanged between pictures, sizes follow "
        "nothing (0.1 at most)"
    )
    pictures, colours, sizes = _pictures(TESTED, torch.Generator().manual_seed(10_000 + seed))
    moving, plain = (_trained(moves, seed) for moves in (True, False))
    with torch.no_grad():
        right, fixed = ((m(pictures).argmax(-1) == colours).double() for m in (moving, plain))
        at = moving.attention.rectangles(moving.embed(pictures))[:, :, 1, 1]
        area = ((at[..., 1] - at[..., 0]) * (at[..., 3] - at[..., 2])).mean(1)
        spread = float(moving.attention.predicted(moving.embed(pictures))[1].std())
    follows = _correlation(area, sizes)
    order = torch.randperm(TESTED, generator=torch.Generator().manual_seed(seed))
    exchanged = _correlation(area[order], sizes)
    gain = mean(right - fixed)
    holds = gain.above(0.05) and follows >= 0.2 and abs(exchanged) <= 0.1
    premises = [
        Premise("windows change at all", "a deviation of scales of 0.05", f"{spread:.2f}", spread >= 0.05),
        Premise("plain windows leave something", "below 98%", f"{float(fixed.mean()):.1%}", float(fixed.mean()) < 0.98),
    ]
    by_size = [(float(area[sizes == s].mean()), float(right[sizes == s].mean())) for s in range(1, SIZES + 1)]
    measured = (
        f"{float(right.mean()):.1%} with learned windows, {float(fixed.mean()):.1%} with plain ones (more by "
        f"{gain:.3f}); area against size {follows:+.2f}, exchanged {exchanged:+.2f}; areas by size "
        f"{', '.join(f'{a:.0f}' for a, _ in by_size)} (plain: 9)"
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, by_size=by_size))


def _draw(figure: Any, *, by_size: list[tuple[float, float]]) -> None:
    axes = figure.subplots()
    axes.plot(range(1, SIZES + 1), [area for area, _ in by_size], "o-")
    axes.axhline((WINDOW - 1) ** 2, color="grey", linestyle=":")
    axes.set(xlabel="half the object's side, cells", ylabel="area of the middle window, cells")


def _correlation(one: Tensor, other: Tensor) -> float:
    """Of ranks; ties have one rank."""
    ranks = [t.double().unique(return_inverse=True)[1].double() for t in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [picture, channel, row, column], and each object's colour and half side."""
    colours = torch.randint(COLOURS, (count,), generator=generator)
    sizes = torch.randint(1, SIZES + 1, (count,), generator=generator)
    at = (torch.arange(SIDE) - (SIDE - 1) / 2).abs()
    apart = torch.maximum(at[:, None], at) + 0.5  # 1 in the middle, 6 at the picture's border
    border = (apart == sizes[:, None, None]).float()
    inside = (apart <= sizes[:, None, None].clamp_min(2)).float() * sizes[:, None, None] / SIZES
    cells = torch.cat([F.one_hot(colours, COLOURS)[..., None, None] * border[:, None], inside[:, None]], 1)
    return cells + 0.05 * torch.randn(cells.shape, generator=generator), colours, sizes


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(COLOURS + 1, DIM, 1)
        self.attention = VariedSizeWindow(DIM, HEADS, window=WINDOW)
        self.output = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, COLOURS))

    def forward(self, pictures: Tensor) -> Tensor:
        found = self.attention(self.embed(pictures))[:, :, WINDOW : 2 * WINDOW, WINDOW : 2 * WINDOW]
        return self.output(found.mean((2, 3)))


def _trained(moves: bool, seed: int) -> _Model:
    torch.manual_seed(seed)
    model, generator = _Model(), torch.Generator().manual_seed(seed)
    for module in (model.attention.offsets, model.attention.scales):
        module.requires_grad_(moves)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        pictures, colours, _ = _pictures(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), colours).backward()
        optimizer.step()
    return model
