"""Latent Compass (arXiv:2012.14283): a direction found by sorting a few pictures moves others, of other classes too.

The generator is the decoder of a variational autoencoder, told a shape, of pictures of one shape at any place, in any
colour and size; it is trained three times. The person is a rule on pixels that errs in one label of ten, and sorts 24
pictures of two shapes, eight times anew; judged are new codes of the three other shapes. Controls: directions at
random, and those of the same pictures with labels shuffled. The paper's generator is BigGAN, and its persons are
artists; it gives no figures. Jaggedness is no attribute of the pictures by itself: it is reported, not judged.
Three pilots on other seeds, for widths of the networks and the weight of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes.raster import LEVELS
from ...models.latent_compass import Compass, Direction
from .._measure import Mean, mean
from .._nets import fit

SCALES = "small", "large"
STEPS, SORTINGS = {"small": 900, "large": 8000}, {"small": 8, "large": 32}
RUNS, PICTURES, SIZE, DIM, HIDDEN, RATE, BATCH, BETA = 3, 3000, 24, 16, 192, 2e-3, 48, 2.0
SHAPES = "circle", "square", "triangle", "cross", "ring"
SORTED = 2  # shapes that the person sees; the others are judged
FEW, MANY, JUDGED, ERRS, REACH, CONTROLS = 24, 96, 200, 0.1, 1.5, 3


class Painter(nn.Module):
    """A variational autoencoder; called, it makes pictures of codes and shapes. [batch, 16], [batch] -> pictures"""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * SIZE**2
        self.sees = nn.Sequential(
            nn.Linear(pixels + len(SHAPES), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * DIM),
        )  # fmt: skip
        self.draws = nn.Sequential(
            nn.Linear(DIM + len(SHAPES), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, pixels),
        )  # fmt: skip

    def forward(self, codes: Tensor, shapes: Tensor) -> Tensor:
        told = torch.cat([codes, F.one_hot(shapes, len(SHAPES)).to(codes)], 1)
        return self.draws(told).sigmoid().view(-1, 3, SIZE, SIZE)

    def loss(self, pictures: Tensor, shapes: Tensor, lots: Tensor) -> Tensor:
        """Squared errors in units of a deviation of 0.15, and the divergence of codes from a normal distribution."""
        middle, log = self.sees(torch.cat([pictures.flatten(1), F.one_hot(shapes, len(SHAPES))], 1)).chunk(2, 1)
        drawn = self(middle + (log / 2).exp() * lots, shapes)
        apart = (log.exp() + middle.square() - 1 - log).sum() / 2
        return ((drawn - pictures).square().sum() / (2 * 0.15**2) + BETA * apart) / len(pictures)


def lit(pictures: Tensor) -> Tensor:
    return pictures.amax(1)


def fuller(pictures: Tensor) -> Tensor:
    return lit(pictures).mean((1, 2))


def warmer(pictures: Tensor) -> Tensor:
    """Red minus blue, of what is lit."""
    return (pictures[:, 0] - pictures[:, 2]).sum((1, 2)) / lit(pictures).sum((1, 2)).clamp_min(1)


def to_the_left(pictures: Tensor) -> Tensor:
    columns = lit(pictures).sum(1)
    return -(columns * torch.arange(SIZE)).sum(1) / columns.sum(1).clamp_min(1)


def jagged(pictures: Tensor) -> Tensor:
    """Length of the outline for the area."""
    there = lit(pictures)
    length = there.diff(dim=1).abs().sum((1, 2)) + there.diff(dim=2).abs().sum((1, 2))
    return length / there.sum((1, 2)).clamp_min(1)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "fuller": fuller,
    "warmer": warmer,
    "to the left": to_the_left,
    "jagged": jagged,
}
SURE = ("fuller", "warmer", "to the left")


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How often what a person sorted by rises along the direction, on shapes that were never sorted."""
    expected = (
        f"{JUDGED} new pictures of shapes not sorted, from -{REACH} to {REACH} deviations: fuller, warmer and to the "
        f"left rise in 85% or more in each of {RUNS} generators, and two standard errors over sortings above 65%; "
        f"random directions and shuffled labels 35 to 65%; slopes of {MANY} pictures are above those of {FEW}"
    )
    found: dict[str, list[Trial]] = {name: [] for name in RULES}
    for run in range(RUNS * seed, RUNS * (seed + 1)):
        compass, draws = Compass(_painter(STEPS[scale], run)), torch.Generator().manual_seed(run)
        judged = _draw(JUDGED, draws, judged=True)
        for name, rule in RULES.items():
            found[name].append(_tried(rule, compass, judged, SORTINGS[scale], draws))
    by_run = {name: [mean(trial.rises["sorted"]) for trial in trials] for name, trials in found.items()}
    sure = [trial for name in SURE for trial in found[name]]
    controls = {way: mean([trial.rises[way] for trial in sure]) for way in ("shuffled", "random")}
    slopes = {way: np.array([trial.slopes[way] for trial in sure]) for way in ("few", "many", "rounds")}
    more = mean(slopes["many"] - slopes["few"])
    rounds = mean(slopes["rounds"] - slopes["few"])
    holds = all(of.value >= 0.85 and of.above(0.65) for name in SURE for of in by_run[name])
    holds = holds and all(0.35 <= of.value <= 0.65 for of in controls.values()) and more.above()
    measured = (
        "rises in "
        + "; ".join(f"{name} " + ", ".join(_percent(of) for of in by_run[name]) for name in RULES)
        + f" (± over sortings); shuffled {_percent(controls['shuffled'])}, random {_percent(controls['random'])}; "
        f"slope of {FEW} pictures {mean(slopes['few']):.2f}, {MANY} more by {more:+.2f}, two rounds of {FEW // 2} by "
        f"{rounds:+.2f} deviations of the rule"
    )
    linear = {name: float(np.mean([trial.linear for trial in trials])) for name, trials in found.items()}
    least, said = min(linear[name] for name in SURE), ", ".join(f"{name} {of:.0%}" for name, of in linear.items())
    premises = [
        Premise(
            "the three rules are linear in codes", "80% or more of new codes told, over generators", said, least >= 0.8
        )
    ]

    def draw(figure: Any) -> None:
        for axes, (name, trials) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
            rows = [torch.cat(list(strip), -1) for strip in trials[0].shown]
            axes.imshow(torch.cat(rows, 1).permute(1, 2, 0).numpy())
            axes.set(title=f"{name}: from -2 to 2", xticks=[], yticks=[])

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


class Trial(NamedTuple):
    """What came of one rule and one generator."""

    rises: dict[str, list[float]]  # share of pictures in which the rule rises, of each sorting
    slopes: dict[str, list[float]]  # in deviations of the rule, for one of the direction
    linear: float  # share of new codes of which a linear model of 2,000 others tells the rule
    shown: Tensor  # pictures along the first direction [picture, step, 3, row, column]


def _tried(
    rule: Callable[[Tensor], Tensor], compass: Compass, judged: tuple[Tensor, Tensor], sortings: int, draws: Any
) -> Trial:
    painter, (codes, shapes) = compass.generator, judged
    known, of = _draw(4000, draws)
    values = rule(painter(known, of))
    middle, wide = values.median(), float(rule(painter(codes, shapes)).std())
    half = compass.fit(known[:2000], (values[:2000] > middle).long())
    linear = ((half.scores(known[2000:]) > 0) == (values[2000:] > middle)).float().mean()

    def person(pictures: Tensor) -> Tensor:
        return ((rule(pictures) > middle) ^ (torch.rand(len(pictures), generator=draws) < ERRS)).long()

    def along(direction: Direction) -> tuple[float, float]:
        low, high = (rule(compass.steer(direction, codes, at, shapes)) for at in (-REACH, REACH))
        return float((high > low).float().mean()), float((high - low).mean()) / (2 * REACH * wide)

    rises: dict[str, list[float]] = {"sorted": [], "shuffled": [], "random": []}
    slopes: dict[str, list[float]] = {"few": [], "many": [], "rounds": []}
    strip = []
    for _ in range(sortings):
        some, of = _draw(MANY, draws)
        labels = person(painter(some, of))
        few = compass.fit(some[:FEW], labels[:FEW])
        for name, value in zip(("few", "many"), (few, compass.fit(some, labels)), strict=True):
            share, slope = along(value)
            slopes[name].append(slope)
            if value is few:
                rises["sorted"].append(share)
        slopes["rounds"].append(along(compass.ask(person, lambda n: _draw(n, draws), size=FEW // 2))[1])
        for _ in range(CONTROLS):
            order, way = torch.randperm(FEW, generator=draws), torch.randn(DIM, generator=draws).double()
            rises["shuffled"].append(along(compass.fit(some[:FEW], labels[:FEW][order]))[0])
            rises["random"].append(along(few._replace(step=way / way.norm(), spread=1.0))[0])
        strip = strip or [compass.steer(few, codes[:3], float(at), shapes[:3]) for at in torch.linspace(-2, 2, 7)]
    return Trial(rises, slopes, float(linear), torch.stack(strip, 1))


def _percent(of: Mean) -> str:
    return f"{of.value:.0%} ± {of.error:.0%}"


def _draw(n: int, draws: torch.Generator, *, judged: bool = False) -> tuple[Tensor, Tensor]:
    """Codes, and the shapes that are sorted, or those that are judged."""
    low, high = (SORTED, len(SHAPES)) if judged else (0, SORTED)
    return torch.randn(n, DIM, generator=draws), torch.randint(low, high, (n,), generator=draws)


def _pictures(seed: int) -> tuple[Tensor, Tensor]:
    """Shapes on black, with soft edges. [picture, 3, row, column], and which shape each is"""
    draws = np.random.default_rng(seed)
    kinds = draws.integers(0, len(SHAPES), PICTURES)
    x, y = draws.uniform(7, SIZE - 7, (2, PICTURES, 1, 1))
    radius, colours = draws.uniform(3, 7, (PICTURES, 1, 1)), draws.uniform(0.1, 1, (PICTURES, 3, 1, 1))
    colours /= colours.max(1, keepdims=True)
    at = np.arange(SIZE) + 0.5
    u, v = (at - x) / radius, (at[:, None] - y) / radius
    u, v = np.broadcast_arrays(u, v)
    level = np.stack([LEVELS[SHAPES[kind]](a, b) for kind, a, b in zip(kinds, u, v, strict=True)]) * radius
    pictures = colours / (1 + np.exp(3 * level))[:, None]
    return torch.tensor(pictures).float(), torch.tensor(kinds)


def _painter(steps: int, seed: int) -> Painter:
    pictures, kinds = _pictures(seed)
    torch.manual_seed(seed)
    painter, lots = Painter(), torch.Generator().manual_seed(seed + 1)

    def loss(some: Tensor) -> Tensor:
        return painter.loss(pictures[some], kinds[some], torch.randn(len(some), DIM, generator=lots))

    fit(painter.parameters(), loss, PICTURES, steps, seed, batch=BATCH, rate=RATE, decay=0.0)
    return painter.eval().requires_grad_(False)
