"""Rabe and Staats (arXiv:2112.05682): exact attention, and memory that does not grow with the square of length."""

from __future__ import annotations

from typing import Any

import torch

from ...catalog import Finding
from ...mechanisms.memory_efficient import memory_efficient
from .._measure import lines, peak_bytes

SCALES = "small", "large"
LENGTHS = {"small": (512, 1024, 2048, 4096), "large": (2048, 4096, 8192, 16384, 32768)}
CHUNKS = {"query_chunk": 128, "key_chunk": 256}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Dense attention's output and gradients; memory beside inputs, output and gradients stays as it is."""
    expected = (
        "output and gradients within 1e-9 of dense attention in float64; memory beside inputs, output and gradients at "
        "the longest sequence at most 1.25 times that at the shortest, forward and backward, where dense attention's "
        "grows as the square"
    )
    torch.manual_seed(seed)
    leaves, given = _inputs(600, torch.float64)
    found, right = (_results(way, leaves, given) for way in (_chunked, _dense))
    off = max(float((a - b).detach().abs().max()) for a, b in zip(found, right, strict=True))
    lengths = LENGTHS[scale]
    ways = {"chunked": _chunked, "dense": _dense}
    extra = {name: [_extra(way, n) for n in lengths] for name, way in ways.items()}
    growth = {name: bytes_[-1] / bytes_[0] for name, bytes_ in extra.items()}
    times = lengths[-1] / lengths[0]

    def draw(figure: Any) -> None:
        series = {name: (lengths, [b / 1e6 for b in bytes_]) for name, bytes_ in extra.items()}
        labels = {"ylabel": "MB beside inputs, output and gradients", "title": "Memory of attention, both passes"}
        lines(figure.subplots(), series, xlabel="tokens", **labels)

    measured = (
        f"off by {off:.1e} at most; from {lengths[0]} to {lengths[-1]} tokens ({times:.0f} times), memory beside "
        f"inputs, output and gradients grows {growth['chunked']:.2f} times, dense attention's "
        f"{growth['dense']:.0f} times"
    )
    holds = off <= 1e-9 and growth["chunked"] <= 1.25 and growth["dense"] >= times**2 / 2
    return Finding(holds, measured, expected, seed, draw=draw)


def _chunked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return memory_efficient(query, key, value, causal=True, **CHUNKS)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


def _inputs(n: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.randn(1, 1, n, 16, dtype=dtype).requires_grad_() for _ in range(3)], torch.randn(
        1, 1, n, 16, dtype=dtype
    )


def _results(way: Any, leaves: list[torch.Tensor], given: torch.Tensor) -> list[torch.Tensor]:
    output = way(*leaves)
    return [output, *torch.autograd.grad(output, leaves, given)]


def _extra(way: Any, n: int) -> int:
    leaves, given = _inputs(n, torch.float32)
    return peak_bytes(lambda: _results(way, leaves, given)) - 4 * given.nbytes  # output and three gradients
