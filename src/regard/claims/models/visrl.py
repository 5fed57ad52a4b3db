"""Chen et al. (arXiv:2503.07523): where to look is learned from judged chains alone, without annotated boxes.

Pictures of 64 pixels with four things of different colours, each with one of four marks of three pixels; the mark on
the thing of a colour is asked for. The policy sees 16 x 16 pixels, where all marks look alike, and has 64 places of 20
pixels to look at. The reader, a small convolutional network that learned from random crops half of which hold the
thing, is frozen, one for all runs, and sees the crop alone. Three rounds of sampling chains and of training the box
step on what is kept; each round is a phase, with a start of its own. An answer's score is whether it is right; a crop's
is the reader's probability of the right answer, of what it has above chance, since a reader that sees no mark gives
each a quarter. Arms: from nothing; from nothing, scores shuffled among questions (control); after a warm-up on 200
boxes, of the first run, which judges nothing. The frozen reader shares nothing with the policy, so the answer step
alone could not move it, and is not run. Stand-ins: all of it is small and generated. Settings were tried on two other
seeds.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models._boxes import iou
from ...models.visrl import LookThenAnswer, Pairs, preference_pairs, step_dpo, visrl
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
RUNS, QUESTIONS, STEPS = {"small": 3, "large": 8}, {"small": 600, "large": 6000}, {"small": 100, "large": 600}
SIZE, SIDE, THING, MARKS, HELD, ROUNDS, WARM = 64, 20, 12, 4, 400, 3, 200
RATE, BATCH, READER = 3e-3, 32, 200
COLOURS = torch.tensor([[1.0, 0, 0], [0, 0.8, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
NAMES = "red", "green", "blue", "yellow", "pink", "cyan"
RISE, GAIN, STILL, SEEN, BLIND, ENOUGH = 0.15, 0.10, 0.03, 0.85, 0.45, 0.30
ARMS = "from nothing", "shuffled", "after 200 boxes"


class Shown(NamedTuple):
    pictures: Tensor  # [picture, 3, row, column]
    asked: Tensor  # the colour [picture]
    marks: Tensor  # the answer [picture]
    boxes: Tensor  # of a crop's size around what is asked for [picture, 4]


class Reader(nn.Module):
    """Logits of marks, from a crop and the colour that is asked for."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.see, self.then = nn.Conv2d(3, dim, 3), nn.Conv2d(dim, dim, 3)
        self.question, self.read = nn.Embedding(len(COLOURS), dim), nn.Linear(dim, MARKS)

    def forward(self, pictures: Tensor, crops: Tensor, questions: Tensor) -> Tensor:
        seen = F.max_pool2d(F.relu(self.see(2 * crops - 1)), 2)
        seen = F.relu(self.then(seen) + self.question(questions)[:, :, None, None])
        return self.read(seen.amax((2, 3)))


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Overlap of the likeliest place with the true one, and right answers, before and after."""
    expected = (
        f"from nothing, overlap rises by {RISE} or more and right answers by {GAIN:.0%} or more, by two standard "
        f"errors over runs; with shuffled scores overlap moves by less than {STILL}"
    )
    before, after, pairs, sighted, blind = [], {arm: [] for arm in ARMS}, [], [], []
    kept: Any = None
    reader = _reader(seed)
    for run in range(RUNS[scale] * seed, RUNS[scale] * (seed + 1)):
        torch.manual_seed(run)
        train, held = shown(QUESTIONS[scale], 2 * run), shown(HELD, 2 * run + 1)
        model = visrl(reader, questions=len(COLOURS), size=SIDE, crop=SIDE / SIZE, heads=2, layers=1)
        sighted.append(_right(model, held, _nearest(model, held)))
        blind.append(_right(model, held, torch.randint(len(model.policy.places), (HELD,))))
        before.append(_judged(model, held))
        for arm in ARMS if not pairs else ARMS[:2]:  # the warm-up is shown once, and judges nothing
            torch.manual_seed(run)
            learner = LookThenAnswer(copy.deepcopy(model.policy), model.reader, size=SIDE)
            if arm == ARMS[2]:
                _warm(learner, train)
            share = _reinforced(learner, train, STEPS[scale], shuffled=arm == ARMS[1])
            after[arm].append(_judged(learner, held))
            if arm == ARMS[0]:
                pairs.append(share)
                kept = kept or (held, model, learner)
    start = torch.tensor(before)
    ends = {arm: torch.tensor(of) for arm, of in after.items()}
    rise: dict[str, Mean] = {arm: mean(of[:, 0] - start[:, 0]) for arm, of in ends.items()}
    gain = mean(ends[ARMS[0]][:, 1] - start[:, 1])
    own, moved = rise[ARMS[0]], rise[ARMS[1]]
    holds = own.value >= RISE and own.above() and gain.value >= GAIN and gain.above() and abs(moved.value) < STILL
    told = "; ".join(f"{arm} {of[:, 0].mean():.2f}, {of[:, 1].mean():.0%}" for arm, of in ends.items())
    measured = (
        f"overlap and right answers, at first {start[:, 0].mean():.2f}, {start[:, 1].mean():.0%}; {told}; overlap "
        f"rises by {own:.2f}, shuffled by {moved:.2f}, right answers by {gain:.2f}"
    )
    premises = [
        Premise("the mark is read up close", f"right {SEEN:.0%} or more", f"{mean(sighted):.2f}",
                mean(sighted).value >= SEEN),
        Premise("a random crop does not show it", f"right {BLIND:.0%} or less", f"{mean(blind):.2f}",
                mean(blind).value <= BLIND),
        Premise("chains give pairs", f"of {ENOUGH:.0%} of questions or more", f"{mean(pairs):.2f}",
                mean(pairs).value >= ENOUGH),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        held, *models = kept
        axes = figure.subplots(2, 4)
        for row, (name, model) in enumerate(zip(("at first", "after"), models, strict=True)):
            for i, axis in enumerate(axes[row]):
                axis.imshow(held.pictures[i].permute(1, 2, 0).numpy())
                with torch.no_grad():
                    place = model(held.pictures[i : i + 1], held.asked[i : i + 1]).place
                for box, style in ((held.boxes[i], "w--"), (model.policy.places[place[0]], "k-")):
                    left, top, right, bottom = (box * SIZE - 0.5).tolist()
                    axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], style)
                axis.set_title(f"{name}: mark on {NAMES[held.asked[i]]}", fontsize=7)
                axis.axis("off")

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


def shown(n: int, seed: int) -> Shown:
    """Pictures of four things in quarters of their own, of different colours, each with a mark."""
    draws = torch.Generator().manual_seed(seed)
    colours = torch.rand(n, len(COLOURS), generator=draws).argsort(-1)[:, :4]
    marks = torch.randint(MARKS, (n, 4), generator=draws)
    corner = torch.randint(SIZE // 2 - THING, (n, 4, 2), generator=draws)
    corner += SIZE // 2 * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # x and y
    eye = torch.eye(3)
    stamps = torch.stack([eye, eye.flip(1), torch.tensor([[0, 1, 0]] * 3).float(), torch.tensor([[0, 1.0, 0]] * 3).T])
    across = torch.arange(SIZE)
    away = (across - corner[..., None]).float()  # [picture, thing, x or y, pixel]
    x, y = away[:, :, 0, None, :], away[:, :, 1, :, None]
    inside = (x >= 0) & (x < THING) & (y >= 0) & (y < THING)  # [picture, thing, row, column]
    at = THING // 2 - 1
    near = (x >= at - 1) & (x <= at + 1) & (y >= at - 1) & (y <= at + 1)
    row, column = ((v - at + 1).clamp(0, 2).long().expand(inside.shape) for v in (y, x))
    black = near & (stamps[marks[..., None, None], row, column] > 0)
    pictures = torch.full((n, 3, SIZE, SIZE), 0.5)
    for i in range(4):
        of = COLOURS[colours[:, i]][..., None, None].expand_as(pictures)
        pictures = torch.where(inside[:, i, None], of, pictures).masked_fill(black[:, i, None], 0.0)
    first = corner[:, 0] + at + 0.5
    boxes = torch.cat([first - SIDE / 2, first + SIDE / 2], -1) / SIZE
    return Shown(pictures, colours[:, 0], marks[:, 0], boxes)


def _nearest(model: LookThenAnswer, of: Shown) -> Tensor:
    """The place that overlaps the true box most. [picture]"""
    return iou(of.boxes, model.policy.places).argmax(-1)


def _reader(seed: int) -> Reader:
    """Half of the crops that it learns from hold what is asked for."""
    data, reader = shown(2000, 2 * seed + 10**6), Reader()
    model = visrl(reader, questions=len(COLOURS), size=SIDE, crop=SIDE / SIZE, heads=2, layers=1)
    true = _nearest(model, data)

    def loss(some: Tensor) -> Tensor:
        place = torch.randint(len(model.policy.places), some.shape)
        place = torch.where(torch.rand(some.shape) < 0.5, true[some], place)
        logits = reader(data.pictures[some], model.cropped(data.pictures[some], place), data.asked[some])
        return F.cross_entropy(logits, data.marks[some])

    _nets.fit(reader.parameters(), loss, 2000, READER, seed, batch=128, rate=1e-2)
    return reader.requires_grad_(False)


def _warm(model: LookThenAnswer, data: Shown) -> None:
    true = _nearest(model, data)

    def loss(some: Tensor) -> Tensor:
        return F.cross_entropy(model.policy(data.pictures[some], data.asked[some]), true[some])

    _nets.fit(model.policy.parameters(), loss, WARM, 60, 0, rate=RATE)


def _reinforced(model: LookThenAnswer, data: Shown, steps: int, *, shuffled: bool) -> float:
    """Trained in place on its own chains; the share of questions that gave a pair, over all rounds."""
    optimiser, shares = torch.optim.AdamW(model.policy.parameters(), RATE), []
    for _ in range(ROUNDS):
        place, said = model.attempts(data.pictures, data.asked)
        with torch.no_grad():
            read = [model.reader(data.pictures, model.cropped(data.pictures, of), data.asked) for of in place.T]
        sure = torch.stack(read, 1).softmax(-1)[torch.arange(len(place)), :, data.marks]
        right, clear = (said == data.marks[:, None]).float(), ((sure * MARKS - 1) / (MARKS - 1)).clamp_min(0)
        if shuffled:
            other = torch.randperm(len(place))
            right, clear = right[other], clear[other]
        chosen, rejected, there = preference_pairs(right, clear)
        shares.append(float(there.float().mean()))
        every, start = torch.arange(len(place)), copy.deepcopy(model)
        of = [(place[every, which], said[every, which]) for which in (chosen, rejected)]
        # Shuffled scores may prefer a chain to one that is the same.
        usable = (there & ((of[0][0] != of[1][0]) | (of[0][1] != of[1][1]))).nonzero()[:, 0]
        for _ in range(steps if len(usable) else 0):
            some = usable[torch.randint(len(usable), (BATCH,))]
            both = [(a[some], b[some]) for a, b in of]
            loss = step_dpo(model, start, Pairs(data.pictures[some], data.asked[some], *both), steps=("box",))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return sum(shares) / len(shares)


@torch.no_grad()
def _right(model: LookThenAnswer, of: Shown, place: Tensor) -> float:
    answers = model.reader(of.pictures, model.cropped(of.pictures, place), of.asked)
    return float((answers.argmax(-1) == of.marks).float().mean())


@torch.no_grad()
def _judged(model: LookThenAnswer, of: Shown) -> tuple[float, float]:
    """Overlap of the likeliest place with the true box, and the share of right answers."""
    place = model(of.pictures, of.asked).place
    overlap = iou(of.boxes[:, None], model.policy.places[place][:, None])
    return float(overlap.mean()), _right(model, of, place)
