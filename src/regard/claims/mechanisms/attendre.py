"""Yang and Hua (arXiv:2401.04881): queries that wait see what follows them, and use decides what a memory keeps.

Both are planted. A needle stands at a distance after its query, as a key that no other query is like. Facts come early
in a stream of noise and are asked for again and again, so often that an entry which is not asked for outlives no more
than a few rounds; the control facts are asked for early only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...mechanisms.attendre import Attendre, attendre
from .._measure import exponent

SCALES = "small", "large"
LENGTHS = {"small": (1024, 4096, 16384), "large": (4096, 16384, 65536)}
CHUNK, WAIT, MEMORY, DIM = 16, 128, 256, 32
AHEAD = (16, 64, 112, 160, 256)
FACTS, KEPT, ASKED = 4, 64, 2  # facts, the memory that keeps them, and every how manieth token asks for one
STREAM = {"small": 2048, "large": 8192}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Bands, memory, mass on needles ahead with and without waiting, and facts that each policy still finds."""
    expected = (
        "first in, first out, within 1e-9 of a banded map in float64, and bytes held the same at every length; a "
        f"needle up to {WAIT - CHUNK} tokens ahead gets 0.9 or more of its query's weight where queries wait {WAIT}, "
        f"one further than {WAIT} ahead, or any where none waits, less than 0.01; facts asked for again are found 90% "
        "of the time by least recent and least frequent use, at most 10% first in, first out, and those asked for "
        "early only are lost by least recent use (20% at most)"
    )
    torch.manual_seed(seed)
    off = _off_band()
    held = {n: _bytes(n) for n in LENGTHS[scale]}
    grows = exponent(list(held), list(held.values()))
    mass = {wait: {ahead: _mass(ahead, wait) for ahead in AHEAD} for wait in (WAIT, 0)}
    rates = {policy: _found(policy, STREAM[scale]) for policy in ("fifo", "lra", "lfa")}
    near = min(m for ahead, m in mass[WAIT].items() if ahead <= WAIT - CHUNK)
    far = max(m for ahead, m in mass[WAIT].items() if ahead > WAIT)
    none = max(m for ahead, m in mass[0].items() if ahead >= CHUNK)
    again = {policy: of[0] for policy, of in rates.items()}
    premises = [
        Premise(
            "facts are asked for more often than an idle entry survives",
            f"every {KEPT // 2} tokens or fewer",
            f"every {FACTS * ASKED}",
            KEPT // 2 >= FACTS * ASKED,
        ),
        Premise(
            "an answered question leans on its fact",
            "0.9 of the weight or more",
            f"{rates['lra'][2]:.2f}",
            rates["lra"][2] >= 0.9,
        ),
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for wait, of in mass.items():
            left.plot(list(of), list(of.values()), "o-", label=f"waiting {wait}")
        left.set(xlabel="tokens from query to needle", ylabel="weight on the needle", ylim=(-0.05, 1.05))
        left.legend()
        for i, kind in enumerate(("asked for again", "asked for early only")):
            right.bar([k + 0.4 * i for k in range(len(rates))], [of[i] for of in rates.values()], 0.4, label=kind)
        right.set_xticks([k + 0.2 for k in range(len(rates))], list(rates))
        right.set(ylabel="facts found", ylim=(0, 1.2))
        right.legend()

    measured = (
        f"off a banded map by {off:.1e} at most; bytes grow with a power of length of {grows:.2f}; weight on the "
        f"needle {near:.3f} at least up to {WAIT - CHUNK} ahead, {far:.4f} beyond {WAIT}, {none:.4f} without waiting; "
        f"facts asked for again found {', '.join(f'{of[0]:.0%} by {policy}' for policy, of in rates.items())}; early "
        f"only {', '.join(f'{of[1]:.0%} by {policy}' for policy, of in rates.items())}"
    )
    holds = off <= 1e-9 and grows <= 0.01 and near >= 0.9 and far < 0.01 and none < 0.01
    holds = holds and min(again["lra"], again["lfa"]) >= 0.9 and again["fifo"] <= 0.1 and rates["lra"][1] <= 0.2
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _off_band() -> float:
    query, key, value = (torch.randn(1, 2, 200, 8, dtype=torch.float64) for _ in range(3))
    found = attendre(query, key, value, chunk=4, memory=32, wait=12)
    at = torch.arange(200)
    end = ((at // 4 + 4) * 4).clamp_max(200)[:, None]  # of its own chunk, and three more
    band = (at < end) & (at >= end - 32)
    right = (query @ key.mT / 8**0.5).masked_fill(~band, -torch.inf).softmax(-1) @ value
    return float((found - right).abs().max())


def _bytes(n: int) -> int:
    """What is held after this many tokens, the most of all steps."""
    stream, most = Attendre(chunk=CHUNK, memory=MEMORY, wait=WAIT), 0
    for _ in range(n // CHUNK):
        part = torch.randn(1, 1, CHUNK, DIM)
        stream.step(part, part, part)
        most = max(most, stream.bytes())
    return most


def _mass(ahead: int, wait: int) -> float:
    """Weight on a needle that many tokens after its query, which is the first of a chunk."""
    n, at = 1024, 512
    query, key = torch.randn(2, 1, 1, n, DIM)
    needle = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
    query[..., at, :], key[..., at + ahead, :] = 20 * needle, 6 * needle
    value = torch.zeros(1, 1, n, 1)
    value[..., at + ahead, :] = 1.0
    return float(attendre(query, key, value, chunk=CHUNK, memory=MEMORY, wait=wait)[..., at, 0])


def _found(policy: str, n: int) -> tuple[float, float, float]:
    """Of late questions, the share that finds its fact, asked for again, and early only; then the weight on one."""
    names = torch.linalg.qr(torch.randn(DIM, DIM)).Q[: 2 * FACTS]
    stream, hits = Attendre(chunk=1, memory=KEPT, policy=policy), ([], [])
    weights: list[float] = []
    for i in range(n):
        key, asked = 0.5 * torch.randn(DIM), None
        value = torch.zeros(2 * FACTS)
        if i < 2 * FACTS:
            key, value[i] = 6 * names[i], 1.0
        turn = i // ASKED
        if i % ASKED == 0 and i >= 2 * FACTS:
            asked = turn % FACTS + (FACTS if i < 6 * KEPT and turn // FACTS % 2 else 0)
            asked = asked if i < n - FACTS * ASKED else turn % FACTS
        if i >= n - FACTS:  # at the very end, the facts that nobody asked for in between
            asked = FACTS + i - (n - FACTS)
        query = 0.5 * torch.randn(DIM) if asked is None else 12 * names[asked]
        got = _given(stream, query, key, value)
        if asked is not None and i >= n // 2:
            share = float(got[asked])
            hits[asked >= FACTS].append(float(share > 0.5))
            weights += [share] if share > 0.5 else []
    return tuple(sum(of) / max(len(of), 1) for of in (*hits, weights))  # type: ignore[return-value]


def _given(stream: Attendre, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return stream.step(*(t[None, None, None] for t in (query, key, value)))[0].flatten()
