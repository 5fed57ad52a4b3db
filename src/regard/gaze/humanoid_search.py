"""Turning the head in a panorama until what is searched for is straight ahead.

Thinking in 360°: Humanoid Visual Search in the Wild (Yu et al., arXiv:2511.20351), after the authors' environment. A
head with a yaw and a pitch sees a pinhole view of an equirectangular panorama; each turn it rotates, or submits a
direction, which ends the search. Searches are for an object, or for the direction of a path to take. Beside it, small:
a policy, learning from an oracle that scans, and a step of policy gradient with advantages within a group (GRPO).

As in the code: the field of view is horizontal, there is no shift by half a pixel, and indices wrap in both directions,
over the poles too; what is submitted is the agent's statement, wherever its head is; boxes narrower than twice the
tolerance become their middle with the tolerance on either side; a malformed action costs a turn. Deviations: pitch is
judged also in boxes that wrap around 0 (the code ignores it: `as_code=True`); tolerances belong to the task (the code
leaves that of paths on after the first); the green cross in the middle, zoom, which does nothing, and the reward for
format, which the code sets to 0, are left out. Policy and oracle are ours: theirs is a vision-language model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.loaders import Scanpath

ACTION = re.compile(r"\s*(rotate|submit)\(\s*([+-]?\d+)\s*,\s*([+-]?\d+)\s*\)\s*")


class Action(NamedTuple):
    """rotate: by yaw and pitch; submit: the direction of yaw and pitch. In degrees, to the right and up."""

    kind: Literal["rotate", "submit"]
    yaw: float
    pitch: float

    @classmethod
    def parse(cls, text: str) -> Action | None:
        """Of `rotate(30,-5)` or `submit(120,0)`, whole numbers; None where it is neither.

        >>> Action.parse("rotate(30, -5)")
        Action(kind='rotate', yaw=30.0, pitch=-5.0)
        """
        found = ACTION.fullmatch(text)
        return cls(found[1], float(found[2]), float(found[3])) if found else None  # type: ignore[arg-type]


class Box(NamedTuple):
    """Directions from `left` to the right until `right`, and from `bottom` up to `top`; degrees, ends included."""

    left: float
    right: float
    bottom: float
    top: float

    def holds(self, yaw: float, pitch: float, *, as_code: bool = False) -> bool:
        """as_code: whatever the pitch where the box wraps around 0."""
        inside = (yaw - self.left) % 360 <= (self.right - self.left) % 360
        return inside and ((as_code and self.left > self.right) or self.bottom <= pitch <= self.top)


@dataclass(frozen=True, eq=False)
class Episode:
    """One search. panorama [channel, row, column], twice as wide as high, its middle column at yaw 0.

    yaw: the target's first and last direction, the first above the last where it wraps around 0; pitch: its lowest and
    highest, None where it is the direction of a path.
    """

    panorama: Tensor
    instruction: Any
    yaw: tuple[float, float]
    pitch: tuple[float, float] | None = None
    start: float = 0.0
    level: int = 0

    def __post_init__(self) -> None:
        _checked(self.panorama)

    @property
    def task(self) -> str:
        return "path" if self.pitch is None else "object"

    def box(self, *, yaw_tolerance: float = 30.0, pitch_tolerance: float = 20.0, path_tolerance: float = 10.0) -> Box:
        """What counts as the target. ValueError where that is every direction."""
        path = self.pitch is None
        low, high = self.yaw
        high += 360 * (low > high)
        least = path_tolerance if path else yaw_tolerance
        if high - low < 2 * least:
            low, high = (low + high) / 2 - least, (low + high) / 2 + least
        if high - low >= 360:
            raise ValueError(f"yaw={self.yaw} with {least} degrees on either side is every direction")
        bottom, top = (-90.0, 90.0) if self.pitch is None else self.pitch
        if top - bottom < 2 * pitch_tolerance:
            middle = (bottom + top) / 2
            bottom, top = max(-90.0, middle - pitch_tolerance), min(90.0, middle + pitch_tolerance)
        return Box(low % 360, high % 360, bottom, top)


class HeadSearch:
    """One search, turn by turn: `view = search.reset()`, then `view, reward, done, info = search.step(action)`.

    size: height and width of a view in pixels; fov: degrees that its width spans. effective, ineffective: reward of
    turning towards the target, of turning away, for each 180 degrees of the distances to both ends of its box.
    turns: after how many the search ends without success; None for no end. info: yaw, pitch, valid, success.
    """

    def __init__(
        self,
        episode: Episode,
        *,
        size: tuple[int, int] = (1080, 1920),
        fov: float = 100.0,
        success: float = 0.5,
        failure: float = 0.0,
        effective: float = 0.0,
        ineffective: float = 0.0,
        turns: int | None = None,
        as_code: bool = False,
        **tolerances: float,
    ) -> None:
        self.episode, self.size, self.fov, self.turns, self.as_code = episode, size, fov, turns, as_code
        self.success, self.failure, self.effective, self.ineffective = success, failure, effective, ineffective
        self.box = episode.box(**tolerances)
        self.reset()

    def reset(self) -> Tensor:
        """Back to the start; the first view. [channel, row, column]"""
        self.yaw, self.pitch, self.turn, self.done = self.episode.start % 360.0, 0.0, 0, False
        return self.view

    @property
    def view(self) -> Tensor:
        return panorama_view(self.episode.panorama, self.yaw, self.pitch, size=self.size, fov=self.fov)

    def step(self, action: Action | str) -> tuple[Tensor, float, bool, dict[str, Any]]:
        """The next view, the reward, whether the search has ended, and what came of the action."""
        if self.done:
            raise ValueError("the search has ended: call reset() for another")
        parsed = Action.parse(action) if isinstance(action, str) else action
        self.turn += 1
        reward, found = 0.0, False
        if parsed is not None and parsed.kind == "rotate":
            before = self._away()
            self.yaw = (self.yaw + parsed.yaw) % 360
            self.pitch = max(-90.0, min(90.0, self.pitch + parsed.pitch))
            gain = (before - self._away()) / 180
            reward = gain * (self.effective if gain > 0 else self.ineffective)
        elif parsed is not None:
            found = self.box.holds(parsed.yaw % 360, parsed.pitch, as_code=self.as_code)
            reward, self.done = self.success if found else self.failure, True
        if not self.done and self.turns is not None and self.turn >= self.turns:
            reward, self.done = reward + self.failure, True
        info = {"yaw": self.yaw, "pitch": self.pitch, "valid": parsed is not None, "success": found}
        return self.view, reward, self.done, info

    def _away(self) -> float:
        """Distances of the head to both ends of the box, in yaw and in pitch, together."""
        left, right, bottom, top = self.box
        return _apart(self.yaw, left) + _apart(self.yaw, right) + abs(self.pitch - bottom) + abs(self.pitch - top)


@dataclass
class Searched:
    """What came of a search. headings: yaw and pitch of each view; answer: what was submitted, None of nothing."""

    episode: Episode
    headings: list[tuple[float, float]] = field(default_factory=list)
    answer: tuple[float, float] | None = None
    success: bool = False

    @property
    def scanpath(self) -> Scanpath:
        """Where the head pointed, and last what was submitted, in pixels of the panorama."""
        rows, columns = self.episode.panorama.shape[1:]
        every = [*self.headings, *([self.answer] if self.answer else [])]
        yaw, pitch = torch.tensor(every, dtype=torch.float64).T
        at = torch.stack([((yaw + 180) % 360) / 360 * columns, (0.5 - pitch / 180) * rows], 1)
        return Scanpath(at.numpy(), (columns, rows))


Agent = Callable[[Tensor, Any, Sequence[tuple[float, float]]], "Action | str"]


def humanoid_search(agent: Agent, episode: Episode, *, turns: int = 10, **knobs: Any) -> Searched:
    """One search by an agent: any callable of view, instruction and the headings so far, the present one last.

    knobs: those of `HeadSearch`. The result's `scanpath` is what `regard.gaze` compares and draws.

    >>> episode = Episode(torch.rand(3, 16, 32), "the door", (80, 100), (0, 10), start=90)
    >>> found = humanoid_search(lambda view, text, headings: "submit(90,0)", episode, size=(8, 8))
    >>> found.success, found.scanpath.places.tolist()
    (True, [[24.0, 8.0], [24.0, 8.0]])
    """
    search = HeadSearch(episode, turns=turns, **knobs)
    view, kept = search.reset(), Searched(episode, [(search.yaw, search.pitch)])
    while not search.done:
        action = agent(view, episode.instruction, tuple(kept.headings))
        action = Action.parse(action) if isinstance(action, str) else action
        view, _, _, info = search.step(action if action is not None else "")
        if action is not None and action.kind == "submit":
            kept.answer, kept.success = (action.yaw % 360, action.pitch), info["success"]
        elif action is not None:
            kept.headings.append((search.yaw, search.pitch))
    return kept


def search_score(
    answers: Sequence[tuple[float, float] | None], episodes: Sequence[Episode], **tolerances: float
) -> dict[tuple[str, int], float]:
    """Share of answers, yaw and pitch, that are right, by task and level. None where nothing was submitted.

    tolerances: those of `Episode.box`; score paths and objects with the same to compare them.
    """
    if len(answers) != len(episodes):
        raise ValueError(f"one answer an episode: got {len(answers)} for {len(episodes)}")
    found = defaultdict(list)
    for answer, episode in zip(answers, episodes):
        right = answer is not None and episode.box(**tolerances).holds(answer[0] % 360, answer[1])
        found[episode.task, episode.level].append(right)
    return {kind: sum(right) / len(right) for kind, right in sorted(found.items())}


def panorama_view(
    panorama: Tensor, yaw: float | Tensor, pitch: float | Tensor, *, size: tuple[int, int], fov: float = 100.0
) -> Tensor:
    """What a head sees, bilinear. [channel, row, column], or [view, channel, row, column] of several directions.

    panorama: [channel, row, column], twice as wide as high, yaw 0 at its middle column, or [view, channel, row,
    column], one each; yaw and pitch: degrees, to the right and up, or tensors [view]. size: height and width; fov:
    degrees that the width spans. Differentiable in the panorama, and in tensors of directions.
    """
    _checked(panorama)
    if not 0 < fov < 180:
        raise ValueError(f"fov={fov}: a plane shows more than 0 and less than 180 degrees")
    one = panorama.ndim == 3 and not any(isinstance(angle, Tensor) and angle.ndim for angle in (yaw, pitch))
    a, p = (
        torch.deg2rad(torch.as_tensor(angle, dtype=torch.float64, device=panorama.device)).reshape(-1, 1, 1)
        for angle in (yaw, pitch)
    )
    height, width = size
    reach = width / (2 * math.tan(math.radians(fov) / 2))
    y, x = torch.meshgrid(
        (torch.arange(height, device=panorama.device) - height / 2).double() / reach,
        (torch.arange(width, device=panorama.device) - width / 2).double() / reach,
        indexing="ij",
    )
    length = (x**2 + y**2 + 1).sqrt()
    x, y, z = x / length, y / length, 1 / length
    up, ahead = y * p.cos() - z * p.sin(), y * p.sin() + z * p.cos()
    across, along = x * a.cos() + ahead * a.sin(), -x * a.sin() + ahead * a.cos()
    rows, columns = panorama.shape[-2:]
    column = (torch.atan2(across, along) / math.pi + 1) / 2 * columns  # [view, row, column]
    row = (torch.asin(up.clamp(-1, 1)) / math.pi + 0.5) * rows
    left, top = column.floor(), row.floor()
    right, below = (column - left).to(panorama.dtype), (row - top).to(panorama.dtype)
    left, top = left.long(), top.long()
    flat = panorama.flatten(-2).expand(len(column), -1, -1) if panorama.ndim == 3 else panorama.flatten(-2)
    view = torch.zeros((), dtype=panorama.dtype, device=panorama.device)
    for down, by_row in ((0, 1 - below), (1, below)):
        for over, by_column in ((0, 1 - right), (1, right)):
            at = (top + down) % rows * columns + (left + over) % columns
            taken = flat.gather(-1, at.flatten(1)[:, None].expand(-1, flat.shape[1], -1)).unflatten(-1, size)
            view = view + (by_row * by_column)[:, None] * taken
    return view[0] if one else view


def by_likeness(
    encode: Callable[[Tensor], Tensor], target: Tensor, *, yaw_step: float = 45.0, pitches: Sequence[float] = (0.0,)
) -> Agent:
    """An agent without training: it looks around, and submits where the view was most like the target.

    encode: views [batch, channel, row, column] -> [batch, dim], as `regard.gaze.encoder.encoder` makes; target [dim],
    the embedding of words or of a picture. It goes once around at each pitch, from where it starts at, and takes a turn
    for each view. Its answer is a whole number of steps from the start: a target far narrower is missed.
    """
    around = [(turn * yaw_step, pitch) for pitch in pitches for turn in range(max(1, round(360 / yaw_step)))]
    likeness: list[float] = []

    @torch.no_grad()
    def agent(view: Tensor, instruction: Any, headings: Sequence[tuple[float, float]]) -> Action:
        if len(headings) == 1:
            likeness.clear()
        likeness.append(float(F.cosine_similarity(encode(view[None])[0], target, dim=-1)))
        if len(headings) == len(around):
            return Action("submit", *headings[max(range(len(likeness)), key=likeness.__getitem__)])
        yaw, pitch = around[len(headings)]
        return Action("rotate", yaw - around[len(headings) - 1][0], pitch - headings[-1][1])

    return agent


@dataclass(frozen=True)
class HeadPolicyConfig:
    """A small policy. Its actions are rotations by `yaws` times `pitches` steps, and to submit where it looks."""

    instructions: int
    size: tuple[int, int] = (24, 24)
    fov: float = 100.0
    width: int = 64
    yaws: int = 24
    pitches: tuple[float, ...] = (-30.0, 0.0, 30.0)


class HeadPolicy(nn.Module):
    """From view, instruction (a number) and heading to an action; it remembers what it has seen."""

    def __init__(self, config: HeadPolicyConfig) -> None:
        super().__init__()
        self.config = config
        width, maps = config.width, 4
        self.look = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, 2, 2), nn.ReLU(), nn.Conv2d(width // 2, width // 2, 3, 1, 1), nn.ReLU()
        )
        self.gate = nn.Embedding(config.instructions, 2 * (width // 2))
        self.maps = nn.Conv2d(width // 2, maps, 1)
        self.seen = nn.Linear(3 * maps, width)
        self.asked, self.where = nn.Embedding(config.instructions, width), nn.Linear(3, width)
        self.memory = nn.GRUCell(width, width)
        self.act = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, self.rotations + 1))

    @property
    def rotations(self) -> int:
        return self.config.yaws * len(self.config.pitches)

    def forward(
        self, view: Tensor, instruction: Tensor, heading: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of actions [batch, action], the last to submit, and the memory for the next turn.

        view [batch, 3, row, column]; instruction [batch]; heading [batch, 2], yaw and pitch in degrees.
        """
        scale, shift = self.gate(instruction)[..., None, None].chunk(2, 1)
        maps = self.maps(F.relu(self.look(view) * (1 + scale) + shift))  # how likely what is asked for is at each place
        share = maps.flatten(2).softmax(-1).view_as(maps)
        at = (torch.linspace(-1, 1, n, device=view.device) for n in maps.shape[2:])
        row, column = (line @ of for line, of in zip((share.sum(3), share.sum(2)), at))
        seen = self.seen(torch.cat([row, column, maps.amax((2, 3))], -1))
        yaw, pitch = torch.deg2rad(heading).unbind(-1)
        mixed = F.relu(seen + self.asked(instruction) + self.where(torch.stack([yaw.sin(), yaw.cos(), pitch], -1)))
        state = self.memory(mixed, state)
        return self.act(torch.cat([mixed, state], -1)), state

    def rotation(self, action: Tensor) -> Tensor:
        """Degrees of yaw, -180 to below 180, and of pitch. [batch, 2]"""
        step, count = 360 / self.config.yaws, self.config.yaws
        yaw = (action % count * step + 180) % 360 - 180
        pitches = torch.tensor(self.config.pitches, device=action.device)
        return torch.stack([yaw, pitches[action.div(count, rounding_mode="floor") % len(pitches)]], -1)

    def nearest(self, rotation: Tensor) -> Tensor:
        """The action that rotates most like this [batch, 2]. [batch]"""
        step = 360 / self.config.yaws
        yaw = (rotation[..., 0] / step).round().long() % self.config.yaws
        pitches = torch.tensor(self.config.pitches, device=rotation.device)
        return (rotation[..., 1:] - pitches).abs().argmin(-1) * self.config.yaws + yaw


class Rolled(NamedTuple):
    """Searches side by side. actions, log_chance, live [turn, batch]: what was done, its log-probability, and whether
    the search still went on; headings [turn + 1, batch, 2]; submitted [batch]."""

    actions: Tensor
    log_chance: Tensor
    live: Tensor
    headings: Tensor
    submitted: Tensor

    @property
    def answers(self) -> list[tuple[float, float] | None]:
        return [tuple(h) if there else None for h, there in zip(self.headings[-1].tolist(), self.submitted.tolist())]


def roll(
    policy: HeadPolicy,
    panoramas: Tensor,
    instruction: Tensor,
    start: Tensor,
    *,
    turns: int = 6,
    teacher: Callable[[Tensor], Tensor] | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Rolled:
    """Searches of a policy in several panoramas [batch, 3, row, column] at once, from yaw `start` [batch].

    teacher: what to do instead at headings [batch, 2], given as actions [batch]; `log_chance` is then of these.
    """
    config = policy.config
    heading = torch.stack([start.float() % 360, torch.zeros(len(start), device=start.device)], -1)
    live = torch.ones(len(start), dtype=torch.bool, device=start.device)
    state, kept = None, []
    headings = [heading]
    for _ in range(turns):
        view = panorama_view(panoramas, heading[:, 0], heading[:, 1], size=config.size, fov=config.fov)
        logits, state = policy(view, instruction, heading, state)
        if teacher is not None:
            action = teacher(heading)
        elif greedy:
            action = logits.argmax(-1)
        else:
            action = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        chance = logits.log_softmax(-1).gather(-1, action[:, None])[:, 0]
        kept.append((action, chance, live))
        moves = live & (action < policy.rotations)
        turned = heading + policy.rotation(action.clamp(max=policy.rotations - 1))
        turned = torch.stack([turned[:, 0] % 360, turned[:, 1].clamp(-90, 90)], -1)
        heading = torch.where(moves[:, None], turned, heading)
        headings.append(heading)
        live = moves
    actions, chances, alive = (torch.stack(of) for of in zip(*kept))
    return Rolled(actions, chances, alive, torch.stack(headings), ~live)


def imitate(
    policy: HeadPolicy,
    panoramas: Tensor,
    instruction: Tensor,
    start: Tensor,
    teacher: Callable[[Tensor], Tensor],
    *,
    turns: int = 6,
) -> Tensor:
    """Mean surprise of the policy at what a teacher does, nats a turn; to be minimised."""
    rolled = roll(policy, panoramas, instruction, start, turns=turns, teacher=teacher)
    return -(rolled.log_chance * rolled.live).sum() / rolled.live.sum()


def reinforce(
    policy: HeadPolicy,
    panoramas: Tensor,
    instruction: Tensor,
    start: Tensor,
    reward: Callable[[Rolled], Tensor],
    *,
    group: int = 8,
    turns: int = 6,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a policy gradient with advantages within groups (GRPO, one step on its own samples), and mean reward.

    Each search is made `group` times; its advantage is its reward less the group's mean, over the group's deviation;
    a group whose rewards are one teaches nothing. reward: of searches, [batch * group], copies of one side by side.
    """
    if group < 2:
        raise ValueError(f"group={group}: an advantage is against others, two at least")
    panoramas, instruction, start = (x.repeat_interleave(group, 0) for x in (panoramas, instruction, start))
    rolled = roll(policy, panoramas, instruction, start, turns=turns, generator=generator)
    gained = reward(rolled).float()
    of_group = gained.view(-1, group)
    spread = of_group.std(1, keepdim=True)
    better = ((of_group - of_group.mean(1, keepdim=True)) / spread.clamp(min=1e-6)).where(spread > 1e-6, 0.0)
    loss = -(better.flatten() * rolled.log_chance * rolled.live).sum() / rolled.live.sum()
    return loss, gained.mean()


def _apart(one: float, other: float) -> float:
    away = abs(one - other) % 360
    return min(away, 360 - away)


def _checked(panorama: Tensor) -> None:
    if panorama.ndim not in (3, 4) or panorama.shape[-1] != 2 * panorama.shape[-2]:
        raise ValueError(
            f"a panorama is [channel, row, column], twice as wide as high (equirectangular, 360 by 180 degrees): got "
            f"{list(panorama.shape)}"
        )
