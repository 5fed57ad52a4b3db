"""Is a tilted bar among vertical ones found faster than a vertical one among tilted ones, and does the diet decide it?

Small networks learn to tell orientations, nine of them, 20 degrees apart. In the natural diet most bars are vertical,
as more contours in the world are than their share; in the reversed one most are tilted by 20 degrees; in the even one
all are as frequent. None learns to search. Then each searches displays of its own: one bar among others that are all
alike, the paper's 0 against 20 degrees. People find the tilted one faster (Treisman and Gormican, 1988; Wolfe et al.,
1992).

All is turned by 10 degrees, so that the two orientations lie on either side of the raster's vertical. With one of them
upright on the raster, the upright one was the easier to find after each diet, the even one too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...gaze.search_asymmetry import EccentricConfig, EccentricNet, asymmetry_index, search

SCALES = "small", "large"
CELL, GRID = 16, 6  # pixels of a place for a bar; places along a side of a display
TILT, CLASSES, TURN = 20.0, 9, -10.0  # degrees, of all but the number of classes
USUAL = 0.6  # share of the usual orientation in the natural and the reversed diet
DIETS = {"natural": 0, "even": None, "reversed": 1}  # the class that is usual
SIZES = (6, 18)  # items of a display
STEPS, BATCH, RATE = 150, 128, 3e-3
NETS, DISPLAYS = {"small": 4, "large": 20}, {"small": 8, "large": 60}

EXPECTED = (
    "the asymmetry index, of slopes of fixations over items, is above 0 after the natural diet (tilted among vertical "
    "is the easier, as for people) and below 0 after the reversed one: by two standard errors over networks"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The usual orientation is the harder one to find, whichever it is."""
    looks: dict[str, list[NDArray]] = {diet: [] for diet in DIETS}  # [target, size] of each network
    for number in range(NETS[scale]):
        for diet, usual in DIETS.items():
            generator = torch.Generator().manual_seed(1000 * seed + number)
            net = _trained(usual, generator)
            looks[diet].append(
                np.array([[_looks(net, n, tilted, DISPLAYS[scale], generator) for n in SIZES] for tilted in (0, 1)])
            )
    index = {diet: np.array([_index(of_net) for of_net in of_diet]) for diet, of_diet in looks.items()}
    error = {diet: values.std(ddof=1) / len(values) ** 0.5 for diet, values in index.items()}
    natural, reverse = index["natural"].mean(), index["reversed"].mean()
    holds = bool(natural > 2 * error["natural"] and reverse < -2 * error["reversed"])
    figures = ", ".join(f"{diet} {index[diet].mean():+.2f} ± {error[diet]:.2f}" for diet in DIETS)
    mean = {diet: np.mean(of_diet, 0)[:, -1] for diet, of_diet in looks.items()}
    found = ", ".join(f"{diet} {tilted:.1f} and {vertical:.1f}" for diet, (vertical, tilted) in mean.items())
    measured = f"Asymmetry index by diet: {figures}. Fixations to a tilted and a vertical one of {SIZES[-1]}: {found}."
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, looks, index))


def bar(degrees: Tensor, shift: Tensor) -> Tensor:
    """A bright bar on black, 12 by 3 pixels with soft edges. [bar, 1, CELL, CELL]

    degrees [bar], clockwise from what counts as vertical; shift [bar, 2], of its middle, in pixels.
    """
    angle = torch.deg2rad(degrees + TURN)[:, None, None]
    at = torch.arange(CELL) - (CELL - 1) / 2
    x, y = at - shift[:, :1, None], at[:, None] - shift[:, 1:, None]
    along, across = x * angle.sin() - y * angle.cos(), x * angle.cos() + y * angle.sin()
    return (torch.sigmoid(4 * (6 - along.abs())) * torch.sigmoid(4 * (1.5 - across.abs())))[:, None]


def _trained(usual: int | None, generator: torch.Generator) -> EccentricNet:
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    net = EccentricNet(EccentricConfig(classes=CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    often = torch.full((CLASSES,), 1 / CLASSES)
    if usual is not None:
        often = torch.full((CLASSES,), (1 - USUAL) / (CLASSES - 1))
        often[usual] = USUAL
    for _ in range(STEPS):
        label = torch.multinomial(often, BATCH, replacement=True, generator=generator)
        degrees = TILT * (label + torch.rand(BATCH, generator=generator) - 0.5)
        pictures = bar(degrees, 4 * torch.rand(BATCH, 2, generator=generator) - 2)
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=generator)
        F.cross_entropy(net(pictures), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


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
    cue = bar(torch.full((displays,), TILT * tilted), torch.zeros(displays, 2))
    paths = search(net, pictures, cue, boxes, torch.zeros(displays, dtype=torch.long))
    return float(np.mean([len(path) - 1 for path in paths]))


def _index(looks: NDArray) -> float:
    vertical, tilted = (looks[:, -1] - looks[:, 0]) / (SIZES[-1] - SIZES[0])
    return asymmetry_index(tilted, vertical)


def _draw(looks: dict[str, list[NDArray]], index: dict[str, NDArray], figure: Any) -> None:
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
    most = max(np.mean(of_diet, 0).max() for of_diet in looks.values())
    for panel, (diet, of_diet) in zip(axes, looks.items()):
        mean = np.mean(of_diet, 0)
        error = np.std(of_diet, 0, ddof=1) / len(of_diet) ** 0.5
        for kind, name in ((1, "tilted among vertical"), (0, "vertical among tilted")):
            panel.errorbar(SIZES, mean[kind], yerr=2 * error[kind], marker="o", capsize=3, label=name)
        panel.set(title=f"{diet} diet", xlabel="items", xticks=SIZES, ylim=(0, 1.25 * most))
        panel.grid(alpha=0.2)
    axes[0].set_ylabel("fixations to find it")
    axes[0].legend(frameon=False, fontsize=7, loc="upper left")
    last = axes[-1]
    for row, values in enumerate(index.values()):
        last.plot(values, np.full(len(values), row), "o", alpha=0.4, color="tab:blue")
        last.plot(values.mean(), row, "D", color="black")
    last.axvline(0, color="0.5", lw=1)
    last.set_yticks(range(len(index)), list(index))
    last.invert_yaxis()
    last.set(xlim=(-1.1, 1.1), title="asymmetry index", xlabel="people: above 0")
