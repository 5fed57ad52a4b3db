"""Qin et al. (arXiv:2401.04695): tokens a second do not fall as sequences grow.

What it computes is compared with the recurrence written out token by token, with slopes by their own formula; the
control is the recurrence that forgets nothing. Times come from this machine, and are the least of several.
"""

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
        "within 1e-9 of the recurrence written out, in float64, and 0.1 or more from one that forgets nothing; forward "
        "and backward together, tokens a second at 64k at least three quarters of those at 1k, where softmax "
        "attention's fall below half by 4k"
    )
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, HEADS, 300, 16, dtype=torch.float64) for _ in range(3))
    forgets = torch.exp(-(2.0 ** (-8 * torch.arange(1, HEADS + 1, dtype=torch.float64) / HEADS)))
    given = lightning_2(query, key, value)
    off, control = (
        float((given - _recurrence(query, key, value, kept)).abs().max()) for kept in (forgets, torch.ones(HEADS))
    )
    ours = {n: n / seconds(_pass(lightning_2, n))[0] for n in LENGTHS}
    soft = {n: n / seconds(_pass(_softmax, n))[0] for n in LENGTHS if n <= SOFTMAX[scale]}
    steady, fall = ours[LENGTHS[-1]] / ours[LENGTHS[0]], soft[LENGTHS[0]] / min(soft.values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        both = {"lightning attention": ours, "softmax attention": soft}
        series = {name: (list(rates), list(rates.values())) for name, rates in both.items()}
        title = f"Forward and backward, {HEADS} heads of {DIM}"
        lines(axes, series, xlabel="tokens", ylabel="tokens a second", title=title)
        axes.set_ylim(min(soft.values()) / 2, max(ours.values()) * 2)

    speeds = ", ".join(f"{rate / 1e3:.0f}k at {n}" for n, rate in ours.items())
    measured = (
        f"off by {off:.1e} at most, by {control:.2f} from what forgets nothing; tokens a second: {speeds}, at the "
        f"longest {steady:.2f} of those at the shortest; softmax attention's fall "
        f"{fall:.1f} times from {LENGTHS[0]} to {max(soft)}"
    )
    holds = off <= 1e-9 and control >= 0.1 and steady >= 0.75 and fall >= 2
    return Finding(holds, measured, expected, seed, draw=draw)


def _recurrence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """A state that keeps this share of itself, [head], from each token to the next."""
    state, outputs = torch.zeros(1), []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2)):
        state = kept[:, None, None] * state + k[..., None] * v[..., None, :]
        outputs.append((q[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 2)


def _softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _pass(way: Any, n: int) -> Any:
    leaves = [torch.randn(1, HEADS, n, DIM).requires_grad_() for _ in range(3)]
    given = torch.randn(1, HEADS, n, DIM)
    return lambda: torch.autograd.grad(way(*leaves), leaves, given)
