"""Vinyals et al. (arXiv:1506.03134): a network that points finds convex hulls, and of more points than it was shown.

Points come from left to right, which the paper leaves to chance: it makes the problem learnable in a minute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding
from ...data import plane
from ...models.pointer_networks import END, IGNORED, pointer_networks, targets

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
        "exactly than the LSTM of 8, and what it points to spans 95% of the hull's area or more in the mean"
    )
    sets = {n: [_points(n, seed, i) for i in range(SETS)] for n in TRAINED}
    data = {n: (_stacked(s), *targets([plane.hull(p) for p in s])) for n, s in sets.items()}
    held = {n: [_points(n, seed, SETS + i) for i in range(HELD)] for n in TESTED}
    torch.manual_seed(seed)
    pointer, plain = pointer_networks(dim=DIM), _Seq2Seq()
    for model in (pointer, plain):
        _train(model, data, STEPS[scale])
    answers = {n: pointer.answers(_stacked(sets), once=True) for n, sets in held.items()}
    right = {n: _exact(answers[n], held[n]) for n in TESTED}
    baseline = {n: _exact(plain.answers(_stacked(held[n])), held[n]) for n in TESTED if n <= LONGEST}
    spanned = {n: float(np.mean([_span(a, p) for a, p in zip(answers[n], held[n])])) for n in TESTED}
    most = TESTED[-1]
    holds = right[LONGEST] >= 2 * baseline[LONGEST] and right[most] > baseline[LONGEST] and spanned[most] >= 0.95
    measured = (
        f"hulls exactly right: of 8 points {right[8]:.1%} by pointing, {baseline[8]:.1%} by the LSTM; of 12 points "
        f"{right[12]:.1%} by pointing, spanning {spanned[12]:.1%} of the hull's area ({HELD} sets each)"
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

    return Finding(holds, measured, expected, seed, draw=draw)


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


def _exact(answers: list[list[int]], sets: list[plane.Points]) -> float:
    return float(np.mean([answer == plane.hull(points) for answer, points in zip(answers, sets)]))


def _span(answer: list[int], points: plane.Points) -> float:
    """Area of the hull of what was pointed to, as a share of the whole hull's."""
    whole, part = (_area(points[plane.hull(points)]), points[sorted(set(answer))])
    return _area(part[plane.hull(part)]) / whole if len(part) > 2 else 0.0


def _area(corners: plane.Points) -> float:
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
