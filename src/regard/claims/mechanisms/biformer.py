"""Zhu et al. (arXiv:2303.08810): attention to the routed regions alone, at the cost that their number predicts.

Regions are picked here a second time, one by one. The control lets each region attend to those of the next one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...catalog import Finding
from ...mechanisms.biformer import biformer, route
from .._measure import seconds

SCALES = "small", "large"
SIDE = {"small": 64, "large": 128}
TOPS = (2, 4, 8, 16, 64)
CASES = (((16, 24), (4, 4), 2), ((15, 20), (5, 4), 3), ((14, 14), (7, 7), 4))  # picture, regions, top


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Distance to the dense map of the picked regions, with its gradients; time against operations over `top`."""
    expected = (
        "the regions picked one by one, values and gradients within 1e-4 of those of the dense map of these, and 0.1 "
        "or more from those of another region's; with all regions within 1e-4 of full attention; a region costs from 4 "
        "to 16 of them 0.75 to 1.33 times what it does from 16 to 64, and 4 of 64 take at most a fifth of the time of "
        "all"
    )
    torch.manual_seed(seed)
    found = [_apart(*case) for case in CASES]
    apart, control, whole = (f(values) for f, values in zip((max, min, max), zip(*found, strict=True), strict=True))
    side = SIDE[scale]
    query, key, value = torch.randn(3, 1, 4, side * side, 32)
    knobs = {"shape": (side, side), "regions": 8}
    times = dict(zip(TOPS, seconds(*(partial(biformer, query, key, value, **knobs, top=t) for t in TOPS)), strict=True))
    says = {t: biformer.spec.cost(side**2, side**2, 32, **knobs, top=t).operations for t in TOPS}  # type: ignore[attr-defined]
    each = [(times[b] - times[a]) / (says[b] - says[a]) for a, b in ((4, 16), (16, 64))]
    grew = each[0] / each[1]
    holds = apart <= 1e-4 and control >= 0.1 and whole <= 1e-4
    holds = holds and 0.75 <= grew <= 1.33 and times[4] <= times[64] / 5

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.loglog(TOPS, [t * 1e3 for t in times.values()], "o-", label="measured")
        axes.loglog(TOPS, [times[64] * o / says[64] * 1e3 for o in says.values()], "o:", label="as operations say")
        axes.set(xlabel="regions, of 64", ylabel="milliseconds", title=f"Picture of {side} x {side}")
        axes.legend()

    measured = (
        f"at most {apart:.1e} from the map of the regions picked, {control:.2f} or more with another region's; with "
        f"all regions {whole:.1e} from full attention; from 4 to 16 regions one costs {grew:.2f} times what it does "
        f"from 16 to 64; 4 of 64 take {times[4] / times[64]:.3f} of the time of all"
    )
    return Finding(holds, measured, expected, seed, draw=draw)


def _regions(shape: tuple[int, int], regions: tuple[int, int]) -> Tensor:
    """The region of each token."""
    heights = -(-shape[0] // regions[0]), -(-shape[1] // regions[1])
    columns = -(-shape[1] // heights[1])
    return torch.tensor([r // heights[0] * columns + c // heights[1] for r in range(shape[0]) for c in range(shape[1])])


def _picked(query: Tensor, key: Tensor, of: Tensor, top: int) -> list[set[int]]:
    n = int(of.max()) + 1
    means = [[x[0, :, of == r].mean(1).flatten() for r in range(n)] for x in (query, key)]
    picked = []
    for one in means[0]:
        scores = [float(one @ other) for other in means[1]]
        picked.append(set(sorted(range(n), key=lambda r: -scores[r])[:top]))
    return picked


def _apart(shape: tuple[int, int], regions: tuple[int, int], top: int) -> tuple[float, float, float]:
    """From the map of the regions picked, from that of the next region's, and with all regions from full attention."""
    leaves = [torch.randn(1, 2, shape[0] * shape[1], 16, requires_grad=True) for _ in range(3)]
    query, key, value = leaves
    of = _regions(shape, regions)
    picked = _picked(query.detach(), key.detach(), of, top)
    chosen = route(query, key, shape=shape, regions=regions, top=top)[0, 0]
    if [set(row.tolist()) for row in chosen] != picked:
        return float("inf"), 0.0, float("inf")
    n = len(picked)
    every = torch.ones(n, n, dtype=torch.bool)
    wanted = torch.tensor([[r in row for r in range(n)] for row in picked])
    scores = query @ key.mT * (2 * 16) ** -0.5
    dense = [
        scores.masked_fill(~seen[of][:, of], float("-inf")).softmax(-1) @ value
        for seen in (wanted, wanted.roll(1, 0), every)
    ]
    given = torch.randn_like(dense[0])
    both = []
    for output in (biformer(query, key, value, shape=shape, regions=regions, top=top), *dense[:2]):
        both.append([output, *torch.autograd.grad(output, leaves, given, retain_graph=True)])
    off = [max(float((a - b).detach().abs().max()) for a, b in zip(both[0], other, strict=True)) for other in both[1:]]
    whole = biformer(query, key, value, shape=shape, regions=regions, top=n)
    return off[0], off[1], float((whole - dense[2]).detach().abs().max())
