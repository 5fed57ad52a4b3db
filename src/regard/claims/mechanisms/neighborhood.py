"""Hassani et al. (arXiv:2403.04690): neighbourhood attention at the cost of its window, on one to three axes.

Which tokens are neighbours is written out here a second time, token by token, as the authors' library defines it; the
control is a window that lies a place off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.neighborhood import neighborhood
from .._measure import exponent, peak_bytes, seconds

SCALES = "small", "large"
SIDES = {"small": (32, 64, 96, 128), "large": (64, 128, 192, 256)}
WINDOWS = (5, 9, 13, 21)
DENSE = 4096  # pixels, beyond which the whole map is not made
GRIDS = (
    {"shape": (200,), "window": 9},
    {"shape": (200,), "window": 9, "dilation": 3, "causal": True},
    {"shape": (20, 24), "window": (5, 7)},
    {"shape": (20, 24), "window": (5, 7), "dilation": (2, 3), "causal": (True, False)},
    {"shape": (6, 8, 9), "window": 3},
    {"shape": (6, 8, 9), "window": (3, 3, 5), "dilation": (2, 1, 1), "causal": (True, False, False)},
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Distance to the dense masked map with its gradients; time and memory over pixels, and over the window."""
    expected = (
        "on one, two and three axes, causal, dilated and not, values and gradients within 1e-4 of those of the dense "
        "map of neighbours written out, and 0.1 or more from those of a window a place off; at a window of 7 x 7, time "
        "and memory grow with pixels to a power of at most 1.2, those of the "
        "dense masked map to 1.7 or more; on the picture of 64 x 64, time grows with the window's area to a power of "
        "0.4 to 1.2"
    )
    torch.manual_seed(seed)
    apart = max(_apart(**grid) for grid in GRIDS)
    control = min(_apart(**grid, off=1) for grid in GRIDS)
    time, memory, dense = {}, {}, {}
    for side in SIDES[scale]:
        x = torch.randn(1, 2, side * side, 64)
        run = _fused(x, side, 7)
        memory[side**2] = peak_bytes(run)
        if side**2 <= DENSE:
            time[side**2], dense[side**2] = seconds(run, _whole(x, side, 7))
        else:
            time[side**2] = seconds(run)[0]
    x = torch.randn(1, 2, 64 * 64, 64)
    windows = dict(zip([w * w for w in WINDOWS], seconds(*(_fused(x, 64, w) for w in WINDOWS)), strict=True))
    powers = {
        name: exponent(list(costs), list(costs.values()))
        for name, costs in {"time": time, "memory": memory, "dense": dense, "window": windows}.items()
    }
    holds = apart <= 1e-4 and control >= 0.1 and max(powers["time"], powers["memory"]) <= 1.2
    holds = holds and powers["dense"] >= 1.7 and 0.4 <= powers["window"] <= 1.2

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for name, costs in {"neighbourhood": time, "dense map, masked": dense}.items():
            left.loglog(list(costs), [t * 1e3 for t in costs.values()], "o-", label=name)
        left.set_xticks(list(time), [f"{math.isqrt(n)}$^2$" for n in time])
        left.set(xlabel="pixels", ylabel="milliseconds", title="Window of 7 x 7")
        left.legend()
        right.loglog(list(windows), [t * 1e3 for t in windows.values()], "o-")
        right.set_xticks(list(windows), [f"{math.isqrt(n)}$^2$" for n in windows])
        right.set(xlabel="window", title="Picture of 64 x 64")
        for axes in (left, right):
            axes.minorticks_off()
            axes.grid(alpha=0.2)

    measured = (
        f"at most {apart:.1e} from the map written out, {control:.2f} or more with a window a place off; time grows "
        f"with pixels to the power {powers['time']:.2f}, memory "
        f"{powers['memory']:.2f}, time of the dense map {powers['dense']:.2f}; time with the window's area to the "
        f"power {powers['window']:.2f}"
    )
    return Finding(holds, measured, expected, seed, draw=draw)


def _neighbours(at: int, length: int, window: int, dilation: int, causal: bool, off: int) -> list[int]:
    """Of one token on one axis: those of its remainder, itself in the middle or last, shifted inside at borders."""
    line = list(range(at % dilation, length, dilation))
    here = line.index(at) + off
    if causal:
        return line[max(0, here - window + 1) : here + 1]
    start = min(max(here - window // 2, 0), max(len(line) - window, 0))
    return line[start : start + window]


def _map(*, off: int = 0, shape: Sequence[int], **knobs: Any) -> torch.Tensor:
    """Who sees whom. [query, key]"""
    whole = torch.ones(1, 1, dtype=torch.bool)
    for axis, length in enumerate(shape):
        window, dilation, causal = (
            value[axis] if isinstance(value := knobs.get(name, default), tuple) else value
            for name, default in (("window", 7), ("dilation", 1), ("causal", False))
        )
        seen = torch.zeros(length, length, dtype=torch.bool)
        for at in range(length):
            seen[at, _neighbours(at, length, window, dilation, causal, off)] = True
        whole = torch.kron(whole.int(), seen.int()).bool()
    return whole


def _apart(*, off: int = 0, **knobs: Any) -> float:
    """The largest difference of values and gradients to those of the map written out."""
    leaves = [torch.randn(1, 2, math.prod(knobs["shape"]), 32, requires_grad=True) for _ in range(3)]
    query, key, value = leaves
    settings = {"causal": False, "mask": None, "scale": None, **knobs}
    seen = _map(off=off, **knobs)
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    given = torch.randn_like(dense)
    both = [(o, *torch.autograd.grad(o, leaves, given)) for o in (neighborhood(query, key, value, **settings), dense)]
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both, strict=True))


def _fused(x: torch.Tensor, side: int, window: int) -> Any:
    return lambda: neighborhood(x, x, x, shape=(side, side), window=window)


def _whole(x: torch.Tensor, side: int, window: int) -> Any:
    settings = {"causal": False, "mask": None, "scale": None, "shape": (side, side), "window": window}
    seen = neighborhood.spec.weights(x[:, :1], x[:, :1], **settings) > 0  # type: ignore[attr-defined]
    return lambda: F.softmax((x @ x.mT / 8).masked_fill(~seen, float("-inf")), -1) @ x
