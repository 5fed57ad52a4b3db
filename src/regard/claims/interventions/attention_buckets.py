"""The wave of one rotary base and those of others; and how well the zoo's reader finds a word, by its distance.

On Chen et al., Fortify the Shortest Stave in Attention (arXiv:2312.04455). The wave is the paper's, over its distances
and bases. A trough is a point lower than all within `WINDOW` of it; how high another wave stands there is counted from
its own lowest to its own highest point within the same window.

The reader reads random tokens; the last two of them occur once before, and what followed is to be said next. It was not
trained on such a thing, but copies, the better the nearer. The paper's reason is that each base has troughs of its own,
which merged runs fill. So the profile over distances is dense, the nearest left out, where no base helps; troughs are
distances at which the reader is worse than at nearer and at farther ones. Control: the largest base alone, which
reaches farther and fills no troughs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding, Premise
from ...interventions.attention_buckets import attention_buckets, rebased, wave
from .._measure import Mean, mean

SCALES = "small", "large"
BASES = (10000, 17500, 18000, 19000, 20000, 25000)
DISTANCES, WINDOW = (1000, 4090), 100
LENGTH, KEY, NEAREST, STEP = 128, 2, 6, 8  # tokens
LARGEST = 2.5  # times the model's own base
PROMPTS = {"small": 32, "large": 300}  # for each distance

EXPECTED = (
    "nine in ten troughs of the wave of base 10000 lie where some other base's wave is in its upper half; merged runs "
    "give the answer a higher log-probability than the model at its own troughs, and than the largest base alone, by "
    "two standard errors each; over all distances they are right at least as often as the model"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Troughs of one base are covered by others, and retrieval depends less on where a passage stands."""
    model, _ = zoo.load("reader")
    heights = coverage()
    covered = float((heights >= 0.5).float().mean())
    distances = list(range(NEAREST, LENGTH - KEY - 1, STEP))
    # troughs are found on half of the prompts, and judged on the others
    choosing, judging = (_profile(model, distances, PROMPTS[scale] // 2, seed + 500 * part) for part in (1, 2))
    at = troughs(choosing["own"][0])
    (own, right), (merged, right_merged), (largest, right_largest) = judging.values()
    there = Premise(
        "retrieval has troughs: distances at which the reader is worse than at nearer and at farther ones, by two "
        "standard errors each",
        "one or more",
        ", ".join(str(distances[i]) for i in at) or "none",
        bool(at),
    )
    chosen = at or range(len(distances))
    gain, over = (mean((merged - other)[list(chosen)]) for other in (own, largest))
    holds = covered >= 0.9 and gain.above() and over.above() and bool(right_merged.mean() >= right.mean())
    everywhere, by_base = mean(merged - own), mean(largest - own)
    third = len(distances) // 3
    measured = (
        f"{covered:.0%} of {len(heights)} troughs of the wave are covered. Over {len(distances)} distances of "
        f"{NEAREST} to {distances[-1]} tokens, the answer gains {everywhere:+.2f} nats by merged runs, {by_base:+.2f} "
        f"by the largest base alone; in the nearest third {mean((merged - own)[:third]):+.2f} and "
        f"{mean((largest - own)[:third]):+.2f}, in the farthest {mean((merged - own)[-third:]):+.2f} and "
        f"{mean((largest - own)[-third:]):+.2f}; right {right.mean():.0%}, merged {right_merged.mean():.0%}, largest "
        f"base {right_largest.mean():.0%}."
        + (f" At its troughs merged runs gain {gain:+.2f}, over the largest base {over:+.2f}." if at else "")
    )
    profile = {name: found[0].mean(1).tolist() for name, found in judging.items()}
    return Finding(holds, measured, EXPECTED, seed, premises=[there], draw=partial(_draw, heights, distances, profile))


def troughs(found: Tensor) -> list[int]:
    """Places of a profile [place, prompt] that are lower than some place before and some place after, both surely."""
    means = found.mean(1)
    low = []
    for i in range(1, len(found) - 1):
        higher: list[Mean] = [
            mean(found[j] - found[i]) for j in (int(means[:i].argmax()), i + 1 + int(means[i + 1 :].argmax()))
        ]
        if all(rise.above() for rise in higher):
            low.append(i)
    return low


def coverage() -> Tensor:
    """Of the bases' waves but the first, the height of the highest at each trough of the first, 0 to 1. [trough]"""
    distance = torch.arange(DISTANCES[0] - WINDOW, DISTANCES[1] + WINDOW + 1)
    waves = torch.stack([wave(distance, base=base) for base in BASES])
    near = waves.unfold(1, 2 * WINDOW + 1, 1)  # [base, distance, window]
    middle, low, high = near[..., WINDOW], near.amin(-1), near.amax(-1)
    heights = (middle - low) / (high - low)
    return heights[1:, heights[0] == 0].amax(0)


@torch.inference_mode()
def _profile(model: nn.Module, distances: list[int], n: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-probability of the answer, and whether it is said, by each way. Both [distance, prompt]"""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"own": [], "merged": [], "largest base": []}
    for distance in distances:
        ids, answer = _prompts(model, n, distance, seed)
        scores = model(ids).logits[:, -1].float()
        merged = attention_buckets(model, {"input_ids": ids})(ids, scores)
        with rebased(model, LARGEST):
            largest = model(ids).logits[:, -1].float()
        for kept, some in zip(found.values(), (scores, merged, largest)):
            told = some.log_softmax(-1).gather(1, answer[:, None])[:, 0]
            kept.append((told, (some.argmax(-1) == answer).float()))
    return {way: tuple(map(torch.stack, zip(*kept))) for way, kept in found.items()}  # type: ignore[misc]


def _prompts(model: nn.Module, n: int, distance: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens that end on ones that occur so many tokens before; and what followed there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(model.config.vocab_size - 300, generator=generator)[:LENGTH] for _ in range(n)])
    ids = ids + 300  # past special tokens and single bytes
    ids[:, 0] = model.config.bos_token_id
    at = LENGTH - KEY - distance
    ids[:, -KEY:] = ids[:, at : at + KEY]
    return ids, ids[:, at + KEY].clone()


def _draw(heights: Tensor, distances: list[int], profile: dict[str, list[float]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    distance = torch.arange(1500, 2000)
    waves = torch.stack([wave(distance, base=base) for base in BASES])
    left.plot(distance, waves[0], color="black", linewidth=1, label="base 10000")
    left.plot(distance, waves[1:].amax(0), linewidth=1, label="highest of the others")
    left.set(xlabel="distance", ylabel="score of the wave")
    left.set_title(f"{float((heights >= 0.5).float().mean()):.0%} of {len(heights)} troughs covered", fontsize=10)
    left.legend(frameon=False)
    for name, found in profile.items():
        right.plot(distances, found, ".-", label=name)
    right.set(xlabel="distance, tokens", ylabel="log-probability of the answer, nats")
    right.legend(frameon=False)
