"""Han et al. (arXiv:2312.08874): two softmaxes over agents are generalised linear attention, at linear cost.

Maps are written out here by their own formula; the control is softmax attention's map, which is of full rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.agent_attention import agent_attention
from .._measure import exponent, lines, peak_bytes, seconds

SCALES = "small", "large"
SIDES = {"small": (16, 32, 48, 64, 96), "large": (32, 64, 128, 192, 256)}  # of square grids
DENSE = 64  # the largest side that softmax attention is timed at
SHAPES = ((14, 49), (8, 16), (12, 9), (16, 49), (6, 4))  # side of the grid, agents
HEADS, DIM = 4, 32


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Equal to phi(query) phi(key)^T value, of rank no more than the agents; time and memory follow the patches."""
    expected = (
        "within 1e-5 of the product of its two maps, float32, five grids; of that map the singular value after as many "
        "as there are agents is 1e-5 of the first or less, of softmax attention's 1e-3 or more; with 49 agents time "
        "grows with a power of patches of 1.2 at most and memory of 1.1, softmax attention's time with one of 1.7 or "
        "more"
    )
    torch.manual_seed(seed)
    offs, ranks, controls = zip(*(_beside(side, agents) for side, agents in SHAPES))
    sides, ours, memory, theirs = SIDES[scale], {}, {}, {}
    for side in sides:
        x = torch.randn(1, HEADS, side**2, DIM)
        run = lambda x=x, side=side: agent_attention(x, x, x, shape=(side, side))  # noqa: E731
        ours[side**2], memory[side**2] = seconds(run)[0], peak_bytes(run)
        if side <= DENSE and side > 16:
            theirs[side**2] = seconds(lambda x=x: F.scaled_dot_product_attention(x, x, x))[0]
    powers = [exponent(list(of), list(of.values())) for of in (ours, memory, theirs)]

    def draw(figure: Any) -> None:
        named = {"agent attention": ours, "softmax attention": theirs}
        series = {name: (list(of), [t * 1e3 for t in of.values()]) for name, of in named.items()}
        lines(figure.subplots(), series, xlabel="patches", ylabel="milliseconds", title=f"{HEADS} heads of {DIM}")

    measured = (
        f"off by {max(offs):.1e} at most; singular values after the agents' {max(ranks):.1e} of the first at most, "
        f"softmax attention's {min(controls):.1e} at least; from {sides[0] ** 2} to {sides[-1] ** 2} patches time "
        f"grows with their power of {powers[0]:.2f} and memory of {powers[1]:.2f}, softmax attention's time of "
        f"{powers[2]:.2f}"
    )
    holds = max(offs) <= 1e-5 and max(ranks) <= 1e-5 and min(controls) >= 1e-3
    holds = holds and powers[0] <= 1.2 and powers[1] <= 1.1 and powers[2] >= 1.7
    return Finding(holds, measured, expected, seed, draw=draw)


def _beside(side: int, agents: int) -> tuple[float, float, float]:
    """How far off the product of its maps it is; the singular value after the agents', of that and of softmax's map."""
    query, key, value = (torch.randn(2, HEADS, side**2, DIM) for _ in range(3))
    found = agent_attention(query, key, value, agents=agents, shape=(side, side))
    grid = query.mT.unflatten(-1, (side, side)).flatten(0, 1)
    agent = F.adaptive_avg_pool2d(grid, int(agents**0.5)).flatten(2).mT.unflatten(0, (2, HEADS))
    of_keys, of_queries = ((a @ b.mT / DIM**0.5).softmax(-1) for a, b in ((agent, key), (query, agent)))
    off = float((found - of_queries @ (of_keys @ value)).abs().max())
    soft = (query @ key.mT / DIM**0.5).softmax(-1)
    return off, _after(of_queries.double() @ of_keys.double(), agents), _after(soft.double(), agents)


def _after(maps: Tensor, count: int) -> float:
    values = torch.linalg.svdvals(maps[0])
    return float((values[:, count] / values[:, 0]).max())
