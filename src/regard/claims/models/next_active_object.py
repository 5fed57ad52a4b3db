"""Thakur et al. (arXiv:2305.16066): looking at detected boxes helps a clip's features tell what is touched next.

Films of six frames of 32 x 32 pixels: a fork, the "hand", moves towards one of three other things and would touch it
two to six frames after the last; things lie still, frames are noisy and strewn with clutter. Boxes of the three and of
the hand are given for every frame, in an order of their own in each film, the hand's last. Which is touched next, and
in how many frames? Guided attention, the same network without it, and the same whose head is given all boxes of the
film. Controls: boxes of another film to attend to. Premise: a reading of the boxes' tracks alone tells it. No pilot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...data.scenes import Dials, Object, Scene, render, sample
from ...models.next_active_object import Anticipated, AnticipationConfig, NextActiveObject
from .. import _nets
from .._measure import Mean, mean

SCALES = "small", "large"
STEPS = {"small": 250, "large": 5000}
TRAIN, HELD, BATCH, RATE, SIZE, FRAMES, AHEAD = 1500, 600, 32, 3e-3, 32, 6, 4
NOISE, THINGS = 0.25, 3
GUIDED, UNGUIDED = (16, 32), (16, 38)  # widths of about as many weights
GAIN, LOW, HIGH, TRACKS = 0.03, 0.45, 0.92, 0.90
DIALS = Dials(
    objects=(THINGS, THINGS), shapes=("circle", "square", "star", "ring"), sizes=("small",), scale=0.9, clutter=(4, 8)
)


class AtHead(NextActiveObject):
    """Unguided, and what is said of a box rests on all boxes of the film as well."""

    def __init__(self, config: AnticipationConfig) -> None:
        super().__init__(config)
        wide = sum(config.widths)
        self.tracks = nn.Sequential(nn.Linear(FRAMES * (THINGS + 1) * 4, wide), nn.ReLU(), nn.Linear(wide, THINGS + 1))

    def forward(self, clip: Tensor, still: Tensor, boxes: Tensor, *, guide: Tensor | None = None) -> Anticipated:
        found = super().forward(clip, still, boxes)
        return found._replace(scores=found.scores + self.tracks(boxes.flatten(1)))


class Films:
    """Clips [film, channel, frame, row, column], boxes [film, frame, object, 4], the next one, and the frames until."""

    def __init__(self, n: int, seed: int) -> None:
        rng, scenes = np.random.default_rng((seed, 3)), []
        wanted, until = [], []
        for i in range(n):
            chosen, film, time = _film(sample(DIALS, seed, i), rng)
            wanted.append(chosen)
            until.append(time)
            scenes += film
        pictures = render(scenes, SIZE)
        noise = NOISE * torch.randn(n, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        self.clips = pictures.tensor().unflatten(0, (n, FRAMES)).transpose(1, 2) * 2 - 1 + noise
        corners = [
            [[o.x - r, o.y - r, o.x + r, o.y + r] for o, r in ((o, s.radius(k)) for k, o in enumerate(s.objects))]
            for s in scenes
        ]
        self.boxes = torch.tensor(corners).float().unflatten(0, (n, FRAMES))
        self.next, self.until, self.scenes = torch.tensor(wanted), torch.tensor(until), scenes


def _film(scene: Scene, rng: np.random.Generator) -> tuple[int, list[Scene], float]:
    """Which thing is next, the scenes, and in how many frames after the last the hand is there."""
    chosen, time = int(rng.integers(THINGS)), float(rng.uniform(2, 2 * AHEAD - 2))
    aim = scene.objects[chosen]
    start = rng.uniform(0.15, 0.85, 2)
    steps = np.arange(FRAMES) / (FRAMES - 1 + time)
    film = []
    for share in steps:
        x, y = (1 - share) * start + share * np.array([aim.x, aim.y]) + rng.normal(0, 0.01, 2)
        film.append(scene.plus(Object("fork", "pink", "small", float(x), float(y))))
    return chosen, film, time


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Three networks and a reading of tracks, on the same films."""
    expected = (
        f"guided attention names the thing that is touched next in {GAIN:.0%} more of the films held out than without, "
        "by two standard errors of paired films; with boxes of another film the gain is gone"
    )
    films = Films(TRAIN + HELD, seed)
    models: dict[str, NextActiveObject] = {}
    for name in ("guided", "unguided", "at the head", "another film's"):
        torch.manual_seed(seed)
        guided = name in ("guided", "another film's")
        config = AnticipationConfig(
            widths=GUIDED if guided else UNGUIDED, heads=4 if guided else 1, nouns=1, verbs=1, guided=guided, drop=0.0
        )
        model = AtHead(config) if name == "at the head" else NextActiveObject(config)
        models[name] = _train(model, films, STEPS[scale], seed, shuffled=name == "another film's")
    right, error = {}, {}
    for name, model in models.items():
        right[name], error[name] = _judge(model, films, shuffled=name == "another film's")
    gain = mean(right["guided"] - right["unguided"])
    vain = mean(right["another film's"] - right["unguided"])
    head = mean(right["at the head"] - right["unguided"])
    holds = gain.value >= GAIN and gain.above() and vain.value < gain.value / 2
    measured = (
        "; ".join(f"{name}: {mean(of):.1%} right, time off by {error[name]:.2f} frames" for name, of in right.items())
        + f"; guided above unguided by {gain:.1%}, boxes at the head by {head:.1%}, another film's by {vain:.1%}; a "
        f"guess {1 / THINGS:.0%}"
    )
    weights = [_nets.size(model) for name, model in models.items() if name != "at the head"]
    base, tracks = float(right["unguided"].mean()), _tracks(films)
    premises = [
        Premise(
            "the unguided network learns, and not all", f"{LOW:.0%} to {HIGH:.0%}", f"{base:.1%}", LOW <= base <= HIGH
        ),
        Premise("tracks of boxes tell what is next", f"{TRACKS:.0%} right", f"{tracks:.1%}", tracks >= TRACKS),
        Premise(
            "equal numbers of weights",
            "within 10%",
            f"{max(weights) / min(weights) - 1:.1%} apart",
            max(weights) <= 1.1 * min(weights),
        ),
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(3, FRAMES)
        guided = models["guided"]
        with torch.no_grad():
            at = slice(TRAIN, TRAIN + 3)
            clip = films.clips[at]
            scores = guided(clip, clip[:, :, -1], films.boxes[at]).scores[:, :THINGS].softmax(-1)
        for row in range(3):
            for frame, axes in enumerate(panels[row]):
                axes.imshow((clip[row, :, frame].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
                for k in range(THINGS):
                    left, top, right_, bottom = (films.boxes[TRAIN + row, frame, k] * SIZE).tolist()
                    colour = "lime" if k == int(films.next[TRAIN + row]) else "white"
                    axes.plot([left, right_, right_, left, left], [top, top, bottom, bottom, top], color=colour, lw=1)
                    if frame == FRAMES - 1:
                        axes.text(left, top, f"{float(scores[row, k]):.2f}", color=colour, fontsize=7)
                axes.set_xticks([])
                axes.set_yticks([])
        figure.suptitle("scores of what is touched next; green: what is")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _ask(model: NextActiveObject, films: Films, some: Tensor, shuffled: bool) -> Anticipated:
    clip, boxes = films.clips[some], films.boxes[some]
    return model(clip, clip[:, :, -1], boxes, guide=boxes.roll(1, 0) if shuffled else None)


def _train(model: NextActiveObject, films: Films, steps: int, seed: int, *, shuffled: bool) -> NextActiveObject:
    lots = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        some = torch.randint(TRAIN, (BATCH,), generator=lots)
        found, wanted = _ask(model, films, some, shuffled), films.next[some]
        time = found.time.gather(1, wanted[:, None])[:, 0]
        loss = F.cross_entropy(found.scores[:, :THINGS], wanted) + 0.1 * F.l1_loss(time, films.until[some].float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _judge(model: NextActiveObject, films: Films, *, shuffled: bool) -> tuple[Tensor, Mean]:
    """Which films held out are right, and by how many frames the time of the one that is next is off."""
    right, off = [], []
    for some in torch.arange(TRAIN, TRAIN + HELD).split(100):
        found, wanted = _ask(model, films, some, shuffled), films.next[some]
        right.append((found.scores[:, :THINGS].argmax(-1) == wanted).float())
        off.append((found.time.gather(1, wanted[:, None])[:, 0] - films.until[some]).abs())
    return torch.cat(right), mean(torch.cat(off))


def _tracks(films: Films) -> float:
    """Share right of the thing that lies most nearly in the direction that the hand's boxes take."""
    middle = (films.boxes[TRAIN:, ..., :2] + films.boxes[TRAIN:, ..., 2:]) / 2
    hand, things = middle[:, :, -1], middle[:, -1, :THINGS]
    way = F.normalize(hand[:, -1] - hand[:, 0], dim=-1)
    cosine = (F.normalize(things - hand[:, -1:], dim=-1) * way[:, None]).sum(-1)
    return float((cosine.argmax(-1) == films.next[TRAIN:]).float().mean())
