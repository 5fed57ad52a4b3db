"""Bricken and Pehlevan (arXiv:2111.05498): attention beside Kanerva's memory, and the betas of the zoo's reader.

Memory: 1024 random patterns of 64 signs, the size of a head of GPT-2 and its context; queries are patterns with some
signs flipped; radii are the paper's 5, 11 and 15. Attention is softmax(beta * cosine) with beta fitted to the radius.
A pattern is recalled if the signs of the read are all its own.

Trained heads do not look at vectors of length 1. Their beta is that of the authors' code: the largest score of a
query, which a cosine of 1 would give; the mean over the last query of several texts, for each head.
"""

from __future__ import annotations

from typing import Any

import torch

from ...catalog import Finding
from ...studies.sparse_distributed_memory import fitted_beta, reference_radii, sparse_distributed_memory
from .._calls import reader_calls, shared

SCALES = "small", "large"
DIM, PATTERNS, RADII = 64, 1024, (5, 11, 15)
FLIPS = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)
QUERIES = {"small": 500, "large": 5000}
CONTEXT, TEXTS = 256, 8

EXPECTED = (
    "for queries at most half a radius from their pattern, the weights of attention and memory are on average at most "
    "0.1 apart (total variation), for each radius; at any distance the shares of patterns that both recall are at most "
    "0.1 apart; at least half of the reader's heads have a beta between those of the radii best for critical distance "
    "and for memory, in as many dimensions as its heads"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Softmax of cosines weighs patterns as the memory does, and trained betas lie where memories work."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(2, (PATTERNS, DIM), generator=generator).double() * 2 - 1
    target = torch.randint(PATTERNS, (QUERIES[scale],), generator=generator)
    order = torch.rand(QUERIES[scale], DIM, generator=generator).argsort(1)
    apart: dict[int, list[float]] = {}
    recalled: dict[str, dict[int, list[float]]] = {"memory": {}, "attention": {}}
    for radius in RADII:
        beta = fitted_beta(DIM, radius)[0]
        apart[radius] = []
        recalled["memory"][radius], recalled["attention"][radius] = [], []
        for flips in FLIPS:
            query = torch.where(order < flips, -1, 1) * key[target]
            ways = {
                "memory": sparse_distributed_memory(query, key, radius=radius).nan_to_num(0),
                "attention": (beta * query @ key.mT / DIM).softmax(-1),
            }
            apart[radius].append(float((ways["memory"] - ways["attention"]).abs().sum(-1).mean() / 2))
            for way, weights in ways.items():
                whole = ((weights @ key).sign() == key[target]).all(-1)
                recalled[way][radius].append(float(whole.double().mean()))

    near = {r: max(a for a, flips in zip(apart[r], FLIPS) if flips <= r / 2) for r in RADII}
    gaps = {
        (radius, flips): abs(a - b)
        for radius in RADII
        for flips, a, b in zip(FLIPS, recalled["memory"][radius], recalled["attention"][radius])
    }
    widest = max(gaps, key=lambda at: gaps[at])
    betas, dim = _betas(seed)
    radii = reference_radii(dim, CONTEXT)
    low, high = (fitted_beta(dim, radii[name])[0] for name in ("critical", "memory"))
    within = float(((betas >= low) & (betas <= high)).double().mean())
    below = float((betas < low).double().mean())
    measured = (
        "within half a radius the weights are at most "
        + ", ".join(f"{near[r]:.3f} (radius {r})" for r in RADII)
        + f" apart; recall differs by up to {gaps[widest]:.2f} (radius {widest[0]}, {widest[1]} flips); "
        f"betas of the reader's {len(betas)} heads have median "
        f"{float(betas.median()):.1f}, and {within:.0%} lie from {low:.1f} to {high:.1f} ({below:.0%} below)."
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for i, radius in enumerate(RADII):
            left.plot(FLIPS, apart[radius], "o-", color=f"C{i}", label=f"radius {radius}")
            middle.plot(FLIPS, recalled["memory"][radius], "o-", color=f"C{i}")
            middle.plot(FLIPS, recalled["attention"][radius], "x--", color=f"C{i}")
        left.set(xlabel="signs flipped in the query", title="Weights apart", ylim=(-0.02, 1.02))
        left.legend()
        middle.plot([], [], "o-", color="grey", label="memory")
        middle.plot([], [], "x--", color="grey", label="attention")
        middle.set(xlabel="signs flipped in the query", title="Share recalled", ylim=(-0.02, 1.02))
        middle.legend()
        right.hist(betas.numpy(), bins=20, color="C3")
        right.axvspan(low, high, color="grey", alpha=0.3, label="critical distance\nto memory")
        right.set(xlabel="beta", title="Heads of the reader")
        right.legend()

    holds = max(near.values()) <= 0.1 and gaps[widest] <= 0.1 and within >= 0.5
    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def _betas(seed: int) -> tuple[torch.Tensor, int]:
    """Largest score of a text's last query, the mean over texts, of each head of the reader; and their dimensions."""
    largest = []
    calls = reader_calls(CONTEXT, texts=TEXTS, seed=seed)
    for call in calls:
        scores = call.query[:, :, -1:] @ shared(call.key, call.query.shape[1]).mT * call.scale
        largest.append(scores.amax(-1)[..., 0].mean(0))
    return torch.cat(largest), calls[0].query.shape[-1]
