"""Chen et al. (arXiv:2512.08135): a token of what is asked about and a map in words help spatial answers, each its own.

A room from above holds 4 or 5 objects of 6 kinds. Each of two views has a token for every object that it sees (70%):
the name that a detector gave it (1% are wrong), and its place in the world, a little off. Two questions: what is
nearest to a thing, and how many things are in a quarter of the room. A small Llama answers with one word: from tokens
alone; with the token; with the map; with both. Controls: another room's map, as many words that say nothing, and a
token trained on objects at random. Two pilots: in the first, of 5 to 7 objects in three views and 200 steps, nothing
was learned; the second, of three arms, chose the step size and was the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...models.central_peripheral import CentralPeripheral, central_peripheral
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
STEPS = {"small": 500, "large": 3000}
TRAIN, HELD, BATCH, RATE = 6000, 1000, 48, 5e-3
KINDS, FEWEST, MOST, VIEWS, CELLS, SEEN, WRONG, OFF = 6, 4, 5, 2, 4, 0.7, 0.01, 0.005
KIND, COLUMN, ROW, NEAREST, COUNT, QUARTER, NUMBER, NOTHING = 1, 7, 11, 15, 16, 17, 21, 27  # where ids begin
WORDS = 28
GAIN, EACH, OVER, HIGH, ORACLE = 0.05, 0.03, 0.15, 0.90, 0.95
ARMS = ("plain", "token", "map", "both", "another room's map", "words that say nothing", "a token of random objects")


class Rooms:
    """Questions about rooms, the first half of them on what is nearest. All [room, ...].

    tokens, places: of all views; mask: which tokens are there; objects: whose each is; about: what is asked about;
    grid: words of the map, 0 where it is shorter; question, answer: ids.
    """

    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng((seed, 7))
        rooms = [_room(rng, nearest=i % 2 == 0) for i in range(n)]
        names = "tokens", "places", "mask", "objects", "about", "grid", "question", "answer", "told"
        found = {name: torch.tensor(np.stack(some)) for name, some in zip(names, zip(*rooms, strict=True), strict=True)}
        self.tokens, self.places = found["tokens"].float(), found["places"].float()
        self.mask, self.objects, self.about = found["mask"], found["objects"], found["about"]
        self.grid, self.question, self.answer = found["grid"], found["question"], found["answer"]
        self.nearest = self.question[:, 0] == NEAREST
        self.told = found["told"]  # by a rule, from what the detector says

    def words(self, arm: str, some: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, and which are there. [room, word]"""
        grid, question = self.grid[some], self.question[some]
        if arm == "another room's map":
            grid = self.grid[some.roll(1)]
        if arm not in ("map", "both", "another room's map", "words that say nothing"):
            return question, torch.ones_like(question, dtype=torch.bool)
        there = torch.cat([grid > 0, torch.ones_like(question, dtype=torch.bool)], 1)
        grid = torch.where(grid > 0, NOTHING, 0) if arm == "words that say nothing" else grid
        return torch.cat([grid, question], 1), there


def _room(rng: np.random.Generator, *, nearest: bool) -> tuple[Any, ...]:
    while True:
        n = int(rng.integers(FEWEST, MOST + 1))
        kinds, at = rng.permutation(KINDS)[:n], rng.uniform(0, 1, (n, 2))
        views = rng.random((VIEWS, n)) < SEEN
        seen = np.flatnonzero(views.any(0))
        if len(seen) >= 3:
            break
    kinds, at, views = kinds[seen], at[seen], views[:, seen]
    n = len(seen)
    names = np.where(rng.random(n) < WRONG, rng.integers(0, KINDS, n), kinds)
    tokens, places = np.zeros((VIEWS * MOST, KINDS)), np.zeros((VIEWS * MOST, 2))
    mask, objects = np.zeros(VIEWS * MOST, bool), np.zeros((MOST, VIEWS * MOST), bool)
    for view, i in zip(*views.nonzero(), strict=True):
        k = view * MOST + i
        tokens[k, names[i]], places[k] = 1, at[i] + rng.normal(0, OFF, 2)
        mask[k], objects[i, k] = True, True
    told = np.array([places[objects[i]].mean(0) for i in range(n)])
    cells = np.clip((told * CELLS).astype(int), 0, CELLS - 1)
    order = np.lexsort((names, cells[:, 1], cells[:, 0]))
    grid = np.zeros(3 * MOST, int)
    grid[: 3 * n] = np.stack([COLUMN + cells[:, 0], ROW + cells[:, 1], KIND + names], 1)[order].ravel()
    about = np.zeros(MOST, bool)
    if nearest:
        i = int(rng.integers(n))
        about[i], question = True, (NEAREST, KIND + kinds[i])
        answer = KIND + kinds[_nearest(at, i)]
        known = np.flatnonzero(names == kinds[i])
        by_rule = KIND + names[_nearest(told, int(known[0]))] if len(known) else -1
    else:
        quarter = int(rng.integers(4))
        about[:n] = _quarters(at) == quarter
        question, answer = (COUNT, QUARTER + quarter), NUMBER + about.sum()
        by_rule = NUMBER + (_quarters(told) == quarter).sum()
    return tokens, places, mask, objects, about, grid, np.array(question), np.array(answer), np.array(by_rule)


def _nearest(at: np.ndarray, i: int) -> int:
    far = np.linalg.norm(at - at[i], axis=1)
    far[i] = np.inf
    return int(far.argmin())


def _quarters(at: np.ndarray) -> np.ndarray:
    return (at[:, 0] >= 0.5) + 2 * (at[:, 1] >= 0.5)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Seven models, as many steps each, on the same rooms."""
    expected = (
        f"with both {GAIN:.0%} more answers are right than from tokens alone; the token helps on what is nearest and "
        f"the map on how many, each by {EACH:.0%}, by two standard errors of paired questions; another room's map, "
        f"words that say nothing and a token of random objects give less than half of that"
    )
    rooms = Rooms(TRAIN + HELD, seed)
    held = torch.arange(TRAIN, TRAIN + HELD)
    near = rooms.nearest[held]
    models, right = {}, {}
    for arm in ARMS:
        torch.manual_seed(seed)
        models[arm] = _train(arm, rooms, STEPS[scale], seed)
        right[arm] = _right(models[arm], arm, rooms, held)
    every = torch.ones_like(near)

    def gain(arm: str, some: Tensor) -> Mean:
        return mean((right[arm] - right["plain"])[some])

    both, token, grid = gain("both", every), gain("token", near), gain("map", ~near)
    vain = {
        "another room's map": (gain("another room's map", ~near), grid),
        "words that say nothing": (gain("words that say nothing", ~near), grid),
        "a token of random objects": (gain("a token of random objects", near), token),
    }
    holds = (
        both.value >= GAIN
        and both.above()
        and all(one.value >= EACH and one.above() for one in (token, grid))
        and all(one.value < whole.value / 2 for one, whole in vain.values())
    )
    measured = (
        "right on what is nearest and on how many: "
        + "; ".join(f"{arm} {of[near].mean():.1%}, {of[~near].mean():.1%}" for arm, of in right.items())
        + f"; above tokens alone: both {both:.1%}, the token on what is nearest {token:.1%}, the map on how many "
        f"{grid:.1%}; " + ", ".join(f"{name} {one:.1%}" for name, (one, _) in vain.items())
    )
    answers = rooms.answer[held]
    chance = float(mean(torch.tensor([_most(answers[near]), _most(answers[~near])])).value)
    plain, oracle = float(right["plain"].mean()), float((rooms.told[held] == answers).float().mean())
    premises = [
        Premise(
            "tokens alone tell some of it, and not all",
            f"{OVER:.0%} above the commonest answers, {chance:.1%}, and at most {HIGH:.0%}",
            f"{plain:.1%}",
            chance + OVER <= plain <= HIGH,
        ),
        Premise("a rule tells it from what was detected", f"{ORACLE:.0%} right", f"{oracle:.1%}", oracle >= ORACLE),
    ]

    def draw(figure: Any) -> None:
        axes, places = figure.subplots(), np.arange(len(ARMS))
        for i, (name, some) in enumerate((("what is nearest", near), ("how many", ~near))):
            shares = [mean(right[arm][some]) for arm in ARMS]
            axes.bar(places + 0.4 * i, [s.value for s in shares], 0.4, yerr=[2 * s.error for s in shares], label=name)
        axes.set_xticks(places + 0.2, ARMS, rotation=25, ha="right")
        axes.set_ylabel("share right")
        axes.legend()

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _train(arm: str, rooms: Rooms, steps: int, seed: int) -> CentralPeripheral:
    model = central_peripheral(
        KINDS,
        axes=2,
        token=arm in ("token", "both", "a token of random objects"),
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=3,
        frequencies=4,
    )
    draws = torch.Generator().manual_seed(seed)

    def loss(some: Tensor) -> Tensor:
        words, there = rooms.words(arm, some)
        answers, about = rooms.answer[some][:, None], rooms.about[some]
        if arm == "a token of random objects":
            present = rooms.objects[some].any(-1)
            chance = torch.rand(about.shape, generator=draws).masked_fill(~present, 2.0)
            about = chance.argsort(1).argsort(1) < about.sum(1, keepdim=True)  # as many others
        objects = rooms.objects[some] if model.config.token else None
        found = model(
            rooms.tokens[some],
            rooms.places[some],
            words,
            answers,
            objects=objects,
            mask=rooms.mask[some],
            words_mask=there,
        )
        return model.loss(found, answers, about if model.config.token else None)

    _nets.fit(model.parameters(), loss, TRAIN, steps, seed, batch=BATCH, rate=RATE)
    return model.eval()


@torch.no_grad()
def _right(model: CentralPeripheral, arm: str, rooms: Rooms, held: Tensor) -> Tensor:
    """Which questions are answered right. [question]"""
    words, there = rooms.words(arm, held)
    found = model(rooms.tokens[held], rooms.places[held], words, mask=rooms.mask[held], words_mask=there)
    return (found.logits[:, 0].argmax(-1) == rooms.answer[held]).float()


def _most(answers: Tensor) -> float:
    return float(answers.bincount().max() / len(answers))
