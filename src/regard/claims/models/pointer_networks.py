"""Vinyals et al. (arXiv:1506.03134): a network that points finds convex hulls, and of more points than it was shown.

Points come from left to right, which the paper leaves to chance: it makes the problem learnable in a minute. The
control is the paper's own baseline, of the same sizes; beside the area spanned stands that of as many points at random.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data import plane
from ...models.pointer_networks import END, IGNORED, pointer_networks, targets
from .._measure import Mean, mean

SCALES = "small", "large"
STEPS = {"small": 2500, "large": 25000}
TRAINED, TESTED = (5, 6, 7, 8), (5, 8, 10, 12)
SETS, HELD, SIZE, RATE, DIM = 5000, 500, 64, 4e-3, 96
LONGEST = TRAINED[-1]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A pointer network and a sequence-to-sequence LSTM of the same sizes, trained on hulls of 5 to 8 points."""
    expected = (
        f"of {LONGEST} points, the pointer network names the hull exactly at least twice as often as the "
        f"sequence-to-sequence LSTM; of {TESTED[-1]}, more than either was trained on, it still names more hulls "
        "exactly than the LSTM of 8; both by two standard errors; and what it points to spans 95% of the hull's area "
        "or more in the mean, more than as many points at random by two standard errors"
    )
    sets = {n: [_points(n, seed, i) for i in range(SETS)] for n in TRAINED}
    data = {n: (_stacked(s), *targets([plane.hull(p) for p in s])) for n, s in sets.items()}
    held = {n: [_points(n, seed, SETS + i) for i in range(HELD)] for n in TESTED}
    torch.manual_seed(seed)
    pointer, plain = pointer_networks(dim=DIM), _Seq2Seq()
    for model in (pointer, plain):
        _train(model, data, STEPS[scale])
    answers = {n: pointer.answers(_stacked(sets), once=True) for n, sets in held.items()}
    exact: dict[Any, np.ndarray] = {n: _exact(answers[n], held[n]) for n in TESTED}
    lstm = {n: _exact(plain.answers(_stacked(held[n])), held[n]) for n in TESTED if n <= LONGEST}
    exact["LSTM"] = lstm[LONGEST]
    right, baseline = ({n: float(of[n].mean()) for n in of if n != "LSTM"} for of in (exact, lstm))
    areas = {n: np.array([_span(a, p) for a, p in zip(answers[n], held[n])]) for n in TESTED}
    spanned = {n: float(areas[n].mean()) for n in TESTED}
    most, rng = TESTED[-1], np.random.default_rng(seed)
    by_chance = np.array(
        [_span(rng.permutation(most)[: len(set(a))].tolist(), p) for a, p in zip(answers[most], held[most])]
    )
    wider = mean(areas[most] - by_chance)
    plainly = exact["LSTM"]
    twice, farther = mean(exact[LONGEST] - 2 * plainly), _apart(exact[most], plainly)
    holds = twice.above() and farther.above() and spanned[most] >= 0.95 and wider.above()
    measured = (
        f"hulls exactly right: of 8 points {mean(exact[8]):.1%} by pointing, {mean(plainly):.1%} by the LSTM; of 12 "
        f"points {mean(exact[12]):.1%} by pointing, spanning {mean(areas[12]):.1%} of the hull's area, as many at "
        f"random {mean(by_chance):.1%} ({HELD} sets each)"
    )
    learned = Premise(
        "the LSTM learns something", "5% of hulls of 5 points exactly", f"{baseline[5]:.1%}", baseline[5] >= 0.05
    )

    def draw(figure: Any) -> None:
        left, side = figure.subplots(1, 2, width_ratios=(3, 2))
        left.plot(TESTED, [right[n] for n in TESTED], "o-", label="pointer network, exactly right")
        left.plot(TESTED, [spanned[n] for n in TESTED], "o:", color="tab:blue", label="share of the hull's area")
        left.plot(list(baseline), list(baseline.values()), "s-", label="LSTM, exactly right")
        left.axvspan(TRAINED[0], LONGEST, color="grey", alpha=0.15, label="trained on")
        left.set(xlabel="points", ylim=(0, 1.03), title="Convex hulls of points not seen before")
        left.legend(loc="lower right")
        points, answer = held[most][0], answers[most][0]
        for cycle, style, name in ((plane.hull(points), "k-", "hull"), (answer, "--", "pointed to")):
            side.plot(*points[[*cycle, *cycle[:1]]].T, style, label=name)
        side.plot(*points.T, "o", color="tab:blue")
        side.set(xticks=[], yticks=[], aspect="equal", title=f"The first set of {most}")
        side.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)

    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


class _Seq2Seq(nn.Module):
    """The paper's baseline: LSTM to LSTM, and a score for each of the numbers 1 to 8 and the end."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(2, DIM, batch_first=True), nn.LSTM(2, DIM, batch_first=True)
        self.start, self.output = nn.Parameter(torch.zeros(2)), nn.Linear(DIM, LONGEST + 1)

    def forward(self, points: Tensor, answers: Tensor) -> Tensor:
        _, state = self.encoder(points)
        decoded, _ = self.decoder(self._given(points, F.pad(answers[:, :-1], (1, 0), value=END)), state)
        return self.output(decoded)

    @torch.no_grad()
    def answers(self, points: Tensor) -> list[list[int]]:
        at = torch.full((len(points), 1), END)
        for _ in range(LONGEST + 1):
            at = torch.cat([at, self(points, F.pad(at[:, 1:], (0, 1)))[:, -1:].argmax(-1)], 1)
            at = at.clamp_max(points.shape[1])  # a number that there is no point for is as wrong as any
        return [[i - 1 for i in (row[: row.index(END)] if END in row else row)] for row in at[:, 1:].tolist()]

    def _given(self, points: Tensor, at: Tensor) -> Tensor:
        choices = torch.cat([self.start.expand(len(points), 1, -1), points], 1)
        return choices.gather(1, at[..., None].expand(-1, -1, 2))


def _points(n: int, seed: int, index: int) -> plane.Points:
    found = plane.points(n, seed=100 * seed + n, index=index)
    return found[np.argsort(found[:, 0])]


def _stacked(sets: list[plane.Points]) -> Tensor:
    return torch.from_numpy(np.stack(sets)).float()


def _train(model: nn.Module, data: dict[int, tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        points, give, score = data[TRAINED[step % len(TRAINED)]]
        at = torch.randint(SETS, (SIZE,))
        scores = model(points[at], give[at])
        loss = F.cross_entropy(scores.flatten(0, 1), score[at].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()


def _exact(answers: list[list[int]], sets: list[plane.Points]) -> np.ndarray:
    """Which hulls are exactly right. [set]"""
    return np.array([float(answer == plane.hull(points)) for answer, points in zip(answers, sets)])


def _apart(more: np.ndarray, less: np.ndarray) -> Mean:
    """The difference of means of other sets."""
    one, other = mean(more), mean(less)
    return Mean(one.value - other.value, math.hypot(one.error, other.error))


def _span(answer: list[int], points: plane.Points) -> float:
    """Area of the hull of what was pointed to, as a share of the whole hull's."""
    whole, part = (_area(points[plane.hull(points)]), points[sorted(set(answer))])
    return _area(part[plane.hull(part)]) / whole if len(part) > 2 else 0.0


def _area(corners: plane.Points) -> float:
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
