"""Heads of the zoo's painter hunted for what pictures show and for their colours, and led away from.

On Ahn et al., Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv:2506.10978). A picture of two
objects is scored by the mean log-probability that the viewer gives the pairs in its caption, or by its chroma. Five of
the 25 heads are hunted, as many as a layer has, and judged on other captions, beside the layer that hunting would
choose and as many random heads. As in the paper's table there is no other guidance, and w is 3; in eight steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...catalog import Finding, Premise
from ...data.scenes import caption
from ...interventions import painted
from ...interventions.headhunter import Head, chroma, headhunter, self_attention
from ...loading import load
from ...seam import intervene
from .. import _painted
from .._measure import Mean, mean

CAPTIONS = {"small": (6, 24), "large": (40, 200)}  # to hunt on, and to judge on
HEADS, SPREAD, RANDOM, STEPS = 5, 3.0, 2, 8
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
EXPECTED = (
    "on other captions, the five heads hunted for the pairs raise their log-probability more than random ones do, and "
    "no less than the best layer, those hunted for chroma raise chroma more than random ones do, each by two standard "
    "errors; and pictures are further from the plain ones the larger u is"
)

Score = Callable[[NDArray[np.float32]], Any]


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Heads chosen one by one serve what they were chosen for, by degrees."""
    model, pipeline = load("painter")
    drawn = _painted.scenes(sum(CAPTIONS[scale]), seed)
    few, many = drawn[: CAPTIONS[scale][0]], drawn[CAPTIONS[scale][0] :]

    def paint(scenes: Sequence[Any], heads: Sequence[Head], u: float = 1.0) -> NDArray[np.float32]:
        inputs = {
            "prompt": [caption(scene) for scene in scenes],
            "guidance_scale": 1.0,
            "num_inference_steps": STEPS,
        }
        with intervene(model, headhunter(heads=heads, u=u, halved=False)):
            return painted(pipeline, inputs, seed=seed)

    scores: dict[str, Callable[[Any, Any], torch.Tensor]] = {
        "pairs": _painted.named,
        "chroma": lambda pictures, scenes: torch.from_numpy(chroma(pictures)),
    }
    every = self_attention(model)
    alone = {head: paint(few, [head]) for head in every}
    each = {name: torch.stack([score(alone[head], few) for head in every]) for name, score in scores.items()}
    hunted = {name: [every[i] for i in found.mean(1).argsort(descending=True)[:HEADS]] for name, found in each.items()}
    layers = {name: [head for head in every if head[0] == name] for name, _ in every}
    best = max(layers, key=lambda name: float(scores["pairs"](paint(few, layers[name]), few).mean()))
    draw = np.random.default_rng(seed)
    random = [[every[i] for i in draw.choice(len(every), HEADS, replace=False)] for _ in range(RANDOM)]

    plain = paint(many, [])
    pictures = {name: paint(many, heads) for name, heads in hunted.items()} | {"layer": paint(many, layers[best])}
    chance = [paint(many, heads) for heads in random]
    found = {
        name: {way: score(some, many) for way, some in pictures.items()}
        | {"plain": score(plain, many), "random": torch.stack([score(some, many) for some in chance]).mean(0)}
        for name, score in scores.items()
    }
    over = {name: mean(found[name][name] - found[name]["random"]) for name in scores}
    layer = mean(found["pairs"]["pairs"] - found["pairs"]["layer"])
    far = [np.abs(paint(many, hunted["pairs"], u) - plain).mean((1, 2, 3)) for u in STRENGTHS[:-1]]
    far.append(np.abs(pictures["pairs"] - plain).mean((1, 2, 3)))
    steps = [mean(after - before) for before, after in pairwise(far)]
    premises = []
    for name, some in each.items():
        away = some - some.mean(0)  # captions differ more than heads do
        spread, error = float(away.mean(1).std()), float((away.std(1) / away.shape[1] ** 0.5).mean())
        premises.append(
            Premise(
                f"single heads differ in {name}",
                f"their deviation is {SPREAD:.0f} standard errors of a head's mean",
                f"{spread:.3f}, {spread / error:.1f} errors",
                spread >= SPREAD * error,
            )
        )
    both = len(set(hunted["pairs"]) & set(hunted["chroma"]))
    told = "; ".join(
        f"{name} " + ", ".join(f"{way} {float(value.mean()):.3f}" for way, value in ways.items())
        for name, ways in found.items()
    )
    measured = (
        f"{told}; hunted over random {over['pairs']:+.3f} in pairs, {over['chroma']:+.3f} in chroma; over the best "
        f"layer {layer:+.3f} in pairs; {both} heads are in both; distance from the plain picture at u of 0.25 to 1: "
        + ", ".join(f"{part.mean():.3f}" for part in far)
    )
    holds = all(gain.above() for gain in over.values()) and not layer.below() and all(step.above() for step in steps)
    return Finding(
        holds, measured, EXPECTED, seed, premises=premises, draw=partial(_draw, found, [mean(part) for part in far])
    )


def _draw(found: dict[str, dict[str, torch.Tensor]], far: Sequence[Mean], figure: Any) -> None:
    *bars, last = figure.subplots(1, 3)
    for axes, (name, ways) in zip(bars, found.items()):
        means = [mean(value) for value in ways.values()]
        axes.bar(list(ways), [m.value for m in means], yerr=[2 * m.error for m in means])
        axes.tick_params(axis="x", rotation=45)
        axes.set_title("log-probability of pairs" if name == "pairs" else name)
    last.errorbar(STRENGTHS, [m.value for m in far], [2 * m.error for m in far], marker="o")
    last.set(xlabel="u", title="distance from the plain picture", ylim=(0, None))
