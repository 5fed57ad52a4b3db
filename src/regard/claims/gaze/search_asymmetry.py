"""Is a tilted bar among vertical ones found faster than a vertical one among tilted ones, and does the diet decide it?

Small networks learn to tell orientations, nine of them, 20 degrees apart. In the natural diet most bars are vertical,
as more contours in the world are than their share; in the reversed one most are tilted; in the even one, the control,
all are as frequent. None learns to search. Then each searches noisy displays of its own: one bar among others that are
all alike, 10 degrees apart, which is hard enough that more than a few looks are needed. People find the tilted one
faster (Treisman and Gormican, 1988; Wolfe et al., 1992). What is asked is looks, each network's beside those of the one
that began alike and had the even diet; the paper's index, a ratio of slopes, is reported: with easy displays it is +-1
by chance, as an earlier design found.

All is turned by half of the difference, so that the two orientations lie on either side of the raster's vertical. With
one of them upright on the raster, the upright one was the easier to find after each diet, the even one too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...gaze.search_asymmetry import EccentricConfig, EccentricNet, asymmetry_index, search
from .._measure import mean

SCALES = "small", "large"
CELL, GRID = 16, 6  # pixels of a place for a bar; places along a side of a display
WIDTH, CLASSES = 20.0, 9  # degrees of a class, and how many there are
TILT, NOISE = 10.0, 0.3  # degrees between the two bars of a display; of its pixels
USUAL = 0.6  # share of the usual orientation in the natural and the reversed diet
DIETS: dict[str, float | None] = {"natural": 0.0, "even": None, "reversed": TILT}  # the usual orientation, degrees
SIZES = (12, 36)  # items of a display
STEPS, BATCH, RATE = 120, 128, 3e-3
NETS, DISPLAYS = {"small": 5, "large": 40}, {"small": 8, "large": 60}

EXPECTED = (
    "a vertical bar among tilted ones takes more looks than a tilted one among vertical ones after the natural diet, "
    "and fewer after the reversed one, each beside networks of the even diet, which began alike: by two standard "
    "errors "
    "over networks"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The usual orientation is the harder one to find, whichever it is."""
    looks: dict[str, list[NDArray]] = {diet: [] for diet in DIETS}  # [target, size] of each network
    told = []
    for number in range(NETS[scale]):
        for diet, usual in DIETS.items():
            generator = torch.Generator().manual_seed(1000 * seed + number)
            net, right = _trained(usual, generator)
            told.append(right)
            displays = torch.Generator().manual_seed(1000 * seed + number + 500)  # the same ones for each diet
            looks[diet].append(
                np.array([[_looks(net, n, tilted, DISPLAYS[scale], displays) for n in SIZES] for tilted in (0, 1)])
            )
    last = {diet: np.array(of_diet)[:, :, -1] for diet, of_diet in looks.items()}  # [network, target]
    apart = {diet: of[:, 0] - of[:, 1] for diet, of in last.items()}
    natural, reverse = (mean(apart[diet] - apart["even"]) for diet in ("natural", "reversed"))
    holds = natural.above() and reverse.below()
    index = {diet: np.array([_index(of_net) for of_net in of_diet]) for diet, of_diet in looks.items()}
    measured = (
        f"looks to a vertical one less those to a tilted one, of {SIZES[-1]}: "
        + ", ".join(f"{diet} {mean(values):+.2f}" for diet, values in apart.items())
        + f"; beside the even diet natural {natural:+.2f}, reversed {reverse:+.2f}; asymmetry index "
        + ", ".join(f"{diet} {mean(values):+.2f}" for diet, values in index.items())
    )
    middle = {diet: float(of.mean()) for diet, of in last.items()}
    premises = [
        Premise(
            f"search is neither at its floor nor blind: looks of {SIZES[-1]} items",
            "4 to 16 after each diet",
            ", ".join(f"{value:.1f}" for value in middle.values()),
            all(4 <= value <= 16 for value in middle.values()),
        ),
        Premise(
            "networks tell orientations",
            "60% right or more, in the mean (chance: 11%)",
            f"{np.mean(told):.0%}",
            np.mean(told) >= 0.6,
        ),
    ]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, looks, apart))


def bar(degrees: Tensor, shift: Tensor) -> Tensor:
    """A bright bar on black, 12 by 3 pixels with soft edges. [bar, 1, CELL, CELL]

    degrees [bar], clockwise from what counts as vertical; shift [bar, 2], of its middle, in pixels.
    """
    angle = torch.deg2rad(degrees - TILT / 2)[:, None, None]
    at = torch.arange(CELL) - (CELL - 1) / 2
    x, y = at - shift[:, :1, None], at[:, None] - shift[:, 1:, None]
    along, across = x * angle.sin() - y * angle.cos(), x * angle.cos() + y * angle.sin()
    return (torch.sigmoid(4 * (6 - along.abs())) * torch.sigmoid(4 * (1.5 - across.abs())))[:, None]


def _trained(usual: float | None, generator: torch.Generator) -> tuple[EccentricNet, float]:
    """A network, and how often it tells the orientation of new bars that are as frequent."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    net = EccentricNet(EccentricConfig(classes=CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), RATE)

    def drawn(count: int, share: float) -> tuple[Tensor, Tensor]:
        """Bars, this share of them about the usual orientation, and the class that each is in."""
        degrees = 180 * torch.rand(count, generator=generator)
        if usual is not None:
            often = torch.rand(count, generator=generator) < share
            degrees = torch.where(often, usual + 4 * torch.rand(count, generator=generator) - 2, degrees)
        pictures = bar(degrees, 4 * torch.rand(count, 2, generator=generator) - 2)
        pictures = pictures + NOISE * torch.randn(pictures.shape, generator=generator)
        return pictures, ((degrees % 180) / WIDTH).long().clamp_max(CLASSES - 1)

    for _ in range(STEPS):
        pictures, label = drawn(BATCH, USUAL)
        F.cross_entropy(net(pictures), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        pictures, label = drawn(500, 0.0)
        return net, float((net(pictures).argmax(-1) == label).float().mean())


def _looks(net: EccentricNet, items: int, tilted: int, displays: int, generator: torch.Generator) -> float:
    """Mean number of fixations, after the first, until the target's. tilted: 1 where the target is the tilted bar."""
    place = torch.rand(displays, GRID * GRID, generator=generator).argsort(1)[:, :items]
    left, top = CELL * (place % GRID), CELL * (place // GRID)
    boxes = torch.stack([left, top, left + CELL, top + CELL], -1)
    kind = torch.full((displays, items), 1 - tilted)
    kind[:, 0] = tilted
    bars = bar(TILT * kind.flatten(), 2 * torch.rand(kind.numel(), 2, generator=generator) - 1)
    pictures = torch.zeros(displays, 1, CELL * GRID, CELL * GRID)
    for (one, item), picture in zip(np.ndindex(displays, items), bars):
        a, t = int(left[one, item]), int(top[one, item])
        pictures[one, :, t : t + CELL, a : a + CELL] = picture
    pictures += NOISE * torch.randn(pictures.shape, generator=generator)
    cue = bar(torch.full((displays,), TILT * tilted), torch.zeros(displays, 2))
    paths = search(net, pictures, cue, boxes, torch.zeros(displays, dtype=torch.long))
    return float(np.mean([len(path) - 1 for path in paths]))


def _index(looks: NDArray) -> float:
    vertical, tilted = (looks[:, -1] - looks[:, 0]) / (SIZES[-1] - SIZES[0])
    return asymmetry_index(tilted, vertical)


def _draw(looks: dict[str, list[NDArray]], apart: dict[str, NDArray], figure: Any) -> None:
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
    most = max(np.mean(of_diet, 0).max() for of_diet in looks.values())
    for panel, (diet, of_diet) in zip(axes, looks.items()):
        middle = np.mean(of_diet, 0)
        error = np.std(of_diet, 0, ddof=1) / len(of_diet) ** 0.5
        for kind, name in ((1, "tilted among vertical"), (0, "vertical among tilted")):
            panel.errorbar(SIZES, middle[kind], yerr=2 * error[kind], marker="o", capsize=3, label=name)
        panel.set(title=f"{diet} diet", xlabel="items", xticks=SIZES, ylim=(0, 1.25 * most))
        panel.grid(alpha=0.2)
    axes[0].set_ylabel("looks to find it")
    axes[0].legend(frameon=False, fontsize=7, loc="upper left")
    last = axes[-1]
    for row, values in enumerate(apart.values()):
        last.plot(values, np.full(len(values), row), "o", alpha=0.4, color="tab:blue")
        last.plot(values.mean(), row, "D", color="black")
    last.axvline(0, color="0.5", lw=1)
    last.set_yticks(range(len(apart)), list(apart))
    last.invert_yaxis()
    last.set(title="vertical less tilted, looks", xlabel="people: above 0")
