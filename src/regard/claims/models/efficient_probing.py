"""Psomas et al. (arXiv:2506.10178): where the answer lies in few tokens, several queries get more than a linear probe.

The encoder is the zoo's viewer, frozen: its patches say what they show, and no pooled token says which of several
things is meant. Probes of its patches name the shapes of the one red and the one blue thing among four, of sixteen
pairs. Control: scenes of one thing, named from the class token, which was trained for that: little is left to win
there. Ablation: all queries of the probe are one. The paper's encoders are masked autoencoders of photographs; none can
be trained at this size in a minute (a first design tried that with digits in clutter, and its encoder told the probes
nothing: 18% by the mean token). In a second, the shape of the red thing alone, one query was enough, and on another
seed it was here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding, Premise
from ...data.scenes import COLOURS, Dials, Scene, render, sample
from ...models.efficient_probing import AttentiveProbing, EfficientProbing, MeanPooling, Probe
from ...zoo.recipes import viewer
from .. import _nets
from .._measure import mean

SCALES = "small", "large"
TRAIN, HELD = {"small": 1600, "large": 20_000}, 800
STEPS, QUERIES, RUNS, BATCH, RATE = {"small": 250, "large": 3000}, 8, 3, 64, 3e-3
THINGS, CHOSEN, KINDS = 4, ("red", "blue"), ("circle", "square", "star", "heart")
GAIN, LOSS, SHARE, LEFT = 0.03, 0.01, 0.35, 0.02
ALONE = Dials(objects=(1, 1), shapes=KINDS)
SEVERAL = Dials(objects=(THINGS,) * 2, shapes=KINDS, colours=tuple(name for name in COLOURS if name not in CHOSEN))


class Tied(EfficientProbing):
    """Its queries are all the first one."""

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        same = self.queries[:1].expand_as(self.queries)
        return self.attention(same, tokens, self.value(tokens), mask)


POOLS: dict[str, Callable[[int], Any]] = {
    "mean": MeanPooling,
    "efficient": lambda dim: EfficientProbing(dim, queries=QUERIES),
    "one query": lambda dim: Tied(dim, queries=QUERIES),
    "attention": AttentiveProbing,
}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Probes of the viewer's patches, three trainings each, and of its class token where that was trained to tell."""
    expected = (
        f"the shapes of the {' and the '.join(CHOSEN)} thing of {THINGS}, from frozen patches: {QUERIES} queries name "
        f"more than a linear probe of the mean by {GAIN:.0%}, in each of {RUNS} trainings, and at most {LOSS:.0%} "
        f"fewer than attention with all its maps, with {SHARE:.0%} of its weights or fewer; with all queries tied at "
        f"most half of the gain is left; of one thing the gain over a linear probe of the class token is below "
        f"{LEFT:.0%}"
    )
    model, _ = zoo.load("viewer")
    count, steps = TRAIN[scale], STEPS[scale]
    tokens, shapes = _seen(model, [_marked(seed, i) for i in range(count + HELD)], len(CHOSEN))
    alone, only = _seen(model, [sample(ALONE, seed, i) for i in range(count + HELD)], 1)

    def right(x: Tensor, y: Tensor, way: str) -> Tensor:
        shares = []
        for run in range(RUNS * seed, RUNS * (seed + 1)):
            torch.manual_seed(run)
            probe = Probe(POOLS[way](x.shape[-1]), int(y.max()) + 1)
            _nets.train(probe, x[:count], y[:count], steps=steps, seed=run, batch=BATCH, rate=RATE)
            shares.append(float(_nets.right(probe, x[count:], y[count:]).float().mean()))
        return torch.tensor(shares)

    found = {way: right(tokens[:, 1:], shapes, way) for way in POOLS}
    trained = right(alone[:, :1], only, "mean")  # the class token alone
    easy = mean(right(alone[:, 1:], only, "efficient") - trained)
    gain, tied = found["efficient"] - found["mean"], mean(found["one query"] - found["mean"])
    behind = mean(found["attention"] - found["efficient"])
    weights = _nets.size(POOLS["efficient"](tokens.shape[-1])) / _nets.size(POOLS["attention"](tokens.shape[-1]))
    holds = mean(gain).value >= GAIN and bool((gain > 0).all()) and behind.value <= LOSS and weights <= SHARE
    holds = holds and tied.value <= mean(gain).value / 2 and easy.value < LEFT
    base = float(found["mean"].mean())
    named = ", ".join(f"{way} {mean(of):.1%}" for way, of in found.items())
    measured = (
        f"named of {HELD} held out: {named}; {QUERIES} queries above the mean by {mean(gain):.1%}, tied by {tied:.1%}, "
        f"below attention by {behind:.1%}, with {weights:.0%} of its weights; of one thing the class token names "
        f"{mean(trained):.1%}, the queries more by {easy:.1%}"
    )
    premises = [
        Premise(
            "patches tell the shapes, and their mean does not say all",
            "the mean names 15% to 95%, a probe 50% or more",
            f"{base:.1%}, {float(max(of.mean() for of in found.values())):.1%}",
            0.15 <= base <= 0.95 and max(float(of.mean()) for of in found.values()) >= 0.5,
        ),
        Premise(
            "the class token says what it was trained to",
            "names 70% or more",
            f"{mean(trained):.1%}",
            mean(trained).value >= 0.7,
        ),
    ]

    def draw(figure: Any) -> None:
        arms = {**found, "class token, one thing": trained}
        _nets.bars(figure, {way: of.tolist() for way, of in arms.items()}, ylabel="share named, held out")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _marked(seed: int, index: int) -> Scene:
    """A scene of four things, the first of which alone is red, and the second alone blue."""
    scene = sample(SEVERAL, seed, index)
    for i, colour in enumerate(CHOSEN):
        scene = scene.but(i, colour=colour)
    return scene


@torch.no_grad()
def _seen(model: nn.Module, scenes: list[Scene], things: int) -> tuple[Tensor, Tensor]:
    """Tokens of the last layer, the class token first [scene, token, dim]; the shapes of each scene's first things."""
    shapes = torch.tensor([[KINDS.index(thing.shape) for thing in scene.objects[:things]] for scene in scenes])
    states = []
    for at in range(0, len(scenes), 200):
        pixels = viewer.pixels(render(scenes[at : at + 200], viewer.SIZE))
        states.append(model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1])
    return torch.cat(states), shapes @ len(KINDS) ** torch.arange(things)
