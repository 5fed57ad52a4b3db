"""Does a trained head find more than an untrained one, and is a path harder to find than an object?

Panoramas are generated: coloured signs at random directions. An object search names a sign by colour and kind; it is to
be faced. A path search names the colour of an arrow; the way to go is a quarter turn from the arrow to the side that it
points to, where nothing is to be seen. One small network learns both, by imitating a teacher that looks around until it
sees the sign, and then by reward. Paths are scored with the tolerance of objects too, since their own is a third of it
and harder by geometry alone. In the control, panoramas have one arrow each, so that its colour does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...catalog import Finding, Premise
from ...gaze.humanoid_search import (
    Episode,
    HeadPolicy,
    HeadPolicyConfig,
    Rolled,
    imitate,
    reinforce,
    roll,
    search_score,
)
from .._measure import mean

SCALES = "small", "large"
STEPS = {"small": (280, 30), "large": (6000, 1000)}  # of imitation, of reward
POOL = 60  # batches of panoramas that are shown in turn
BATCH, GROUPS, RATE, TURNS, TEST = 48, 6, 5e-3, 6, 300
ROWS = 32
COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.3, 1.0]])
SIGNS = {  # seven pixels a side
    "cross": ("...#...", "...#...", "...#...", "#######", "...#...", "...#...", "...#..."),
    "frame": ("#######", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", "#######"),
    "disc": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "right": ("...#...", "...##..", "#######", "#######", "#######", "...##..", "...#..."),
    "left": ("...#...", "..##...", "#######", "#######", "#######", "..##...", "...#..."),
}
KINDS = tuple(SIGNS)[:3]
OBJECTS = len(COLOURS) * len(KINDS)  # instructions; those of paths come after
CONFIG = HeadPolicyConfig(OBJECTS + len(COLOURS), size=(24, 24), width=48)

EXPECTED = (
    "trained by imitation and reward, 25 points more of either search succeed than untrained, by two standard errors; "
    "with the same tolerance 8 points fewer of paths than of objects, by two standard errors; with one arrow in a "
    "panorama, paths are at most half as far behind objects"
)


class World(NamedTuple):
    """Searches side by side. goal [batch, 2]: yaw and pitch to face; sign [batch]: the yaw of what gives it away."""

    panoramas: Tensor
    instruction: Tensor
    start: Tensor
    goal: Tensor
    sign: Tensor
    path: Tensor

    def episodes(self) -> list[Episode]:
        found = []
        for panorama, instruction, start, (yaw, pitch), path in zip(
            self.panoramas, self.instruction.tolist(), self.start.tolist(), self.goal.tolist(), self.path.tolist()
        ):
            box = None if path else (pitch, pitch)
            found.append(Episode(panorama, instruction, (yaw, yaw), box, start))
        return found


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of searches that succeed, before and after training, of either kind and with either tolerance."""
    steps, rewarded = STEPS[scale]
    judged = {task: _world(TEST, seed, 10_000 + i, task) for i, task in enumerate(("object", "path", "one arrow"))}
    torch.manual_seed(seed)
    policy = HeadPolicy(CONFIG)
    untrained = {task: _right(policy, judged[task]) for task in ("object", "path")}
    losses = _imitated(policy, steps, seed)
    imitated = {task: float(_right(policy, judged[task]).mean()) for task in ("object", "path")}
    _rewarded(policy, rewarded, seed)
    answers = {task: _answers(policy, world) for task, world in judged.items()}
    trained = {task: _scored(answers[task], judged[task]) for task in ("object", "path")}
    strict = float(_scored(answers["path"], judged["path"], path_tolerance=10.0).mean())
    control = _scored(answers["one arrow"], judged["one arrow"])

    gains = {task: mean(trained[task] - untrained[task]) for task in trained}
    apart = trained["object"].mean() - trained["path"].mean()
    error = float(sum(of.var(ddof=1) / len(of) for of in trained.values()) ** 0.5)
    near = float(trained["object"].mean() - control.mean())
    holds: bool | None = (
        all(gain.value >= 0.25 and gain.above() for gain in gains.values())
        and apart >= 0.08
        and apart >= 2 * error
        and near <= apart / 2
    )
    found = float(trained["object"].mean())
    chance = {task: _chance(judged[task]) for task in ("object", "path")}
    measured = (
        "found with a tolerance of 30 degrees: "
        + ", ".join(
            f"{task} {trained[task].mean():.1%} (untrained {untrained[task].mean():.1%}, after imitation alone "
            f"{imitated[task]:.1%}, a random direction {chance[task]:.1%})"
            for task in trained
        )
        + f"; paths with 10 degrees {strict:.1%}; paths fewer by {100 * apart:.1f} ± {100 * error:.1f} points; with "
        f"one arrow {control.mean():.1%}, fewer than objects by {100 * near:.1f}"
    )
    oracle = min(float(_scored([(y, p) for y, p in world.goal.tolist()], world).mean()) for world in judged.values())
    premises = [
        Premise("an oracle that knows the direction succeeds", "every time", f"{oracle:.0%}", oracle == 1),
        Premise(
            "imitation has learned: its loss, last beside first",
            "half or less",
            f"{losses[-1] / losses[0]:.2f}",
            losses[-1] <= losses[0] / 2,
        ),
        Premise("objects are found", "40% or more", f"{found:.0%}", found >= 0.4),
    ]
    return Finding(holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, untrained, trained, control))


def _world(n: int, seed: int, number: int, task: str) -> World:
    """task: "object", "path", "one arrow" (a path), or "both", half of each."""
    rng = np.random.default_rng((seed, number))
    panoramas = 0.1 + 0.15 * torch.from_numpy(rng.random((n, 1, ROWS, 2 * ROWS))).float().expand(-1, 3, -1, -1)
    panoramas = panoramas.clone()
    instruction, start, goal, given, paths = [], [], [], [], []
    for world in panoramas:
        path = task != "object" and (task != "both" or rng.random() < 0.5)
        yaws = 360 * (rng.random() + np.arange(5) / 5 + 0.06 * rng.random(5)) % 360  # apart, so that none hides another
        rng.shuffle(yaws)
        pitches = rng.uniform(-30, 30, 5)
        kind, colour = int(rng.integers(len(KINDS))), int(rng.integers(len(COLOURS)))
        side = ["left", "right"][int(rng.integers(2))]
        if path:
            first = (side, colour)
            others = [(c, ["left", "right"][int(rng.integers(2))]) for c in range(len(COLOURS)) if c != colour]
            more = [] if task == "one arrow" else [(name, c) for c, name in others]
            instruction.append(OBJECTS + colour)
        else:
            first, more = (KINDS[kind], colour), [(side, int(rng.integers(len(COLOURS))))]
            instruction.append(colour * len(KINDS) + kind)
        while len(more) < 4:
            clutter = KINDS[int(rng.integers(len(KINDS)))], int(rng.integers(len(COLOURS)))
            if clutter != first:
                more.append(clutter)
        for (name, c), yaw, pitch in zip([first, *more], yaws, pitches):
            _paste(world, name, c, yaw, pitch)
        turn = {"left": -90, "right": 90}[side] if path else 0
        goal.append(((yaws[0] + turn) % 360, 0.0 if path else pitches[0]))
        given.append(yaws[0])
        start.append(90 * int(rng.integers(4)))
        paths.append(path)
    return World(
        panoramas,
        torch.tensor(instruction),
        torch.tensor(start),
        torch.tensor(goal, dtype=torch.float32),
        torch.tensor(given, dtype=torch.float32),
        torch.tensor(paths),
    )


def _paste(world: Tensor, name: str, colour: int, yaw: float, pitch: float) -> None:
    shape = torch.tensor([[mark == "#" for mark in line] for line in SIGNS[name]])
    rows = round((0.5 - pitch / 180) * ROWS) + torch.arange(-3, 4)
    columns = (round(((yaw + 180) % 360) / 360 * 2 * ROWS) + torch.arange(-3, 4)) % (2 * ROWS)
    at = rows[:, None], columns[None]
    for channel in range(3):
        world[channel][at] = torch.where(shape, COLOURS[colour, channel], world[channel][at])


def _teacher(policy: HeadPolicy, world: World) -> Callable[[Tensor], Tensor]:
    """Looks on to the right until the sign is within 40 degrees, then turns to the goal, then submits."""
    known = torch.zeros(len(world.goal), dtype=torch.bool)

    def act(heading: Tensor) -> Tensor:
        nonlocal known
        known = known | (_turn(heading[:, 0], world.sign).abs() <= 40)
        away = torch.stack([_turn(heading[:, 0], world.goal[:, 0]), world.goal[:, 1] - heading[:, 1]], 1)
        on = torch.tensor([75.0, 0.0]).expand_as(away)
        action = policy.nearest(torch.where(known[:, None], away, on))
        there = known & (away[:, 0].abs() <= 7.5) & (away[:, 1].abs() <= 15.01)
        return torch.where(there, policy.rotations, action)

    return act


def _turn(heading: Tensor, goal: Tensor) -> Tensor:
    return (goal - heading + 180) % 360 - 180


def _imitated(policy: HeadPolicy, steps: int, seed: int) -> list[float]:
    """Mean loss of the first and of the last tenth."""
    policy.train()
    optimiser = torch.optim.Adam(policy.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    pool = [_world(BATCH, seed, number, "both") for number in range(min(POOL, steps))]
    losses = []
    for step in range(steps):
        world = pool[step % len(pool)]
        teacher = _teacher(policy, world)
        loss = imitate(policy, world.panoramas, world.instruction, world.start, teacher, turns=TURNS)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    tenth = max(1, steps // 10)
    return [float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))]


def _rewarded(policy: HeadPolicy, steps: int, seed: int) -> None:
    optimiser = torch.optim.Adam(policy.parameters(), RATE / 10)
    chance = torch.Generator().manual_seed(seed)
    for step in range(steps):
        world = _world(GROUPS, seed, 20_000 + step, "both")
        episodes = [episode for episode in world.episodes() for _ in range(8)]

        def reward(rolled: Rolled, episodes: list[Episode] = episodes) -> Tensor:
            held = [
                answer is not None and episode.box().holds(*answer) for answer, episode in zip(rolled.answers, episodes)
            ]
            return torch.tensor(held).float()

        loss, _ = reinforce(
            policy, world.panoramas, world.instruction, world.start, reward, turns=TURNS, generator=chance
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()


@torch.no_grad()
def _answers(policy: HeadPolicy, world: World) -> list[tuple[float, float] | None]:
    given = world.panoramas, world.instruction, world.start
    return roll(policy.eval(), *given, turns=TURNS, greedy=True).answers


def _scored(
    answers: Sequence[tuple[float, float] | None], world: World, path_tolerance: float = 30.0
) -> NDArray[np.float64]:
    """Which searches succeed. [search]"""
    return np.array(
        [
            sum(search_score([answer], [episode], path_tolerance=path_tolerance).values())
            for answer, episode in zip(answers, world.episodes())
        ]
    )


def _right(policy: HeadPolicy, world: World) -> NDArray[np.float64]:
    return _scored(_answers(policy, world), world)


def _chance(world: World) -> float:
    """Of an answer at any yaw and within 30 degrees of the horizon."""
    rng = np.random.default_rng(0)
    answers = [(float(rng.uniform(0, 360)), float(rng.uniform(-30, 30))) for _ in world.goal]
    return float(_scored(answers, world).mean())


def _draw(untrained: dict[str, Any], trained: dict[str, Any], control: Any, figure: Any) -> None:
    axes = figure.subplots()
    shares = {
        f"{task}, {name}": of[task] for task in trained for name, of in (("before", untrained), ("after", trained))
    }
    shares["path, one arrow, after"] = control
    values = [mean(of) for of in shares.values()]
    axes.barh(list(shares), [v.value for v in values], xerr=[2 * v.error for v in values])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="searches that succeed, within 30 degrees")
