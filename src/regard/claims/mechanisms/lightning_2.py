"""Qin et al. (arXiv:2401.04695): tokens a second do not fall as sequences grow."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.lightning_2 import lightning_2
from .._measure import lines, seconds

SCALES = "small", "large"
LENGTHS = (1024, 4096, 16384, 65536)
SOFTMAX = {"small": 4096, "large": 16384}  # the longest that softmax attention is timed at
HEADS, DIM = 2, 64


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Training (both passes) as fast a token at 64k as at 1k, and the same as its dense form."""
    expected = (
        "within 1e-9 of its dense form in float64; forward and backward together, tokens a second from 1k to 64k "
        "within 1.35 times of each other, where softmax attention's fall with length"
    )
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, HEADS, 300, 16, dtype=torch.float64) for _ in range(3))
    dense = lightning_2.spec.weights(query, key, causal=True, mask=None, scale=None) @ value
    off = float((lightning_2(query, key, value) - dense).abs().max())
    ours = {n: n / seconds(_pass(lightning_2, n))[0] for n in LENGTHS}
    soft = {n: n / seconds(_pass(_softmax, n))[0] for n in LENGTHS if n <= SOFTMAX[scale]}
    spread = max(ours.values()) / min(ours.values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        both = {"lightning attention": ours, "softmax attention": soft}
        series = {name: (list(rates), list(rates.values())) for name, rates in both.items()}
        title = f"Forward and backward, {HEADS} heads of {DIM}"
        lines(axes, series, xlabel="tokens", ylabel="tokens a second", title=title)
        axes.set_ylim(min(soft.values()) / 2, max(ours.values()) * 2)

    speeds = ", ".join(f"{rate / 1e3:.0f}k at {n}" for n, rate in ours.items())
    fall = soft[LENGTHS[0]] / min(soft.values())
    measured = (
        f"off by {off:.1e} at most; tokens a second: {speeds}: within {spread:.2f} times; softmax attention's fall "
        f"{fall:.1f} times from {LENGTHS[0]} to {max(soft)}"
    )
    return Finding(off <= 1e-9 and spread <= 1.35 and fall > 1.35, measured, expected, seed, draw=draw)


def _softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _pass(way: Any, n: int) -> Any:
    leaves = [torch.randn(1, HEADS, n, DIM).requires_grad_() for _ in range(3)]
    given = torch.randn(1, HEADS, n, DIM)
    return lambda: torch.autograd.grad(way(*leaves), leaves, given)
