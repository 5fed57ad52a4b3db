"""Saini et al. (arXiv:2006.15102): layers of a compact network give way to subspace attention at hardly a loss.

A network of depthwise-separable layers reads handwritten digits. Two of its layers are replaced by
ULSAM of four groups or left out, which is the control: only if that costs something is there anything to keep. Batch
norms take the statistics of one large batch before evaluation.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ...catalog import Finding, Premise
from ...mechanisms.ulsam import ULSAM
from .._measure import mean
from .._nets import bars, on_digits, operations

SIDE, WIDTH, LAYERS, REPLACED = 14, 24, 5, (2, 3)
TRAINING, HELD_OUT, STEPS, RUNS = 4000, 2000, 300, 2
FULL, FOUR, OUT = "full", "ULSAM", "left out"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy and operations of the network with two of its layers, with ULSAM in their place, and without."""
    expected = (
        "with ULSAM of 4 groups in place of two layers, 13% fewer operations or more, and accuracy less by 0.5 points "
        "at most, two standard errors allowed; better than with the layers left out by two standard errors"
    )
    sizes = {"training": TRAINING, "held_out": HELD_OUT, "steps": STEPS, "runs": RUNS}
    hits = on_digits(_network, (FULL, FOUR, OUT), **sizes, seed=seed)
    costs = {way: operations(_network(way), torch.zeros(1, 1, SIDE, SIDE)) for way in hits}
    share = {way: [float(h.float().mean()) for h in found] for way, found in hits.items()}

    def over(way: str, other: str):
        return mean(torch.cat(hits[way]).double() - torch.cat(hits[other]).double())

    saved = 1 - costs[FOUR] / costs[FULL]
    lost, gained, matters = over(FULL, FOUR), over(FOUR, OUT), over(FULL, OUT)
    holds = saved >= 0.13 and lost.value <= 0.005 + 2 * lost.error and lost.value <= 0.02 and gained.above()
    premise = Premise(
        "the two layers matter: accuracy without them is lower",
        "by a point or more, and by two standard errors",
        f"{100 * matters.value:.1f} ± {100 * matters.error:.1f} points",
        matters.value >= 0.01 and matters.above(),
    )
    measured = (
        f"accuracy {', '.join(f'{mean(of).value:.1%} {way}' for way, of in share.items())}; operations fewer by "
        f"{saved:.0%}; lost to the full network {100 * lost.value:.1f} ± {100 * lost.error:.1f} points, gained on "
        f"leaving the layers out {100 * gained.value:.1f} ± {100 * gained.error:.1f}; trainings of each: {RUNS}"
    )
    draw = partial(bars, values=share, ylabel="accuracy", title="Two of five layers replaced")
    return Finding(holds, measured, expected, seed, premises=[premise], draw=draw)


def _network(way: str) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    for i in range(LAYERS):
        if i not in REPLACED or way == FULL:
            layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False), nn.BatchNorm2d(WIDTH)]
            layers += [nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        elif way != OUT:
            layers.append(ULSAM(WIDTH, groups=4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
