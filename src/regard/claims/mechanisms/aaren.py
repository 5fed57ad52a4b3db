"""Feng et al. (arXiv:2405.13956): attention of one query is a recurrent network, computed by a scan."""

from __future__ import annotations

from typing import Any

import torch

from ...catalog import Finding
from ...mechanisms.aaren import aaren, step, weights
from .._measure import lines, peak_bytes

SCALES = "small", "large"
LENGTHS = {"small": (256, 512, 1024, 2048), "large": (1024, 2048, 4096, 8192)}
HEADS, DIM = 4, 32


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Scan, recurrence and softmax give the same for every prefix; a token more takes the same memory anywhere."""
    expected = (
        "scan, recurrence and softmax of every prefix within 1e-9 of each other in float64, also with scores of a "
        "thousand; memory of one step the same to the byte at every length, where a cache of keys and values grows as "
        "the length"
    )
    torch.manual_seed(seed)
    off = max(_off(100, size) for size in (1.0, 1e3))
    lengths = LENGTHS[scale]
    memory = dict.fromkeys(lengths, 0)
    query = torch.randn(1, HEADS, 1, DIM)
    state = None
    for n in range(1, lengths[-1] + 1):
        token = torch.randn(1, HEADS, 1, DIM)
        if n in memory:
            memory[n] = peak_bytes(lambda token=token, state=state: step(state, query, token, token))
            held = sum(t.numel() * t.element_size() for t in state)
        _, state = step(state, query, token, token)
    cache = [2 * 4 * HEADS * n * DIM for n in lengths]

    def draw(figure: Any) -> None:
        series = {
            "one step of the recurrence": (lengths, list(memory.values())),
            "cache of keys and values": (lengths, cache),
        }
        title = f"Memory for one token more, {HEADS} heads of {DIM}"
        lines(figure.subplots(), series, xlabel="tokens so far", ylabel="bytes", title=title)

    measured = (
        f"off by {off:.1e} at most; a step takes {'/'.join(str(b) for b in memory.values())} bytes after "
        f"{'/'.join(str(n) for n in lengths)} tokens, with a state of {held} bytes beside a cache of "
        f"{cache[0]} to {cache[-1]}"
    )
    return Finding(off <= 1e-9 and len(set(memory.values())) == 1, measured, expected, seed, draw=draw)


def _off(n: int, size: float) -> float:
    query = size * torch.randn(1, HEADS, 1, DIM, dtype=torch.float64)
    key, value = (torch.randn(2, HEADS, n, DIM, dtype=torch.float64) for _ in range(2))
    state, outputs = None, []
    for i in range(n):
        output, state = step(state, query, key[:, :, i : i + 1], value[:, :, i : i + 1])
        outputs.append(output)
    forms = [aaren(query, key, value), torch.cat(outputs, 2), weights(query, key) @ value]
    return max(float((a - b).abs().max()) for a in forms for b in forms)
