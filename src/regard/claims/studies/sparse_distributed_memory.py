"""Bricken and Pehlevan (arXiv:2111.05498): attention beside Kanerva's memory, and betas that are learned.

Memory: patterns of 64 signs, the size of a head of GPT-2; radii are the paper's 5, 11 and 15. Attention is softmax(beta
* cosine) with beta fitted to the radius. As in the paper's figure one pattern lies at each distance; among 1024 random
patterns the many far ones together draw more from attention than from memory, which is no part of the claim. Recall is
asked up to two thirds of a radius of signs flipped: a radius of 5 reads nothing from 12 on, and among 1024 patterns the
attention of radius 15 recalls less than memory from 12 on. The control has half and twice the beta.

Betas: a model of two layers, whose queries and keys have length 1 and whose beta is learned, repeats segments of random
tokens; it begins once below and once above the range of the three radii. The paper's main evidence has such a model of
language. Betas of heads that the task does not move are no evidence. One design was tried, on other seeds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...studies.sparse_distributed_memory import fitted_beta, sparse_distributed_memory

SCALES = "small", "large"
DIM, PATTERNS, RADII = 64, 1024, (5, 11, 15)
FLIPS = (0, 2, 4, 6, 8, 10, 12, 14)
QUERIES = {"small": 500, "large": 5000}
STEPS = {"small": 300, "large": 3000}
SEGMENT, WORDS, WIDTH, HEADS, BATCH = 48, 64, 128, 2, 32
STARTS, MOVED = (4.0, 24.0), 1.3  # betas to begin with; factor by which a beta that matters moves

EXPECTED = (
    "with one pattern at each distance the weights of attention and memory are at most 0.2 apart (total variation) for "
    "each radius, in the mean further apart with half and with twice the beta, and correlate at 0.95 or more; up to "
    "two "
    "thirds of a radius of signs flipped, the shares of patterns that both recall are at most 0.1 apart; of the "
    "learned "
    "betas that move by a factor of 1.3, at least half end within the range of the three radii, also from outside"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Softmax of cosines weighs patterns as the memory does, and betas are learned to where memories work."""
    betas = {radius: fitted_beta(DIM, radius)[0] for radius in RADII}
    line = torch.ones(DIM + 1, DIM, dtype=torch.float64).tril(-1) * -2 + 1  # `distance` signs flipped
    apart: dict[int, dict[float, float]] = {}
    alike, curves = {}, {}
    for radius, beta in betas.items():
        memory = sparse_distributed_memory(line[:1], line, radius=radius)[0]
        ways = {times: (times * beta * line[0] @ line.mT / DIM).softmax(-1) for times in (0.5, 1.0, 2.0)}
        apart[radius] = {times: float((memory - way).abs().sum() / 2) for times, way in ways.items()}
        alike[radius] = float(torch.corrcoef(torch.stack([memory, ways[1.0]]))[0, 1])
        curves[radius] = (memory, ways[1.0])
    recalled = _recall(QUERIES[scale], betas, seed)
    gaps = {
        (radius, flips): abs(a - b)
        for radius in RADII
        for flips, a, b in zip(FLIPS, *recalled[radius])
        if flips <= 2 / 3 * radius
    }
    widest = max(gaps, key=lambda at: gaps[at])

    low, high = min(betas.values()), max(betas.values())
    runs = {start: _learned(start, STEPS[scale], seed) for start in STARTS}
    ends = [(start, end) for start, (_, found) in runs.items() for end in found]
    moved = [end for start, end in ends if max(end / start, start / end) >= MOVED]
    within = [low <= end <= high for end in moved]
    half, own, twice = (sum(a[times] for a in apart.values()) / len(RADII) for times in (0.5, 1.0, 2.0))
    fits = all(a[1.0] <= 0.2 for a in apart.values()) and own < min(half, twice) and min(alike.values()) >= 0.95
    holds = fits and gaps[widest] <= 0.1 and sum(within) >= len(within) / 2
    measured = (
        "weights apart by "
        + ", ".join(f"{a[1.0]:.2f} (radius {r}; half beta {a[0.5]:.2f}, twice {a[2.0]:.2f})" for r, a in apart.items())
        + f", correlation at least {min(alike.values()):.3f}; recall differs by up to {gaps[widest]:.2f} (radius "
        f"{widest[0]}, {widest[1]} flips); learned betas: "
        + ", ".join(f"from {start:g} {'/'.join(f'{end:.1f}' for end in found)}" for start, (_, found) in runs.items())
        + f"; of {len(moved)} that moved {sum(within)} are within {low:.1f} to {high:.1f}"
    )
    worst = max(loss for loss, _ in runs.values())
    premises = [
        Premise("the models repeat segments", "a loss of 0.2 nats or less", f"{worst:.2f}", worst <= 0.2),
        Premise("betas move", "half of them or more", f"{len(moved)} of {len(ends)}", len(moved) >= len(ends) / 2),
    ]

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for i, radius in enumerate(RADII):
            memory, attention = curves[radius]
            left.semilogy(memory[:24], "o", ms=3, color=f"C{i}", label=f"radius {radius}")
            left.semilogy(attention[:24], color=f"C{i}")
            middle.plot(FLIPS, recalled[radius][0], "o-", color=f"C{i}")
            middle.plot(FLIPS, recalled[radius][1], "x--", color=f"C{i}")
        left.set(xlabel="distance", title="Weights (lines: attention)", ylim=(1e-5, 1))
        left.legend()
        middle.set(xlabel="signs flipped", title="Share recalled (dashed: attention)", ylim=(-0.02, 1.02))
        for start, end in ends:
            right.plot([0, 1], [start, end], "o-", color="C3")
        right.axhspan(low, high, color="grey", alpha=0.3, label=f"radius {RADII[-1]} to {RADII[0]}")
        right.set_xticks([0, 1], ["before", "after training"])
        right.set(title="Betas of heads")
        right.legend()

    return Finding(bool(holds), measured, EXPECTED, seed, premises=premises, draw=draw)


def _recall(queries: int, betas: dict[int, float], seed: int) -> dict[int, tuple[list[float], list[float]]]:
    """Share of patterns of which all signs are read, by memory and by attention, for each number of flips."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(2, (PATTERNS, DIM), generator=generator).double() * 2 - 1
    target = torch.randint(PATTERNS, (queries,), generator=generator)
    order = torch.rand(queries, DIM, generator=generator).argsort(1)
    found: dict[int, tuple[list[float], list[float]]] = {radius: ([], []) for radius in betas}
    for radius, beta in betas.items():
        for flips in FLIPS:
            query = torch.where(order < flips, -1, 1) * key[target]
            memory = sparse_distributed_memory(query, key, radius=radius).nan_to_num(0)
            for shares, weights in zip(found[radius], (memory, (beta * query @ key.mT / DIM).softmax(-1))):
                shares.append(float(((weights @ key).sign() == key[target]).all(-1).double().mean()))
    return found


class _Layer(nn.Module):
    """Attention of vectors of length 1, with a beta for each head; no feed-forward part."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.norm, self.parts, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_beta = nn.Parameter(torch.full((HEADS, 1, 1), math.log(beta)))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.parts(self.norm(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query = self.log_beta.exp() * F.normalize(query, dim=-1)
        output = F.scaled_dot_product_attention(query, F.normalize(key, dim=-1), value, is_causal=True, scale=1.0)
        return hidden + self.output(output.transpose(1, 2).flatten(2))


def _learned(beta: float, steps: int, seed: int) -> tuple[float, list[float]]:
    """Loss on the second segment at the end of training, nats a token, and the betas of all heads."""
    torch.manual_seed(seed)
    words, places = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * SEGMENT, WIDTH)
    layers = nn.Sequential(_Layer(beta), _Layer(beta), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))
    betas = [p for name, p in layers.named_parameters() if "log_beta" in name]
    others = [p for name, p in layers.named_parameters() if "log_beta" not in name]
    groups = [{"params": [*others, *words.parameters(), *places.parameters()]}, {"params": betas, "lr": 3e-2}]
    optimizer = torch.optim.AdamW(groups, 3e-3, weight_decay=0.0)
    last: list[float] = []
    for _ in range(steps):
        tokens = torch.randint(WORDS, (BATCH, SEGMENT)).repeat(1, 2)
        logits = layers(words(tokens) + places.weight)[:, SEGMENT:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, SEGMENT + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = [*last, float(loss.detach())][-20:]
    return sum(last) / len(last), [float(b) for one in betas for b in one.detach().exp().flatten()]
