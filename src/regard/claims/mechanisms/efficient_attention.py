"""Shen et al. (arXiv:1812.01243): the same result as its dense form, at a cost linear in the number of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.efficient_attention import efficient_attention
from .._measure import exponent, lines, peak_bytes, seconds

SCALES = "small", "large"
SIDES = {"small": (32, 48, 64, 96, 128), "large": (64, 96, 128, 192, 256, 384)}  # of square feature maps
DENSE = 64  # the largest side that dense attention is timed at


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Equal to softmax(query) softmax(key)^T value; time and memory follow the number of pixels."""
    expected = (
        "within 1e-9 of its dense form in float64; time grows as pixels to the power of 1.2 at most, memory of 1.05 at "
        "most, where dot-product attention's time grows with a power of 1.7 or more"
    )
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 2, 400, 16, dtype=torch.float64) for _ in range(3))
    dense = (query.softmax(-1) @ key.softmax(-2).mT) @ value
    off = float((efficient_attention(query, key, value) - dense).abs().max())
    pixels = [side**2 for side in SIDES[scale]]
    maps = [torch.randn(1, 4, n, 32) for n in pixels]
    ours = [seconds(lambda x=x: efficient_attention(x, x, x), least=5)[0] for x in maps]
    memory = [peak_bytes(lambda x=x: efficient_attention(x, x, x)) for x in maps]
    short = [x for x in maps if x.shape[2] <= DENSE**2]
    theirs = [seconds(lambda x=x: F.scaled_dot_product_attention(x, x, x))[0] for x in short]
    powers = [exponent(pixels, ours), exponent(pixels, memory), exponent(pixels[: len(short)], theirs)]

    def draw(figure: Any) -> None:
        series = {"efficient attention": (pixels, [t * 1e3 for t in ours])}
        series["dot-product attention"] = pixels[: len(short)], [t * 1e3 for t in theirs]
        labels = {"xlabel": "pixels of the feature map", "ylabel": "milliseconds"}
        lines(figure.subplots(), series, title="Forward pass, 4 heads of 32", **labels)

    measured = (
        f"off by {off:.1e} at most; from {pixels[0]} to {pixels[-1]} pixels, time grows as their power of "
        f"{powers[0]:.2f} and memory of {powers[1]:.2f}; dot-product attention's time of {powers[2]:.2f}"
    )
    holds = off <= 1e-9 and powers[0] <= 1.2 and powers[1] <= 1.05 and powers[2] >= 1.7
    return Finding(holds, measured, expected, seed, draw=draw)
