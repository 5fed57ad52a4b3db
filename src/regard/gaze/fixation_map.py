"""Fixations as a map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.loaders import Scanpath
from ..extras import needs
from ._maps import pixels


def fixation_map(
    paths: Sequence[Scanpath], shape: tuple[int, int], *, sigma: float | tuple[float, float]
) -> NDArray[np.float64]:
    """Density of fixations, smoothed by a Gaussian, summing to 1. [row, column]

    shape: rows and columns of the map. sigma: standard deviation in pixels of the map, one degree of visual angle in
    most work, or one along rows and one along columns; 0 leaves the counts as they are. Fixations outside the
    screen do not count.
    ValueError where scipy is missing, or no fixation of a path counts.
    """
    with needs("smoothing", "claims"):
        from scipy.ndimage import gaussian_filter
    counts = np.zeros(shape)
    for path in paths:
        np.add.at(counts, pixels(counts, path), 1)
    smooth = gaussian_filter(counts, sigma, mode="constant") if np.any(sigma) else counts
    return smooth / smooth.sum()
