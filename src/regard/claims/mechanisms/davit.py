"""Ding et al. (arXiv:2204.03645): channel attention sees the whole picture in one layer, at a cost linear in pixels.

Its dense form is written out here a second time; the control takes the softmax over the other axis. How far one block
sees is the gradient of one corner's output by pixels, those of every distance, beside a block of windows, whose
convolutions reach two places further than the window.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import Finding, Premise
from ...mechanisms.davit import ChannelBlock, WindowBlock, channel
from .._measure import exponent, peak_bytes, seconds

SIDES = {"small": (32, 64, 96, 128), "large": (32, 64, 128, 256)}
DIM, WINDOW, SIDE = 32, 7, 28


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Channel attention against its dense form, its cost over pixels, and how far one layer sees."""
    expected = (
        "channel attention within 1e-5 of its dense form, gradients too, and 0.1 or more from it with the softmax "
        "over the other axis; time and memory grow with pixels to a power of at most 1.2; of one block, the output at "
        "a corner depends on every pixel for channels, and for windows on none beyond the window and its convolutions"
    )
    torch.manual_seed(seed)
    apart, control = _apart(), _apart(axis=-2)
    sides = SIDES[scale]
    inputs = [torch.randn(1, 3, side * side, 32) for side in sides]
    runs = [partial(channel, x, x, x) for x in inputs]
    pixels = [side * side for side in sides]
    powers = exponent(pixels, seconds(*runs)), exponent(pixels, [peak_bytes(run) for run in runs])
    reach = {"channels": _reach(ChannelBlock(DIM, 4)), "windows": _reach(WindowBlock(DIM, 4, window=WINDOW))}
    beyond = {name: by_distance[WINDOW + 2 :] for name, by_distance in reach.items()}
    seen = float((beyond["channels"] > 0).double().mean())
    holds = apart <= 1e-5 and control >= 0.1 and max(powers) <= 1.2
    holds = holds and seen == 1 and not beyond["windows"].any()
    within = Premise(
        "windows see what is inside them",
        "a gradient at every distance below the window's",
        f"at {int((reach['windows'][:WINDOW] > 0).sum())} of {WINDOW}",
        bool((reach["windows"][:WINDOW] > 0).all()),
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, by_distance in reach.items():
            axes.semilogy(range(SIDE), by_distance.clamp_min(1e-12), "o-", markersize=3, label=name)
        axes.set(xlabel="distance from the corner, places", ylabel="largest gradient", title="What one block sees")
        axes.legend()

    measured = (
        f"at most {apart:.1e} from the dense form ({control:.2f} over the other axis); time grows with pixels to the "
        f"power {powers[0]:.2f}, memory {powers[1]:.2f}; beyond window and convolutions a corner's output depends on "
        f"{seen:.0%} of distances for channels (at the farthest {float(reach['channels'][-1]):.1e}), for windows on "
        f"{float((beyond['windows'] > 0).double().mean()):.0%}"
    )
    return Finding(holds, measured, expected, seed, premises=[within], draw=draw)


def _apart(axis: int = -1) -> float:
    """Largest difference of values and gradients to the form written out."""
    leaves = [torch.randn(2, 3, 50, 16, requires_grad=True) for _ in range(3)]
    query, key, value = leaves
    scores = torch.einsum("bhnc,bhnd->bhcd", query, key) / math.sqrt(16)
    dense = torch.einsum("bhcd,bhnd->bhnc", torch.softmax(scores, axis), value)
    given = torch.randn_like(dense)
    both = [(o, *torch.autograd.grad(o, leaves, given)) for o in (channel(*leaves), dense)]
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both, strict=True))


def _reach(block: nn.Module) -> Tensor:
    """The largest gradient of one corner's output by pixels at each distance from it, in either axis. [distance]"""
    x = torch.randn(1, DIM, SIDE, SIDE, requires_grad=True)
    block(x)[..., 0, 0].square().sum().backward()
    assert x.grad is not None
    largest, at = x.grad.abs().amax((0, 1)), torch.arange(SIDE)
    distance = torch.maximum(at[:, None], at[None])
    return torch.stack([largest[distance == d].amax() for d in range(SIDE)])
