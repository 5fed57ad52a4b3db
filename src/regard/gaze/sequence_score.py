"""Sequence score.

Yang et al., Predicting Goal-directed Human Attention Using Inverse Reinforcement Learning (arXiv:2005.14310), section
4.1: fixations get the letter of the cluster that they belong to, and the strings are aligned; equal letters count 1,
gaps cost nothing. As in the authors' code, the sum is divided by the length of the longer string. The alignment is
thus the longest common subsequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.loaders import Scanpath
from ..extras import needs
from ._align import Letters, best, letters


def sequence_score(a: Letters, b: Letters, *, centres: NDArray[np.floating] | None = None) -> float:
    """Share of the longer sequence that both have in the same order, 0 to 1; higher is more alike.

    a, b: two sequences of letters, such as the objects looked at; or two scanpaths, whose letters are the nearest of
    `centres` [cluster, 2], as from `clusters`.

    ValueError for an empty path, or scanpaths without centres.

    >>> sequence_score("ABCBDAB", "BDCABA")  # BCBA
    0.5714285714285714
    """
    if isinstance(a, Scanpath) and isinstance(b, Scanpath):
        if centres is None:
            raise ValueError("scanpaths need the centres of clusters: sequence_score(a, b, centres=clusters(paths))")
        a, b = (np.linalg.norm(p.places[:, None] - centres, axis=-1).argmin(-1) for p in (a, b))
    one, two = letters(a, b, 1, 1)
    return best((one[:, None] == two).astype(float), gap=0.0) / max(len(one), len(two))


def clusters(paths: Sequence[Scanpath], *, bandwidth: float | None = None, binned: bool = False) -> NDArray[np.float64]:
    """Centres of the clusters that fixations on one picture form, by mean shift. [cluster, 2]

    bandwidth: in pixels, scikit-learn's estimate unless told otherwise. binned: whether the search starts at the cells
    of a grid that hold fixations rather than at each, which is faster. ValueError where scikit-learn is missing.
    """
    with needs("clusters", "claims"):
        from sklearn.cluster import MeanShift
    shift = MeanShift(bandwidth=bandwidth, bin_seeding=binned)
    return shift.fit(np.concatenate([path.places for path in paths])).cluster_centers_
