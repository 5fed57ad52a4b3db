"""What comparisons of people share: intervals over people, and labels that are permuted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def interval(
    estimate: Callable[[Floats], Floats], people: int, resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """The middle 95% of an estimate over draws of as many people, with replacement.

    estimate: takes how often each person was drawn [person]. NaN of a draw, where nothing remained, does not count.
    """
    if not resamples:
        nothing = np.full_like(estimate(np.ones(people)), np.nan)
        return nothing, nothing
    counts = rng.multinomial(people, [1 / people] * people, size=resamples).astype(np.float64)
    drawn = np.stack([estimate(of) for of in counts])
    with np.errstate(all="ignore"):
        low, high = (np.full(drawn.shape[1:], np.nan) for _ in range(2))
        some = np.isfinite(drawn).any(0)
        low[some], high[some] = np.nanquantile(drawn[:, some], [0.025, 0.975], axis=0)
    return low, high


def p_value(own: Floats, chance: Floats) -> Floats:
    """Share of permutations, the one that was seen among them, that are as large; NaN where the own value is. [...]

    chance: [permutation, ...]
    """
    at_least = (chance >= own - 1e-12).sum(0)
    return np.where(np.isnan(own), np.nan, (1 + at_least) / (1 + len(chance)))
