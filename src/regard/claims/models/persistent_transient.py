"""Tran et al. (arXiv:2307.12729): a mechanism that wakes while things are handled forecasts better than one alone.

A person, a point in the plane, walks from thing to thing of three. At each she stops and goes round it, fast and near,
for 5 to 12 steps, and in half of the cases carries it on; what she does is seen for 12 steps, and 8 are forecast. Both
mechanisms with a learned switch, told in training when something is handled; the persistent one alone, wider; and both
with the true switch (an oracle). Control: walks on which she stops nowhere. Two pilots, after the first of which the
lone one was made as large as both, training longer, and the cross entropy of the switch ten times as heavy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...circuits.discrete_sae import area
from ...models.persistent_transient import Forecast, PersistentTransient, persistent_transient
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
STEPS = {"small": 180, "large": 1500}
TRAIN, HELD, BATCH, RATE, WIDTH, ALONE = 1500, 300, 64, 4e-3, 24, 32  # ALONE: width at which one has as many weights
SEEN, AHEAD, THINGS = 12, 8, 3
PACE, NEAR, TURN = 0.08, 0.15, 0.7  # a step's length, how near she stops, and radians of a step around a thing
RATIO, ORACLE, AUC, SAME = 0.95, 0.95, 0.80, 0.02


class Walks:
    """person [walk, 1, step, 1, 2], things [walk, thing, step, 1, 2], on [walk, 1, step]: whether one is handled."""

    def __init__(self, n: int, seed: int, *, stops: bool = True) -> None:
        rng = np.random.default_rng((seed, 5))
        person, things, on = (np.stack(some) for some in zip(*(_walk(rng, stops) for _ in range(n)), strict=True))
        self.person = torch.tensor(person).float()[:, None, :, None]
        self.things = torch.tensor(things).float().transpose(1, 2)[:, :, :, None]
        self.on = torch.tensor(on)[:, None]

    @property
    def changes(self) -> Tensor:
        """Which of those held out begin or end handling in what is forecast. boolean [walk]"""
        ahead = self.on[TRAIN:, 0, SEEN - 1 :]
        return (ahead[:, 1:] != ahead[:, :-1]).any(1)


def _walk(rng: np.random.Generator, stops: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A window of a walk: the person [step, 2], the things [step, thing, 2], and whether one is handled [step]."""
    length, things = SEEN + AHEAD, rng.uniform(0, 1.5, (THINGS, 2))
    while min(np.linalg.norm(things[i] - things[j]) for i in range(THINGS) for j in range(i)) < 0.5:
        things = rng.uniform(0, 1.5, (THINGS, 2))
    here, aim, left, angle, held = rng.uniform(0, 1.5, 2), int(rng.integers(THINGS)), 0, 0.0, -1
    spin, way, found = 1.0, np.zeros(2), []
    for _ in range(length + 30):
        found.append((here.copy(), things.copy(), left > 0 or held >= 0))
        if left > 0:  # round and round
            left, angle = left - 1, angle + spin * TURN
            here = things[aim] + NEAR * np.array([np.cos(angle), np.sin(angle)])
            if left == 0:
                held = aim if rng.random() < 0.5 else -1
                aim = int((aim + rng.integers(1, THINGS)) % THINGS)
            continue
        toward = things[aim] - here
        far = float(np.linalg.norm(toward))
        if far <= NEAR + PACE / 2:
            if stops:
                left, angle, held = int(rng.integers(5, 13)), float(np.arctan2(*-toward[::-1])), -1
                spin = 1.0 if rng.random() < 0.5 else -1.0
                continue
            aim = int((aim + rng.integers(1, THINGS)) % THINGS)
            toward = things[aim] - here
        way = 0.5 * way + 0.5 * PACE * toward / max(float(np.linalg.norm(toward)), 1e-6)
        step = way + rng.normal(0, 0.005, 2)
        here = here + step
        if held >= 0:
            things = things.copy()
            things[held] += step
    begin = int(rng.integers(30))
    person, around, on = zip(*found[begin : begin + length], strict=True)
    return np.stack(person), np.stack(around), np.array(on)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Three models on walks with stops, two on walks without; all see the same batches."""
    expected = (
        f"where handling begins or ends in what is forecast, both mechanisms are off by at most {RATIO} of what the "
        f"persistent one alone is, by two standard errors of paired walks, and elsewhere by less of a gain; on walks "
        f"without stops both are within {SAME:.0%} of each other"
    )
    walks, plain = Walks(TRAIN + HELD, seed), Walks(TRAIN + HELD, seed, stops=False)
    models: dict[str, PersistentTransient] = {}
    off: dict[str, Tensor] = {}
    for name, some in (
        ("both", walks),
        ("persistent alone", walks),
        ("the true switch", walks),
        ("both, no stops", plain),
        ("persistent alone, no stops", plain),
    ):
        torch.manual_seed(seed)
        models[name] = _model(name)
        off[name] = _off(_train(models[name], some, STEPS[scale], seed, told=name == "the true switch"), some, name)
    changes = walks.changes
    ratio = {name: _ratio(off[name], off["persistent alone"], changes) for name in ("both", "the true switch")}
    calm = _ratio(off["both"], off["persistent alone"], ~changes)
    none = _ratio(off["both, no stops"], off["persistent alone, no stops"], torch.ones(HELD, dtype=torch.bool))
    holds = (
        ratio["both"].value <= RATIO
        and ratio["both"].below(1.0)
        and calm.value > ratio["both"].value
        and abs(none.value - 1) <= SAME
    )
    measured = (
        "; ".join(f"{name}: off by {mean(of):.4f}" for name, of in off.items())
        + f"; over the persistent one alone, where handling changes {ratio['both']:.3f}, elsewhere {calm:.3f}, without "
        f"stops {none:.3f}; {int(changes.sum())} of {HELD} walks change"
    )
    auc = _auc(models["both"], walks)
    weights = [_nets.size(models[name]) for name in ("both", "persistent alone")]
    premises = [
        Premise("the switch is learned", f"AUC {AUC}", f"{auc:.3f}", auc >= AUC),
        Premise(
            "with the true switch there is something to gain",
            f"at most {ORACLE} of the persistent one alone where handling changes, by two standard errors",
            f"{ratio['the true switch']:.3f}",
            ratio["the true switch"].value <= ORACLE and ratio["the true switch"].below(1.0),
        ),
        Premise(
            "equal numbers of weights",
            "within 5%",
            f"{max(weights) / min(weights) - 1:.1%} apart",
            max(weights) <= 1.05 * min(weights),
        ),
    ]

    def draw(figure: Any) -> None:
        chosen = (walks.changes.nonzero()[:, 0] + TRAIN)[:4]
        told = {name: _forecast(models[name], walks, chosen) for name in ("both", "persistent alone")}
        for i, (at, axes) in enumerate(zip(chosen.tolist(), figure.subplots(2, 2).flat, strict=True)):
            seen, ahead = walks.person[at, 0, :SEEN, 0], walks.person[at, 0, SEEN - 1 :, 0]
            axes.plot(*seen.T, color="black", lw=1, label="seen")
            axes.plot(*ahead.T, color="black", lw=1, ls=":", label="what came")
            for (name, found), colour in zip(told.items(), ("tab:orange", "tab:blue"), strict=True):
                path = torch.cat([seen[-1:], found.human[i, 0, :, 0]])
                axes.plot(*path.T, color=colour, marker=".", ms=3, lw=1, label=name)
            axes.scatter(*walks.things[at, :, SEEN - 1, 0].T, marker="s", color="grey", s=20, label="things")
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.axes[0].legend(fontsize=7)
        figure.suptitle("where handling begins or ends")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _model(name: str) -> PersistentTransient:
    alone = name.startswith("persistent")
    return persistent_transient(
        dim=2,
        width=ALONE if alone else WIDTH,
        mechanism="persistent" if alone else "both",
        aware=0.6,
        reach=NEAR + PACE,
    )


def _train(model: PersistentTransient, walks: Walks, steps: int, seed: int, *, told: bool) -> PersistentTransient:
    def loss(some: Tensor) -> Tensor:
        person, things, on = walks.person[some], walks.things[some], walks.on[some, :, :-1]
        forecast = model(person[:, :, :SEEN], things[:, :, :SEEN], AHEAD, on=on if told else None)
        learns = model.config.mechanism == "both" and not told
        return model.loss(forecast, person, things, on=on if learns else None, weight=1.0)

    _nets.fit(model.parameters(), loss, TRAIN, steps, seed, batch=BATCH, rate=RATE)
    return model.eval()


@torch.no_grad()
def _forecast(model: PersistentTransient, walks: Walks, some: Tensor, *, told: bool = False) -> Forecast:
    on = walks.on[some, :, :-1] if told else None
    return model(walks.person[some, :, :SEEN], walks.things[some, :, :SEEN], AHEAD, on=on)


def _off(model: PersistentTransient, walks: Walks, name: str) -> Tensor:
    """How far off person and things are on average, of each walk held out. [walk]"""
    held = torch.arange(TRAIN, TRAIN + HELD)
    found = _forecast(model, walks, held, told=name == "the true switch")
    person = (found.human - walks.person[held, :, SEEN:]).norm(dim=-1).flatten(1)
    things = (found.objects - walks.things[held, :, SEEN:]).norm(dim=-1).flatten(1)
    return torch.cat([person, things], 1).mean(1)


def _ratio(one: Tensor, other: Tensor, some: Tensor) -> Mean:
    """Of the means, with the error of paired walks (the delta method)."""
    a, b = one[some].double(), other[some].double()
    ratio = float(a.mean() / b.mean())
    return Mean(ratio, float((a - ratio * b).std() / len(a) ** 0.5 / b.mean()))


def _auc(model: PersistentTransient, walks: Walks) -> float:
    """How well the switch's score ranks steps at which something is handled above others, in what is forecast."""
    held = torch.arange(TRAIN, TRAIN + HELD)
    score = _forecast(model, walks, held).score[:, 0, SEEN - 1 :].flatten()
    on = walks.on[held, 0, SEEN - 1 : -1].flatten()
    return area(score.tolist(), on.tolist())
