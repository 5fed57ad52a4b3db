"""Vaswani et al. (arXiv:2103.12731): blocks with halos are the masked map, at a cost linear in the number of pixels.

Who sees whom is written out here a second time. How far a stride saves was chosen on another seed: a quarter of the
queries take more than a quarter of the time, as keys are laid out for all blocks. The control has zeros outside the
picture that take part, as timm's layer: it may differ in blocks at the border only.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.halonet import halonet
from .._measure import exponent, seconds

SCALES = "small", "large"
SIDES = {"small": (32, 64, 96, 128), "large": (64, 128, 192, 256)}
DENSE = 64  # the largest side at which the whole map is made
HALOS = (1, 3, 5, 7)
CASES = ((2, 0, 1), (2, 1, 2), (4, 1, 1), (4, 3, 2), (8, 1, 2), (8, 3, 1))  # block, halo, stride


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Distance to the dense masked map with its gradients; time over pixels, over the window, and with a stride."""
    expected = (
        "values and gradients within 1e-4 of those of the dense map written out, over six shapes; with zeros outside "
        "that take part, 0.01 or more from it in blocks at the border and within 1e-4 inside; time grows with pixels "
        "to a power of at most 1.2, that of the dense map to 1.7 or more; with the window's area to a power of 0.4 to "
        "1.2; with stride 2 it takes at most half"
    )
    torch.manual_seed(seed)
    apart = max(_apart(*case) for case in CASES)
    inside, border = _control()
    sides = SIDES[scale]
    maps = [torch.randn(1, 4, n * n, 64) for n in sides]
    ways = [partial(halonet, x, x, x, shape=(n, n)) for x, n in zip(maps, sides, strict=True)]
    times = seconds(*ways)
    few = [n for n in sides if n <= DENSE] if scale == "small" else [32, 64]
    dense = seconds(*(partial(_dense, x, x, x, n, 8, 3, 1) for n in few for x in [torch.randn(1, 4, n * n, 64)]))
    x, n = maps[1], sides[1]
    halos = seconds(*(partial(halonet, x, x, x, shape=(n, n), halo=h) for h in HALOS))
    whole, half = seconds(*(partial(halonet, x, x, x, shape=(n, n), stride=s) for s in (1, 2)), least=5)
    powers = {
        "time": exponent([n * n for n in sides], times),
        "dense": exponent([n * n for n in few], dense),
        "window": exponent([(8 + 2 * h) ** 2 for h in HALOS], halos),
    }
    holds = apart <= 1e-4 and inside <= 1e-4 and border >= 1e-2 and half <= 0.7 * whole
    holds = holds and powers["time"] <= 1.2 and powers["dense"] >= 1.7 and 0.4 <= powers["window"] <= 1.2
    long = Premise("what is timed is attention", "1 ms or more", f"{times[0] * 1e3:.1f} ms", times[0] >= 1e-3)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.loglog([n * n for n in sides], [t * 1e3 for t in times], "o-", label="blocks with halos")
        left.loglog([n * n for n in few], [t * 1e3 for t in dense], "o-", label="dense map, masked")
        left.set(xlabel="pixels", ylabel="milliseconds", title="Block 8, halo 3")
        left.legend()
        right.loglog([(8 + 2 * h) ** 2 for h in HALOS], [t * 1e3 for t in halos], "o-")
        right.set(xlabel="keys of a window", title=f"Picture of {n} x {n}")

    measured = (
        f"at most {apart:.1e} from the map written out; with zeros outside {border:.2f} at the border, {inside:.1e} "
        f"inside; time grows with pixels to the power {powers['time']:.2f}, of the dense map {powers['dense']:.2f}, "
        f"with the window's area {powers['window']:.2f}; stride 2 takes {half / whole:.2f} of the time"
    )
    return Finding(holds, measured, expected, seed, premises=[long], draw=draw)


def _seen(n: int, block: int, halo: int, stride: int) -> Tensor:
    """Along one axis. [query, key]"""
    seen = torch.zeros(math.ceil(n / stride), n, dtype=torch.bool)
    for i in range(0, n, stride):
        start = i // block * block
        for j in range(start - halo, start + block + halo):
            if 0 <= j < n:
                seen[i // stride, j] = True
    return seen


def _dense(query: Tensor, key: Tensor, value: Tensor, n: int, block: int, halo: int, stride: int) -> Tensor:
    seen = _seen(n, block, halo, stride)
    pairs = torch.kron(seen.int(), seen.int()).bool()
    rows = query.unflatten(2, (n, n))[:, :, ::stride, ::stride].flatten(2, 3)
    scores = (rows @ key.mT * query.shape[-1] ** -0.5).masked_fill(~pairs, float("-inf"))
    return scores.softmax(-1) @ value


def _apart(block: int, halo: int, stride: int, n: int = 24) -> float:
    leaves = [torch.randn(1, 2, n * n, 16, requires_grad=True) for _ in range(3)]
    ours = halonet(*leaves, shape=(n, n), block=block, halo=halo, stride=stride)
    theirs = _dense(*leaves, n, block, halo, stride)
    given = torch.randn_like(theirs)
    both = [(o, *torch.autograd.grad(o, leaves, given)) for o in (ours, theirs)]
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both, strict=True))


def _control(n: int = 32, block: int = 8, halo: int = 3) -> tuple[float, float]:
    """How far zeros outside are off: inside, and at the border."""
    query, key, value = torch.randn(3, 1, 2, n * n, 16)
    off = halonet(query, key, value, shape=(n, n), block=block, halo=halo, padding="zeros")
    off = (off - _dense(query, key, value, n, block, halo, 1)).abs().amax((0, 1, 3)).unflatten(0, (n, n))
    middle = F.pad(torch.ones(n - 2 * block, n - 2 * block, dtype=torch.bool), (block,) * 4)
    return float(off[middle].max()), float(off[~middle].max())
