"""Zheng et al. (arXiv:2505.14362): paid only where the answer is right, an agent learns to look where it must.

A small agent stands for the vision-language model: it sees scenes of 128 pixels at 16, and is asked for the colour of
a shape; it answers, or first crops one of 16 boxes to 16 pixels. Half of the scenes have tiny things, half large ones.
Before, it learned to answer from views and from right crops, to choose boxes a little, and to crop in a fifth of
cases, as pretraining would have it. Then it learns by group-relative policy optimisation. Arms: the bonus for looking
where the answer is right; for looking at all; none. The tool's bonus is larger than that of an answer, so that to crop
always is best in the first arm too: what is compared is what each teaches of tiny and of large things. Settings were
chosen on seed 100; the one pilot, of fewer steps, gained too little: from afar the agent cannot know which thing to
crop.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Dials, Scene, render, sample
from ...models.deepeyes import OBSERVED, clipped, group_advantages, policy_loss, reward
from .._measure import Mean, mean

SCALES = "small", "large"
SIZE, VIEW, GRID, SIDE, STRIDE = 128, 16, 4, 44, 28  # pixels; boxes a row; pixels of a box, and between boxes
KINDS, NAMES = ("circle", "cross", "triangle", "ring"), tuple(COLOURS)
TINY = Dials(objects=(4, 4), shapes=KINDS, sizes=("small",), scale=0.42)
LARGE = Dials(objects=(3, 3), shapes=KINDS, sizes=("large",), scale=0.9)
SCENES = {"small": 1200, "large": 8000}
BEFORE, STEPS = {"small": 400, "large": 3000}, {"small": 80, "large": 600}
PROMPTS, TRIES, RATE, LEARNED, HELD = 24, 16, 1e-3, 3e-3, 300
ARMS = "where right", "for looking", "none"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """How often the agent crops, and how often it is right, before and after each way to reward it."""
    expected = (
        "of tiny things, calls rise from about 0.2 to 0.8 or more and right answers by 0.25 or more, by two standard "
        "errors; paid for looking at all it calls in 0.8 or more of large things too; with no bonus calls on tiny "
        "things or right answers end lower by 0.1 or more than with it"
    )
    data, held = _shown(SCENES[scale], seed), _shown(2 * HELD, seed + 10**6)
    agent = _pretrained(data, BEFORE[scale], seed)
    tiny = held.tiny
    blind, sighted = _answers(agent, held, crop=False)[tiny], _answers(agent, held, crop=True)[tiny]
    start_calls, start_right = _judged(agent, held)
    ends = {}
    for arm in ARMS:
        ends[arm] = _judged(_reinforced(agent, data, arm, STEPS[scale], seed), held)
    calls = {arm: (float(of[0][tiny].mean()), float(of[0][~tiny].mean())) for arm, of in ends.items()}
    rights = {arm: (mean(of[1][tiny]), mean(of[1][~tiny])) for arm, of in ends.items()}
    own = ends[ARMS[0]]
    gain = mean(own[1][tiny] - start_right[tiny])
    fewer = calls[ARMS[0]][0] - calls["none"][0]
    worse: Mean = mean(own[1][tiny] - ends["none"][1][tiny])
    holds = calls[ARMS[0]][0] >= 0.8 and gain.value >= 0.25 and gain.above() and calls["for looking"][1] >= 0.8
    holds = holds and (fewer >= 0.1 or (worse.value >= 0.1 and worse.above()))
    began = float(start_calls[tiny].mean()), float(start_calls[~tiny].mean())
    said = "; ".join(
        f"{arm}: calls {calls[arm][0]:.2f}, {calls[arm][1]:.2f}, right {rights[arm][0]:.2f}, {rights[arm][1]:.2f}"
        for arm in ARMS
    )
    first = f"{mean(start_right[tiny]):.2f}, {mean(start_right[~tiny]):.2f}"
    measured = (
        f"of tiny and of large things, before: calls {began[0]:.2f}, {began[1]:.2f}, right {first}; bonus {said}; "
        f"gained on tiny things {gain:+.2f}; above no bonus by {fewer:+.2f} of calls, {worse:+.2f} of answers"
    )
    premises = [
        Premise(
            "tiny things cannot be told from afar",
            "right 0.35 or less",
            f"{mean(blind):.2f}",
            mean(blind).value <= 0.35,
        ),
        Premise("they can up close", "right 0.9 or more", f"{mean(sighted):.2f}", mean(sighted).value >= 0.9),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        names = ("before", *ARMS)
        for axis, title, which in zip(axes, ("tiny", "large"), (tiny, ~tiny), strict=True):
            both = [(start_calls, start_right), *ends.values()]
            for i, name in enumerate(("calls", "right")):
                values = [float(of[i][which].mean()) for of in both]
                axis.bar([k + 0.4 * i for k in range(len(names))], values, 0.38, label=name)
            axis.set_xticks([k + 0.2 for k in range(len(names))], [n.replace(" ", "\n") for n in names], fontsize=8)
            axis.set_title(f"{title} things")
        axes[0].legend()

    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


class Data(NamedTuple):
    """Scenes, what is asked of each, and where it is."""

    views: Tensor  # [scene, channel, row, column]
    crops: Tensor  # [scene, box, channel, row, column]
    asked: Tensor  # shape [scene]
    truth: Tensor  # colour [scene]
    place: Tensor  # the box nearest to it [scene]
    tiny: Tensor  # boolean [scene]


class Agent(nn.Module):
    """Logits of colours, from a view and a crop or none; of boxes; and of looking at all."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, dim, 3, 2, 1), nn.ReLU())
        self.then, self.question = nn.Conv2d(dim, dim, 3, padding=1), nn.Embedding(len(KINDS), dim)
        self.none = nn.Parameter(torch.zeros(dim))
        self.colour = nn.Sequential(nn.Linear(2 * dim, 64), nn.ReLU(), nn.Linear(64, len(NAMES)))
        self.box, self.look = nn.Conv2d(dim, 1, 1), nn.Linear(dim, 1)

    def seen(self, pixels: Tensor, asked: Tensor) -> Tensor:
        """[batch, dim, row, column]"""
        return F.relu(self.then(self.see(pixels)) + self.question(asked)[:, :, None, None])

    def choices(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of boxes [batch, box] and of looking [batch], of what was seen of the view."""
        return F.adaptive_avg_pool2d(self.box(view), GRID).flatten(1), self.look(view.mean((2, 3)))[:, 0]

    def colours(self, view: Tensor, crop: Tensor | None, looked: Tensor) -> Tensor:
        """[batch, colour]; looked: boolean [batch], False where the crop was not asked for."""
        near = self.none.expand(len(view), -1)
        if crop is not None:
            near = torch.where(looked[:, None], crop.amax((2, 3)), near)
        return self.colour(torch.cat([view.amax((2, 3)), near], 1))


def _shown(count: int, seed: int) -> Data:
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = sample(TINY if len(scenes) % 2 == 0 else LARGE, seed, index)
        index += 1
        if len({o.shape for o in scene.objects}) == len(scene.objects):
            scenes.append(scene)
    boxes = [
        clipped((STRIDE * c, STRIDE * r, STRIDE * c + SIDE, STRIDE * r + SIDE), (SIZE, SIZE))
        for r in range(GRID)
        for c in range(GRID)
    ]
    views, crops = [], []
    for at in range(0, count, 100):
        pictures = 2 * render(scenes[at : at + 100], SIZE).tensor() - 1
        views.append(F.avg_pool2d(pictures, SIZE // VIEW))
        parts = [pictures[:, :, b[1] : b[3], b[0] : b[2]] for b in boxes if b is not None]
        crops.append(torch.stack([F.adaptive_avg_pool2d(part, VIEW) for part in parts], 1))
    things = [scene.objects[0] for scene in scenes]
    centres = torch.tensor([[t.x, t.y] for t in things]) * SIZE
    middles = torch.tensor([[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in boxes if b is not None])
    return Data(
        torch.cat(views),
        torch.cat(crops),
        torch.tensor([KINDS.index(t.shape) for t in things]),
        torch.tensor([NAMES.index(t.colour) for t in things]),
        torch.cdist(centres, middles).argmin(1),
        torch.arange(count) % 2 == 0,
    )


def _pretrained(data: Data, steps: int, seed: int) -> Agent:
    """Answers are learned with the right crop and without, boxes for a short while, looking a fifth of the time."""
    torch.manual_seed(seed)
    agent = Agent()
    optimiser = torch.optim.AdamW(agent.parameters(), LEARNED)
    for step in range(steps):
        rows = torch.randint(len(data.views), (96,))
        view, looked = agent.seen(data.views[rows], data.asked[rows]), torch.rand(96) < 0.7
        crop = agent.seen(data.crops[rows, data.place[rows]], data.asked[rows])
        loss = F.cross_entropy(agent.colours(view, crop, looked), data.truth[rows])
        boxes, look = agent.choices(view)
        loss = loss + F.binary_cross_entropy_with_logits(look, torch.full((96,), 0.2))
        if step < steps // 2:
            loss = loss + 0.3 * F.cross_entropy(boxes, data.place[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return agent


def _worth(looked: bool, said: int, truth: int, arm: str) -> float:
    """The paper's reward of a trajectory, and those of the other arms."""
    text = f"<think></think>{OBSERVED if looked else ''}<answer>{NAMES[said]}</answer>"
    if arm == "where right":
        return reward(text, NAMES[truth])
    return reward(text, NAMES[truth], weights=(0.8, 0.2, 0.0)) + 1.2 * (looked and arm == "for looking")


def _reinforced(agent: Agent, data: Data, arm: str, steps: int, seed: int) -> Agent:
    torch.manual_seed(seed)
    agent = copy.deepcopy(agent)
    optimiser = torch.optim.AdamW(agent.parameters(), RATE, weight_decay=0.0)
    worth: Mapping[tuple[bool, bool], float] = {
        (looked, right): _worth(looked, 0 if right else 1, 0, arm)
        for looked in (False, True)
        for right in (False, True)
    }
    group = torch.arange(PROMPTS).repeat_interleave(TRIES)
    for _ in range(steps):
        rows = torch.randint(len(data.views), (PROMPTS,))
        view = agent.seen(data.views[rows], data.asked[rows])
        boxes, look = (of.repeat_interleave(TRIES, 0) for of in agent.choices(view))
        looked = torch.bernoulli(look.detach().sigmoid()).bool()
        box = torch.distributions.Categorical(logits=boxes.detach()).sample()
        every = rows[group]
        crop = agent.seen(data.crops[every, box], data.asked[every])
        colours = agent.colours(view.repeat_interleave(TRIES, 0), crop, looked)
        said = torch.distributions.Categorical(logits=colours.detach()).sample()
        right = said == data.truth[every]
        pay = torch.tensor([worth[bool(a), bool(b)] for a, b in zip(looked.tolist(), right.tolist())])
        taken = F.logsigmoid(torch.where(looked, look, -look))
        chosen = boxes.log_softmax(-1).gather(1, box[:, None])[:, 0]
        answered = colours.log_softmax(-1).gather(1, said[:, None])[:, 0]
        new = torch.stack([taken, chosen, answered], 1)
        mask = torch.stack([torch.ones_like(looked), looked, torch.ones_like(looked)], 1)
        loss = policy_loss(new, new.detach(), group_advantages(pay, group), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return agent


@torch.no_grad()
def _answers(agent: Agent, data: Data, *, crop: bool) -> Tensor:
    """Whether the likeliest colour is right, with the crop of the true place or with none. [scene]"""
    view, looked = agent.seen(data.views, data.asked), torch.full((len(data.views),), crop)
    near = agent.seen(data.crops[torch.arange(len(data.views)), data.place], data.asked)
    return (agent.colours(view, near, looked).argmax(-1) == data.truth).double()


@torch.no_grad()
def _judged(agent: Agent, data: Data) -> tuple[Tensor, Tensor]:
    """The probability to look, and whether the likeliest way to go on is right. [scene]"""
    view = agent.seen(data.views, data.asked)
    boxes, look = agent.choices(view)
    calls, every = look.sigmoid().double(), torch.arange(len(data.views))
    near = agent.seen(data.crops[every, boxes.argmax(-1)], data.asked)
    rights = [
        (agent.colours(view, near, torch.full_like(every, looked).bool()).argmax(-1) == data.truth).double()
        for looked in (False, True)
    ]
    return calls, (1 - calls) * rights[0] + calls * rights[1]
