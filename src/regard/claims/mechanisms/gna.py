"""Hassani et al. (arXiv:2504.16922): where windows line up with tiles, the simulator's bound on speedup is reached.

Full attention runs in the same engine, blocks of 8 x 8 tokens. What each query sees is written out here a second time.
The control is a window that does not line up with tiles of the grid, whose number of operations is no bound that is
reached.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.gna import gna, simulate
from .._measure import seconds

SCALES = "small", "large"
SIDE = {"small": 64, "large": 128}
CASES = ((24, 8), (40, 8), (16, 8))
TILE = 8


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Speedup over full attention of windows with a stride of 8, over the simulator's bound."""
    expected = (
        "where the simulator says that nothing visited is hidden (windows 24 and 40, stride 8), a speedup of 0.8 to "
        "1.15 of its bound; window 16, stride 8, whose bound is below that of operations, at most 0.7 of the latter; "
        "who sees whom as the rule written out"
    )
    torch.manual_seed(seed)
    side = SIDE[scale]
    x = torch.randn(1, 2, side * side, 64)
    ways = [partial(gna, x, x, x, shape=(side, side), window=w, stride=s) for w, s in ((side, TILE), *CASES)]
    full, *times = seconds(*ways, partial(F.scaled_dot_product_attention, x, x, x))
    library = times.pop()
    bounds = [simulate((side, side), w, s, query_tile=TILE, key_tile=TILE) for w, s in CASES]
    speedups = [full / time for time in times]
    reached = [s / b.throughput for s, b in zip(speedups, bounds, strict=True)]
    counted = [s / b.flops for s, b in zip(speedups, bounds, strict=True)]
    perfect = [b.perfect for b in bounds]
    right = all(_right(*case) for case in ((17, 6, 4), (16, 8, 8), (20, 5, 3), (9, 9, 2)))
    holds = right and perfect == [True, True, False] and all(0.8 <= r <= 1.15 for r in reached[:2])
    holds = holds and bounds[2].throughput < bounds[2].flops and counted[2] <= 0.7
    fast = Premise(
        "full attention in tiles is not slow to begin with",
        "at most 1.5 of the library's time",
        f"{full / library:.2f}",
        full <= 1.5 * library,
    )
    own = gna.spec.cost(side * side, side * side, 64, shape=(side, side), window=24).operations  # type: ignore[attr-defined]
    lanes = seconds(partial(gna, x, x, x, shape=(side, side), window=24))[0]

    def draw(figure: Any) -> None:
        axes, names = figure.subplots(), [f"{w}, stride {s}" for w, s in CASES]
        at = range(len(CASES))
        axes.bar([i - 0.25 for i in at], speedups, 0.25, label="measured")
        axes.bar(at, [b.throughput for b in bounds], 0.25, label="simulator's bound")
        axes.bar([i + 0.25 for i in at], [b.flops for b in bounds], 0.25, label="as operations say")
        axes.set_xticks(at, names, fontsize=7)
        axes.set(xlabel="window", ylabel="speedup over full attention", title=f"{side} x {side} tokens")
        axes.legend()

    each = ", ".join(
        f"window {w} stride {s}: {speed:.1f} of {b.throughput:.1f} ({b.flops:.1f} by operations)"
        for (w, s), speed, b in zip(CASES, speedups, bounds, strict=True)
    )
    measured = (
        f"speedup of the simulator's bound: {each}; reached {min(reached[:2]):.2f} to {max(reached[:2]):.2f} where "
        f"nothing is hidden; rule {'equal' if right else 'NOT equal'}; sliding windows of 24 in the kernel of lanes "
        f"take {lanes / full * 4 * 64 * side**4 / own:.2f} of what operations say"
    )
    return Finding(holds, measured, expected, seed, premises=[fast], draw=draw)


def _right(n: int, window: int, stride: int) -> bool:
    """Whether each of n tokens on a line sees what the paper says."""
    zero = torch.zeros(1, 1, n, 1)
    knobs = {"window": window, "stride": stride}
    seen = gna.spec.weights(zero, zero, causal=False, mask=None, scale=1.0, **knobs)[0, 0] > 0  # type: ignore[attr-defined]
    for i in range(n):
        leader = min(i // stride * stride + stride // 2, n - 1)
        centre = min(max(leader, window // 2), n - math.ceil(window / 2))
        keys = range(centre - window // 2, centre + math.ceil(window / 2))
        if seen[i].nonzero().flatten().tolist() != list(keys):
            return False
    return True
