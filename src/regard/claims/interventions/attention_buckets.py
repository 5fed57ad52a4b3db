"""The wave of one rotary base and those of others; and how well the zoo's reader finds a word, by where it stands.

The wave is the paper's, over its distances and bases. A trough is a point lower than all within `WINDOW` of it; how
high another wave stands there is counted from its own lowest to its own highest point within the same window.

The reader reads random tokens; the last two of them occur once before, and what followed is to be said next. It was not
trained on such a thing, but copies, the better the nearer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import zoo
from ...catalog import Finding
from ...interventions.attention_buckets import attention_buckets, wave

BASES = (10000, 17500, 18000, 19000, 20000, 25000)
DISTANCES, WINDOW = (1000, 4090), 100
LENGTH, KEY, PLACES = 128, 2, 9
PROMPTS = {"small": 24, "large": 200}  # for each place

EXPECTED = (
    "nine in ten troughs of the wave of base 10000 lie where some other base's wave is in its upper half; merged runs "
    "give the answer a higher log-probability at the model's own worst place, by at least 0.1 nats, and are right at "
    "least as often over all places"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Troughs of one base are covered by others, and retrieval depends less on where a passage stands."""
    model, _ = zoo.load("reader")
    heights = coverage()
    covered = float((heights >= 0.5).float().mean())
    own, merged, found = [], [], {"own": [], "merged": []}
    for place in range(PLACES):
        ids, answer = _prompts(model, PROMPTS[scale], place / (PLACES - 1), seed)
        with torch.inference_mode():
            scores = model(ids).logits[:, -1].float()
            both = {"own": scores, "merged": attention_buckets(model, {"input_ids": ids})(ids, scores)}
        for way, kept in (("own", own), ("merged", merged)):
            kept.append(float(both[way].log_softmax(-1).gather(1, answer[:, None]).mean()))
            found[way].append(float((both[way].argmax(-1) == answer).float().mean()))
    worst = min(range(PLACES), key=own.__getitem__)
    gain = merged[worst] - own[worst]
    right = {way: sum(shares) / PLACES for way, shares in found.items()}
    holds = covered >= 0.9 and gain >= 0.1 and right["merged"] >= right["own"]
    measured = (
        f"{covered:.0%} of {len(heights)} troughs are covered; at its worst place the reader gives the answer "
        f"{own[worst]:.2f} nats and the merged runs {merged[worst]:.2f}, at the farthest "
        f"{own[0]:.2f} and {merged[0]:.2f}; right {right['own']:.0%} alone and "
        f"{right['merged']:.0%} merged, over {PLACES} places of {PROMPTS[scale]} prompts."
    )
    return Finding(holds, measured, EXPECTED, seed, draw=partial(_draw, heights, own, merged))


def coverage() -> Tensor:
    """Of the bases' waves but the first, the height of the highest at each trough of the first, 0 to 1. [trough]"""
    distance = torch.arange(DISTANCES[0] - WINDOW, DISTANCES[1] + WINDOW + 1)
    waves = torch.stack([wave(distance, base=base) for base in BASES])
    near = waves.unfold(1, 2 * WINDOW + 1, 1)  # [base, distance, window]
    middle, low, high = near[..., WINDOW], near.amin(-1), near.amax(-1)
    heights = (middle - low) / (high - low)
    return heights[1:, heights[0] == 0].amax(0)


def _prompts(model: nn.Module, n: int, place: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens that end on ones that occur before, at a place from the start (0) to the end (1); what followed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(model.config.vocab_size - 300, generator=generator)[:LENGTH] for _ in range(n)])
    ids = ids + 300  # past special tokens and single bytes
    ids[:, 0] = model.config.bos_token_id
    at = 1 + round(place * (LENGTH - 2 * KEY - 2))
    ids[:, -KEY:] = ids[:, at : at + KEY]
    return ids, ids[:, at + KEY].clone()


def _draw(heights: Tensor, own: list[float], merged: list[float], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    distance = torch.arange(1500, 2000)
    waves = torch.stack([wave(distance, base=base) for base in BASES])
    left.plot(distance, waves[0], color="black", linewidth=1, label="base 10000")
    left.plot(distance, waves[1:].amax(0), linewidth=1, label="highest of the others")
    left.set(xlabel="distance", ylabel="score of the wave")
    left.set_title(f"{float((heights >= 0.5).float().mean()):.0%} of {len(heights)} troughs covered", fontsize=10)
    left.legend(frameon=False)
    places = [place / (PLACES - 1) for place in range(PLACES)]
    right.plot(places, own, "o-", label="reader alone")
    right.plot(places, merged, "o-", label="merged")
    right.set(xlabel="place of the passage, start to end", ylabel="log-probability of the answer, nats")
    right.legend(frameon=False)
