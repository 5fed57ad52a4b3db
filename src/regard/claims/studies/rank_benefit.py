"""Amsel et al. (arXiv:2407.16153): heads of rank one against one head of full rank on the nearest-neighbour target.

Heads of rank one are random, with the weights that are best for them, in closed form; and trained, with full value and
output maps, by gradient descent, as is a head of full rank with as many query and key parameters. With depth, votes of
as many random heads. The error is the mean squared one: 1 for giving nothing.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...studies.rank_benefit import full_rank, nearest, rank_benefit, vote
from .._measure import exponent, mean

SCALES = "small", "large"
DIMS, ENOUGH = (4, 6, 8, 12, 16), (0.5, 0.4, 0.3)  # for how many heads are needed
DRAWS = 8  # of random heads
SCALED, COUNTS = (4, 8, 16, 32, 64), tuple(2**i for i in range(1, 12))
TEMPERATURE, POINTS = 0.001, (2, 16, 64)
DIM, NEIGHBOURS, BATCH, STEPS = 16, 8, 256, {"small": 1500, "large": 10_000}  # trained
WAYS = {"one of rank 16": (1, 16), "16 of rank 1": (16, 1), "128 of rank 1": (128, 1)}
QUERIES = 4000

EXPECTED = (
    "a head of full rank has an error of at most 0.02 for 2 to 64 points in 4 to 64 dimensions; with as many heads of "
    "rank one as dimensions the error is at least 0.25 from 8 dimensions on; the number of heads that an error needs "
    "grows with the dimensions as a power that rises as the error falls, by 0.2 or more, and by two standard errors, "
    "from 0.5 to 0.4 and from there to 0.3; trained, 16 heads of rank one leave at least 4 times the error of one of "
    "rank 16, 128 at least twice; votes of d^2 heads, the depth-two control, leave a part of the error of one layer "
    "that falls from 8 to 16 to 32 dimensions, to at most half"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """One full-rank head finds the nearest neighbour; heads of rank one do not, unless many; depth helps."""
    torch.manual_seed(seed)
    whole = max(_full_rank_error(dim, count) for dim in SCALED for count in POINTS)
    drawn = [
        {dim: [rank_benefit(*_directions(2, heads, dim))[1] for heads in COUNTS] for dim in sorted({*DIMS, *SCALED})}
        for _ in range(DRAWS)
    ]
    curves = {dim: [sum(errors) / DRAWS for errors in zip(*(d[dim] for d in drawn))] for dim in drawn[0]}
    usual = [rank_benefit(*_directions(2, dim, dim))[1] for dim in SCALED]
    reached = max(errors[-1] for dim, errors in curves.items() if dim in DIMS)
    enough = Premise(
        "heads enough for each error asked",
        f"below {min(ENOUGH)} with {COUNTS[-1]} heads",
        f"at most {reached:.2f} in {DIMS[0]} to {DIMS[-1]} dimensions",
        reached < min(ENOUGH),
    )
    grows = [[exponent(DIMS, [_needed(d[dim], error) for dim in DIMS]) for d in drawn] for error in ENOUGH]
    rises = [mean([b - a for a, b in zip(*pair)]) for pair in itertools.pairwise(grows)]
    trained = {name: _trained(*way, STEPS[scale]) for name, way in WAYS.items()}
    votes = {dim: mean([_vote_error(dim, dim**2) for _ in range(DRAWS)]).value for dim in SCALED[:-1]}
    layer = {dim: mean([rank_benefit(*_directions(2, dim**2, dim))[1] for _ in range(DRAWS)]).value for dim in votes}
    left = [votes[dim] / layer[dim] for dim in (8, 16, 32)]
    full, few, many = trained.values()
    measured = (
        f"full rank: error at most {whole:.3f}; rank one: with d heads {usual[1]:.2f} at d = 8, {usual[-1]:.2f} at "
        "d = 64; heads needed grow as d to the "
        + ", ".join(f"{mean(of):.2f} (error {error})" for of, error in zip(grows, ENOUGH))
        + f", rising by {rises[0]:.2f} and {rises[1]:.2f}; trained in {DIM} dimensions: "
        + ", ".join(f"{name} {error:.3f}" for name, error in trained.items())
        + f"; votes of d^2 heads leave {left[0]:.2f}, {left[1]:.2f}, {left[2]:.2f} of one layer's error for d = 8, "
        f"16, 32. Means of {DRAWS} draws."
    )
    holds = whole <= 0.02 and min(usual[1:]) >= 0.25 and all(r.value >= 0.2 and r.above() for r in rises)
    holds = holds and few >= 4 * full and many >= 2 * full and left == sorted(left, reverse=True) and left[-1] <= 0.5

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

    return Finding(holds, measured, EXPECTED, seed, premises=[enough], draw=draw)


def _directions(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def _full_rank_error(dim: int, count: int) -> float:
    points, query = _directions(QUERIES, count, dim), _directions(QUERIES, dim)
    given = full_rank(points, query, temperature=TEMPERATURE)
    return float((given - nearest(points, query)).square().sum(-1).mean())


def _needed(errors: list[float], enough: float) -> float:
    """Number of heads at which the error falls below what is enough, on the line between logarithms of those tried."""
    i = next((i for i, error in enumerate(errors) if error < enough), None)
    if i is None:
        return math.inf
    if i == 0:
        return float(COUNTS[0])
    part = (errors[i - 1] - enough) / (errors[i - 1] - errors[i])
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
