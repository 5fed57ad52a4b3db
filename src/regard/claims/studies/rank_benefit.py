"""Amsel et al. (arXiv:2407.16153): heads of rank one against one head of full rank on the nearest-neighbour target.

Heads of rank one are random, with the weights that are best for them, in closed form; and trained, with full value and
output maps, by gradient descent, as is a head of full rank with as many query and key parameters. With depth, votes of
as many random heads. The error is the mean squared one: 1 for giving nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...studies.rank_benefit import full_rank, nearest, rank_benefit, vote
from .._measure import exponent

SCALES = "small", "large"
DIMS, ENOUGH = (4, 6, 8, 12, 16), 0.35  # for how many heads are needed
SCALED, COUNTS = (4, 8, 16, 32, 64), tuple(2**i for i in range(1, 12))
TEMPERATURE, POINTS = 0.001, (2, 16, 64)
DIM, NEIGHBOURS, BATCH, STEPS = 16, 8, 256, {"small": 1500, "large": 10_000}  # trained
WAYS = {"one of rank 16": (1, 16), "16 of rank 1": (16, 1), "128 of rank 1": (128, 1)}
QUERIES = 4000

EXPECTED = (
    "a head of full rank has an error of at most 0.02 for 2 to 64 points in 4 to 64 dimensions; with as many heads of "
    "rank one as dimensions, the error is at least 0.25 from 8 dimensions on and grows with them, and the number of "
    "heads for an error of 0.35 grows faster than the square of the dimensions; trained, 16 heads of rank one leave at "
    "least 4 times the error of one of rank 16, 128 at least twice; votes of d^2 heads leave at most half the error of "
    "one layer of as many, in 16 and 32 dimensions"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """One full-rank head finds the nearest neighbour; heads of rank one do not, unless many; depth helps."""
    torch.manual_seed(seed)
    whole = max(_full_rank_error(dim, count) for dim in SCALED for count in POINTS)
    curves = {
        dim: [rank_benefit(*_directions(2, heads, dim))[1] for heads in COUNTS] for dim in sorted({*DIMS, *SCALED})
    }
    usual = [rank_benefit(*_directions(2, dim, dim))[1] for dim in SCALED]
    needed = [_needed(curves[dim]) for dim in DIMS]
    grows = exponent(DIMS, needed)
    trained = {name: _trained(*way, STEPS[scale]) for name, way in WAYS.items()}
    votes = {dim: _vote_error(dim, dim**2) for dim in SCALED[:-1]}
    layer = {dim: rank_benefit(*_directions(2, dim**2, dim))[1] for dim in votes}
    full, few, many = trained.values()
    measured = (
        f"full rank: error at most {whole:.3f}; rank one: with d heads {usual[1]:.2f} at d = 8, {usual[-1]:.2f} at "
        f"d = 64; heads for {ENOUGH} grow as d to the {grows:.1f} ({needed[0]:.0f} to {needed[-1]:.0f}"
        f"{', not reached' if math.isinf(needed[-1]) else ''}); trained in {DIM} dimensions: "
        + ", ".join(f"{name} {error:.3f}" for name, error in trained.items())
        + "; d^2 heads of rank one: "
        + ", ".join(f"{layer[dim]:.2f} in one layer, {votes[dim]:.2f} by votes (d = {dim})" for dim in (16, 32))
        + "."
    )
    holds = whole <= 0.02 and min(usual[1:]) >= 0.25 and sorted(usual) == usual and grows > 2
    holds = holds and few >= 4 * full and many >= 2 * full and all(votes[d] <= layer[d] / 2 for d in (16, 32))

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for dim in SCALED:
            left.semilogx(COUNTS, curves[dim], "o-", ms=3, base=2, label=f"d = {dim}")
        left.axhline(0.5, color="grey", linestyle=":")
        left.set(xlabel="heads of rank one", title="Error of one layer", ylim=(0, 0.8))
        left.legend()
        names = [name.replace(" of ", "\nof ") for name in trained]
        middle.bar(names, list(trained.values()), color=["C0", "C3", "C3"])
        middle.set(title=f"Trained, {NEIGHBOURS} points, d = {DIM}")
        for name, errors in (("one layer", layer), ("votes, two layers", votes)):
            right.plot(list(errors), list(errors.values()), "o-", label=name)
        right.set(xlabel="dimensions d", title="Error of d^2 heads", ylim=(0, 0.8))
        right.legend()

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _directions(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def _full_rank_error(dim: int, count: int) -> float:
    points, query = _directions(QUERIES, count, dim), _directions(QUERIES, dim)
    given = full_rank(points, query, temperature=TEMPERATURE)
    return float((given - nearest(points, query)).square().sum(-1).mean())


def _needed(errors: list[float]) -> float:
    """Number of heads at which the error falls below what is enough, on the line between logarithms of those tried."""
    below = [i for i, error in enumerate(errors) if error < ENOUGH]
    if not below:
        return math.inf
    i = below[0]
    if i == 0:
        return float(COUNTS[0])
    part = (errors[i - 1] - ENOUGH) / (errors[i - 1] - errors[i])
    return COUNTS[i - 1] * (COUNTS[i] / COUNTS[i - 1]) ** part


def _vote_error(dim: int, heads: int) -> float:
    q, r = torch.linalg.qr(torch.randn(QUERIES, dim, 2))
    points = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT  # without these signs q is not uniform
    query = _directions(QUERIES, dim)
    return float((vote(points, query, _directions(heads, dim)) - nearest(points, query)).square().sum(-1).mean())


def _trained(heads: int, rank: int, steps: int) -> float:
    """Error of a layer of softmax heads of this rank, after training on fresh points at every step."""
    query_map, key_map = (torch.randn(heads, rank, DIM).div(DIM**0.5).requires_grad_() for _ in range(2))
    output = torch.randn(heads, DIM, DIM).div(DIM**0.5 * heads).requires_grad_()
    optimizer = torch.optim.Adam([query_map, key_map, output], 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def error(count: int) -> Tensor:
        points, query = _directions(count, NEIGHBOURS, DIM), _directions(count, DIM)
        scores = torch.einsum("hrd,bd,hre,bpe->bhp", query_map, query, key_map, points) / rank**0.5
        given = torch.einsum("bhp,bpd,hde->be", scores.softmax(-1), points, output)
        return (given - nearest(points, query)).square().sum(-1).mean()

    for _ in range(steps):
        error(BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return float(error(QUERIES))
