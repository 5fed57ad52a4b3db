"""Attention as a read of Kanerva's sparse distributed memory.

Bricken and Pehlevan, Attention Approximates Sparse Distributed Memory (arXiv:2111.05498), and the authors' repository.
Addresses are vectors of n signs. A pattern is written to all neurons within a Hamming radius of it, a query reads all
neurons within that radius of it: a pattern weighs as much as both balls have in common (section 1, equation 2), here
with a neuron at each of the 2^n addresses. That is nearly exponential in the cosine of query and pattern, so that
attention over vectors of length 1, softmax(beta * cosine), weighs nearly the same (section 2).

Reference radii follow appendix B.5, with the critical distance taken from the expected read; for the heads of GPT-2
they come out as the paper's. The betas that the authors' code fits to the intersection are radius / (radius - 1) times
those of a least-squares line, which are given here: it divides a covariance over n - 1 by a variance over n. For radii
5, 11 and 15 in 64 dimensions the paper has 35.5, 15.9 and 10.1 where the line has 28.4, 14.4 and 9.4.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sparse_distributed_memory(query: Tensor, key: Tensor, *, radius: int) -> Tensor:
    """Weight of each pattern in a read, 0 to 1, rows sum to 1; NaN where no pattern shares a neuron with the query.

    query [..., query, dim] and key [..., key, dim] hold signs, -1 or 1. [..., query, key]

    >>> import torch
    >>> key = torch.tensor([[1.0, 1, 1, 1], [-1, 1, 1, 1], [-1, -1, -1, -1]])
    >>> sparse_distributed_memory(key[:1], key, radius=1)  # balls of 5 addresses that have 5, 2 and 0 in common
    tensor([[0.7143, 0.2857, 0.0000]])
    """
    for name, given in (("query", query), ("key", key)):
        if not (given.abs() == 1).all():
            raise ValueError(f"addresses are vectors of signs, -1 or 1; {name} holds other numbers: take its sign()")
    dim = query.shape[-1]
    distance = ((dim - query @ key.mT) / 2).round().long()
    weights = torch.from_numpy(circle_intersection(dim, radius)).to(query.device)[distance]
    return (weights / weights.sum(-1, keepdim=True)).to(query.dtype)


@cache
def _intersection(dim: int, radius: int) -> tuple[float, ...]:
    shares = []
    for distance in range(dim + 1):
        # Of the coordinates where the centres differ, `there` are flipped; of the others, `here`.
        common = sum(
            math.comb(distance, there) * math.comb(dim - distance, here)
            for there in range(distance + 1)
            for here in range(radius - max(there, distance - there) + 1)
        )
        shares.append(common / 2**dim)
    return tuple(shares)


def circle_intersection(dim: int, radius: int) -> NDArray[np.float64]:
    """Share of all 2^dim addresses within `radius` of both of two that are 0, 1, ... dim apart. [distance]

    >>> circle_intersection(4, 1) * 16
    array([5., 2., 2., 0., 0.])
    """
    if not 0 <= radius <= dim:
        raise ValueError(f"a Hamming radius in {dim} dimensions lies between 0 and {dim}, got {radius}")
    return np.array(_intersection(dim, radius))


def fitted_beta(dim: int, radius: int) -> tuple[float, float]:
    """Slope of the logarithm of the intersection over the cosine, below `radius` apart, and the r squared of the fit.

    >>> round(fitted_beta(64, 11)[0], 1)
    14.4
    """
    if radius < 2:
        raise ValueError(f"a line needs two points or more, at distances below radius={radius}")
    cosine = 1 - 2 * np.arange(radius) / dim
    logarithm = np.log(circle_intersection(dim, radius)[:radius])
    return float(np.polyfit(cosine, logarithm, 1)[0]), float(np.corrcoef(cosine, logarithm)[0, 1] ** 2)


def signal_to_noise(dim: int, radius: int, patterns: int) -> NDArray[np.float64]:
    """Mean over standard deviation of what a read gives for one coordinate, by the query's distance. [distance]

    Patterns are random, and there is a neuron at each address.
    """
    neurons = 2.0**dim
    signal = neurons * circle_intersection(dim, radius)
    crosstalk = neurons * (signal[0] / neurons) ** 2  # neurons that two random patterns share, in the mean
    return signal / np.sqrt(signal + (patterns - 1) * (crosstalk + crosstalk**2))


def reference_radii(dim: int, patterns: int, *, recall: float = 0.5) -> dict[str, int]:
    """Hamming radii best for memory (most patterns stored), snr, and critical (most noise in the query).

    recall: probability that a read without noise gives the whole pattern, which the first asks for. The critical
    distance is the largest, up to half of the dimensions, from which a read brings a query nearer to its pattern; of
    radii that have it alike, as with few patterns, the one with the clearest read there counts. ValueError for fewer
    than 4 dimensions or 2 patterns.

    >>> reference_radii(64, 1024)  # a head of GPT-2 and its context: section 2 of the paper
    {'memory': 5, 'snr': 11, 'critical': 15}
    """
    if dim < 4 or patterns < 2:
        raise ValueError(f"a memory has 4 dimensions and 2 patterns or more, got {dim=}, {patterns=}")
    radii, normal, neurons = range(1, dim // 2), NormalDist(), 2.0**dim
    z = normal.inv_cdf(recall ** (1 / dim))

    def capacity(radius: int) -> float:
        signal = neurons * circle_intersection(dim, radius)[0]
        crosstalk = signal**2 / neurons
        return ((signal / z) ** 2 - signal) / (crosstalk + crosstalk**2)

    def critical(radius: int) -> tuple[int, float]:
        noise = signal_to_noise(dim, radius, patterns)
        nearer = [dim * normal.cdf(-noise[apart]) < apart for apart in range(1, dim // 2 + 1)]
        far = nearer.index(False) if False in nearer else len(nearer)
        return far, noise[far]

    return {
        "memory": max(radii, key=capacity),
        "snr": max(radii, key=lambda radius: signal_to_noise(dim, radius, patterns)[0]),
        "critical": max(radii, key=critical),
    }
