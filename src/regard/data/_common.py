"""What scenes, prompts and loaders share."""

import operator
from collections.abc import Iterable

import numpy as np


class DataError(ValueError):
    """A file is not what it should be. The message says which, where in it, and what was expected."""


def generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Random numbers that depend on seed and index only, so that item i is the same whatever was drawn before it.

    `stream` keeps different uses of one item apart. Philox counts instead of mixing a state: a generator in the middle
    costs no more than one at the start.
    """
    seed, index = operator.index(seed), operator.index(index)  # NumPy's integers would overflow in what follows
    if not (0 <= seed < 1 << 64 and index >= 0):
        raise ValueError(f"seed and index count from 0, a seed below 2**64; got seed={seed}, index={index}")
    return np.random.Generator(np.random.Philox(key=(stream << 64) | seed, counter=index << 64))


def known(what: str, value: str, among: Iterable[str]) -> None:
    """Raise ValueError unless `value` is `among` those that exist."""
    if value not in among:
        raise ValueError(f"there is no {what} {value!r}; choose from {', '.join(among)}")
