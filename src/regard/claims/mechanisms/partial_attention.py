"""Huang et al. (arXiv:2503.03148): convolving a quarter of the channels and attending to the others costs no accuracy.

A network of three blocks reads handwritten digits. Its blocks mix positions by a partial
convolution alone, by `PartialChannel`, or by its full form, in which all channels are convolved and then attended to;
an MLP that ends in `PartialSpatial` follows where there is attention. The partial convolution alone is the control: if
it is as accurate, attention is not what keeps accuracy. Processor time is that of one picture of 224 pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.partial_attention import PartialChannel, PartialSpatial
from .._measure import mean, seconds
from .._nets import bars, normed, on_digits, operations, size

WIDTH, BLOCKS = 32, 3
TRAINING, HELD_OUT, STEPS, RUNS = 4000, 2000, 250, 1
NONE, PARTIAL, FULL = "partial convolution alone", "partial", "full"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy, operations and time of a network with partial attention, with the full form, and with none."""
    expected = (
        "partial attention within 0.7 points of the full form, two standard errors allowed, and no worse than without "
        "attention by 0.2 points, two standard errors allowed; its processor time for a picture 0.7 of the full "
        "form's or less"
    )
    sizes = {"training": TRAINING, "held_out": HELD_OUT, "steps": STEPS, "runs": RUNS}
    hits = on_digits(_network, (NONE, PARTIAL, FULL), **sizes, seed=seed)
    share = {way: [float(h.float().mean()) for h in found] for way, found in hits.items()}
    picture, networks = torch.randn(1, 1, 224, 224), {way: _network(way).eval() for way in hits}
    times = dict(
        zip(hits, seconds(*(partial(torch.no_grad()(n), picture) for n in networks.values()), least=5), strict=True)
    )
    counted = {way: operations(network, picture) for way, network in networks.items()}

    def over(other: str):
        return mean(100 * (torch.cat(hits[PARTIAL]).double() - torch.cat(hits[other]).double()))

    lost, gained = over(FULL), over(NONE)
    faster = times[PARTIAL] / times[FULL]
    holds = -lost.value <= 0.7 + 2 * lost.error and gained.value >= -0.2 - 2 * gained.error and faster <= 0.7
    most = max(mean(of).value for of in share.values())
    premises = [
        Premise("there is something left to lose", "99% at most", f"{most:.1%}", most <= 0.99),
        Premise("a point can be told", "a standard error of 1 point at most", f"{lost.error:.1f}", lost.error <= 1),
    ]
    measured = (
        f"accuracy {', '.join(f'{mean(of).value:.1%} {way}' for way, of in share.items())}; partial over full "
        f"{lost.value:+.1f} ± {lost.error:.1f} points, over none {gained.value:+.1f} ± {gained.error:.1f}; time "
        f"{faster:.2f} of the full form's, operations {counted[PARTIAL] / counted[FULL]:.2f}, parameters "
        f"{size(networks[PARTIAL]) / size(networks[FULL]):.2f}; trainings of each: {RUNS}"
    )
    draw = partial(bars, values=share, ylabel="accuracy", title="Handwritten digits")
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


class _Convolved(PartialChannel):
    """The partial convolution alone."""

    def attend(self, x: Tensor) -> Tensor:
        return x


class _Mixing(nn.Module):
    def __init__(self, channels: int, way: str) -> None:
        super().__init__()
        mix = _Convolved(channels) if way == NONE else PartialChannel(channels, split=1 if way == FULL else 4)
        end = nn.Identity() if way == NONE else PartialSpatial(channels)
        wide, narrow = (
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.Conv2d(2 * channels, channels, 1, bias=False),
        )
        self.layers = nn.Sequential(mix, wide, nn.BatchNorm2d(2 * channels), nn.ReLU(), narrow, end)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _network(way: str) -> nn.Module:
    blocks = (_Mixing(WIDTH, way) for _ in range(BLOCKS))
    return nn.Sequential(*normed(1, WIDTH, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
