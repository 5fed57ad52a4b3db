"""Eftekhar et al. (arXiv:2311.04193): an agent whose view passes few codes learns faster and transfers better.

A grid of 5 x 5 cells with walls and things of three kinds; the goal names a kind, and standing on it within 15 steps is
a success, with a reward of 1; a step costs 0.01. The agent sees 5 x 5 cells about it, as numbers of a fixed random
linear map, and beside them as many of a pattern that stays for an episode and has nothing to do with the task.
Actor-critic (A2C), equal updates, three seeds. Without training, the patterns are then changed for others of twice the
size. Controls: a linear bottleneck as narrow as the codes are long, codes that stay as drawn, and an agent without the
patterns. Four pilots, of single trainings on another seed, chose the size of the world, the rate and the number of
updates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.selective_codebook import GoalAgent, selective_codebook
from .._measure import mean
from .._nets import bars

SCALES = "small", "large"
UPDATES = {"small": 250, "large": 5000}
RUNS, WORLDS, HORIZON, RATE, DISCOUNT, ENTROPY = 3, 128, 8, 5e-3, 0.9, 0.01
SIDE, SEEN, KINDS, WALLS, LIMIT, COST = 5, 5, 3, 2, 15, 0.01
FEATURES, PATTERN, CLASSES = 256, 192, 8
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
HARDER, WORKS, MORE = 0.10, 0.5, 0.05


class World:
    """Many grids at once. `view` [world, number], `goal`, `last` [world]; `step` moves on and tells what came of it."""

    def __init__(self, seed: int, *, patterns: float = 1.0, shift: int = 0) -> None:
        fixed = torch.Generator().manual_seed(7 + shift)
        self.map = torch.randn(SEEN * SEEN * (KINDS + 2), FEATURES, generator=torch.Generator().manual_seed(7)) / SEEN
        self.patterns = patterns * torch.randn(CLASSES, PATTERN, generator=fixed)
        self.lots = torch.Generator().manual_seed(seed)
        self.grid = torch.zeros(WORLDS, SIDE + 4, SIDE + 4, dtype=torch.long)
        self.at = torch.zeros(WORLDS, 2, dtype=torch.long)
        self.goal, self.last, self.age, self.kind = (torch.zeros(WORLDS, dtype=torch.long) for _ in range(4))
        self._anew(torch.ones(WORLDS, dtype=torch.bool))

    def _anew(self, which: Tensor) -> None:
        """New episodes: where walls and things are, the agent, its goal, and the pattern."""
        n = int(which.sum())
        if not n:
            return
        self.goal, self.last = self.goal.clone(), self.last.clone()  # the graph of earlier steps holds the old ones
        places = torch.rand(n, SIDE * SIDE, generator=self.lots).argsort(-1)
        inner = torch.zeros(n, SIDE * SIDE, dtype=torch.long)
        inner.scatter_(1, places[:, :WALLS], 1)
        inner.scatter_(1, places[:, WALLS : WALLS + KINDS], torch.arange(2, 2 + KINDS).expand(n, -1))
        grid = torch.ones(n, SIDE + 4, SIDE + 4, dtype=torch.long)
        grid[:, 2:-2, 2:-2] = inner.view(n, SIDE, SIDE)
        self.grid[which] = grid
        start = places[:, WALLS + KINDS]
        self.at[which] = torch.stack([start // SIDE, start % SIDE], 1)
        self.goal[which] = torch.randint(KINDS, (n,), generator=self.lots)
        self.kind[which] = torch.randint(CLASSES, (n,), generator=self.lots)
        self.last[which], self.age[which] = 0, 0

    @property
    def cells(self) -> Tensor:
        """What each agent has about it, its own place in the middle. [world, cell]"""
        rows, columns = (self.at[:, i, None] + torch.arange(SEEN) for i in range(2))
        return self.grid[torch.arange(WORLDS)[:, None, None], rows[:, :, None], columns[:, None]].flatten(1)

    @property
    def view(self) -> Tensor:
        seen = F.one_hot(self.cells, KINDS + 2).flatten(1).float() @ self.map
        pattern = self.patterns[self.kind]
        noise = 0.1 * self.patterns.std() * torch.randn(pattern.shape, generator=self.lots)
        return torch.cat([seen, pattern + noise], -1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> reward, whether the episode ended, whether in success. [world]"""
        to = self.at + MOVES[action]
        every = torch.arange(WORLDS)
        free = self.grid[every, to[:, 0] + 2, to[:, 1] + 2] != 1
        self.at = torch.where(free[:, None], to, self.at)
        reached = self.grid[every, self.at[:, 0] + 2, self.at[:, 1] + 2] == self.goal + 2
        self.age, self.last = self.age + 1, action + 1
        ended = reached | (self.age >= LIMIT)
        self._anew(ended)
        return reached.float() - COST, ended, reached


class Narrow(nn.Module):
    """A linear bottleneck, in the place of a codebook."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, dim), nn.Linear(dim, size)

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        down = self.down(embeds.relu())
        return self.up(down), down


WAYS: dict[str, dict[str, Any]] = {
    "codes": {"codes": 64, "dim": 8},
    "plain": {"codes": 0},
    "narrow": {"codes": 64, "dim": 8},
    "drawn codes": {"codes": 64, "dim": 8, "kind": "random"},
    "no patterns": {"codes": 0},
}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Five agents, three trainings each."""
    expected = (
        f"with codes success during training is as high as the plain agent's or higher, and after the change higher by "
        f"{MORE:.0%} or more and by two standard errors of three seeds; a linear bottleneck shows no such gain"
    )
    area, end, after = ({name: [] for name in WAYS} for _ in range(3))
    curves: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    for run in range(RUNS * seed, RUNS * (seed + 1)):
        for name, sizes in WAYS.items():
            torch.manual_seed(run)
            agent = selective_codebook(
                channels=FEATURES + PATTERN, places=1, goals=KINDS, actions=len(MOVES), hidden=64, wide=64, **sizes
            )
            if name == "narrow":
                agent.codebook = Narrow(agent.gru.input_size, 8)  # type: ignore[assignment]
            patterns = 0.0 if name == "no patterns" else 1.0
            curve = _train(agent, World(run, patterns=patterns), UPDATES[scale], run)
            curves[name].append(curve)
            area[name].append(float(curve.mean()))
            end[name].append(_success(agent, World(run + 10**6, patterns=patterns)))
            after[name].append(_success(agent, World(run + 10**6, patterns=2 * patterns, shift=1)))
    tensors = [{name: torch.tensor(values) for name, values in of.items()} for of in (area, end, after)]
    areas, ends, afters = tensors
    faster = {name: mean(areas[name] - areas["plain"]) for name in WAYS}
    firmer = {name: mean(afters[name] - afters["plain"]) for name in WAYS}
    codes, narrow = firmer["codes"], firmer["narrow"]
    holds = faster["codes"].value >= 0 and codes.value >= MORE and codes.above() and narrow.value < codes.value / 2
    measured = "; ".join(
        f"{name}: success in training {mean(areas[name]):.1%}, at the end {mean(ends[name]):.1%}, changed "
        f"{mean(afters[name]):.1%}"
        for name in WAYS
    )
    measured += (
        f"; above plain in training by {faster['codes']:.1%} with codes, after the change by {codes:.1%}, by "
        f"{narrow:.1%} with a linear bottleneck"
    )
    base = mean(areas["plain"])
    hurt = mean((areas["no patterns"] - areas["plain"]) / base.value)
    premises = [
        Premise(
            "the patterns make learning harder",
            f"without them success in training {HARDER:.0%} higher in its share",
            f"{hurt:.1%}",
            hurt.value >= HARDER,
        ),
        Premise(
            "the plain agent learns the task",
            f"{WORKS:.0%} success at the end",
            f"{mean(ends['plain']):.1%}",
            mean(ends["plain"]).value >= WORKS,
        ),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subfigures(1, 2)
        axes = left.subplots()
        for name, runs in curves.items():
            smooth = torch.stack(runs).mean(0).unfold(0, 20, 1).mean(-1)
            axes.plot(torch.arange(len(smooth)) * WORLDS * HORIZON / 1e3, smooth, label=name)
        axes.set(xlabel="thousands of frames", ylabel="success", ylim=(0, 1))
        axes.legend(fontsize=8)
        bars(right, after, ylabel="success, patterns changed")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _train(agent: GoalAgent, world: World, updates: int, seed: int) -> Tensor:
    """Advantage actor-critic over stretches of a few steps. Success of the episodes that ended in each. [update]"""
    lots = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(agent.parameters(), RATE)
    state, starts = torch.zeros(WORLDS, agent.config.hidden), torch.ones(WORLDS, 1, dtype=torch.bool)
    curve, latest = [], 0.0
    agent.train()
    for _ in range(updates):
        steps, state = [], state.detach()
        for _ in range(HORIZON):
            found = agent(world.view[:, None, :, None], world.goal, world.last[:, None], state, starts=starts)
            state, logs = found.state, found.logits[:, 0].log_softmax(-1)
            action = torch.multinomial(logs.detach().exp(), 1, generator=lots)[:, 0]
            reward, ended, reached = world.step(action)
            starts = ended[:, None]
            steps.append((logs.gather(1, action[:, None])[:, 0], found.values[:, 0], reward, ended, reached, logs))
        with torch.no_grad():
            last = agent(world.view[:, None, :, None], world.goal, world.last[:, None], state, starts=starts)
        chosen, values, rewards, ends, reached, logs = (torch.stack(part) for part in zip(*steps, strict=True))
        returns, total = [], last.values[:, 0]
        for step in reversed(range(HORIZON)):
            total = rewards[step] + DISCOUNT * total * ~ends[step]
            returns.append(total)
        gain = torch.stack(returns[::-1]) - values
        spread = -(logs.exp() * logs).sum(-1).mean()
        loss = -(gain.detach() * chosen).mean() + 0.5 * gain.square().mean() - ENTROPY * spread
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimiser.step()
        latest = float(reached[ends].float().mean()) if ends.any() else latest
        curve.append(latest)
    return torch.tensor(curve)


@torch.no_grad()
def _success(agent: GoalAgent, world: World) -> float:
    """Share of episodes that succeed, actions drawn as in training."""
    lots, agent = torch.Generator().manual_seed(0), agent.eval()
    state, starts = torch.zeros(WORLDS, agent.config.hidden), torch.ones(WORLDS, 1, dtype=torch.bool)
    done, right = 0, 0
    for _ in range(4 * LIMIT):
        found = agent(world.view[:, None, :, None], world.goal, world.last[:, None], state, starts=starts)
        state = found.state
        _, ended, reached = world.step(torch.multinomial(found.logits[:, 0].softmax(-1), 1, generator=lots)[:, 0])
        starts, done, right = ended[:, None], done + int(ended.sum()), right + int(reached.sum())
    return right / max(done, 1)
