"""Wu et al. (arXiv:2202.06258): linear attention that does not degenerate to uniform maps.

Two measures of maps, rows made to sum to 1: the entropy of random inputs, and the most weight that one key of many can
be given, by following the gradient in queries and keys. Beside it stand its ablation without competition and gate,
linear attention with elu + 1, and softmax. Time is that of both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.flow_attention import flow_attention
from .._measure import exponent, lines, mean, seconds

SCALES = "small", "large"
LENGTHS = {"small": (1024, 4096, 16384), "large": (4096, 16384, 65536)}
KEYS, DIM, SIZES = 256, 32, (1.0, 3.0, 6.0)
STEPS, RUNS = 100, 3


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Entropy of rows and the most that a key can get, by flow, its ablation, elu + 1 and softmax; time over length."""
    expected = (
        "time grows with a power of length of 1.2 at most, causal and not; entropy of rows below that of linear "
        "attention with elu + 1 at every size of inputs, by two standard errors; a key can be given 1.5 times as much "
        "as by the ablation or more, and as much as by elu + 1"
    )
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "flow": _flow,
        "without competition": lambda q, k: _rows(q.sigmoid() @ k.sigmoid().mT),
        "elu + 1": lambda q, k: _rows((F.elu(q) + 1) @ (F.elu(k) + 1).mT),
        "softmax": lambda q, k: (q @ k.mT / DIM**0.5).softmax(-1),
    }
    torch.manual_seed(seed)
    entropy: dict[str, list[Any]] = {way: [] for way in ways}
    for size in SIZES:
        query, key = (size * torch.randn(1, 8, KEYS, DIM) for _ in range(2))
        for way, of in entropy.items():
            of.append(torch.special.entr(ways[way](query, key)).sum(-1).mean((0, 2)))
    lower = [mean(elu - own) for own, elu in zip(entropy["flow"], entropy["elu + 1"])]
    most = {way: mean([_most(run, RUNS * seed + i) for i in range(RUNS)]) for way, run in ways.items()}
    powers = [_power(causal, LENGTHS[scale]) for causal in (False, True)]
    sharp = most["softmax"].value
    premises = [Premise("inputs can be found that single out a key", "0.9 by softmax", f"{sharp:.2f}", sharp >= 0.9)]

    def draw(figure: Any) -> None:
        series = {way: (SIZES, [float(e.mean()) for e in of]) for way, of in entropy.items()}
        axes = figure.subplots()
        lines(axes, series, xlabel="size of inputs", ylabel="entropy of rows, nats")
        axes.set_xticks(SIZES, [f"{size:g}" for size in SIZES])

    said = "; ".join(f"{way} {', '.join(f'{e.mean():.2f}' for e in of)}" for way, of in entropy.items())
    measured = (
        f"entropy of rows at sizes {', '.join(f'{s:g}' for s in SIZES)}, of {torch.tensor(KEYS).log():.2f} nats: "
        f"{said}; the most weight on one key {', '.join(f'{m.value:.3f} ({way})' for way, m in most.items())}, even "
        f"{1 / KEYS:.3f}; time grows with a power of length of {powers[0]:.2f}, causal {powers[1]:.2f}"
    )
    own = most["flow"].value
    holds = max(powers) <= 1.2 and all(m.above() for m in lower)
    holds = holds and own >= 1.5 * most["without competition"].value and own >= most["elu + 1"].value
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _rows(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _flow(query: Tensor, key: Tensor) -> Tensor:
    """By values that name their keys."""
    return _rows(flow_attention.spec.weights(query, key, causal=False, mask=None, scale=None))  # type: ignore[attr-defined]


def _most(way: Callable[[Tensor, Tensor], Tensor], seed: int) -> float:
    """Weight that the first key gets of all queries at most, from random ones on."""
    torch.manual_seed(seed)
    query, key = (torch.randn(1, 1, n, DIM).requires_grad_() for n in (KEYS, KEYS))
    optimizer = torch.optim.Adam([query, key], 0.2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (-way(query, key)[..., 0].mean().log()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(way(query, key)[..., 0].mean())


def _power(causal: bool, lengths: tuple[int, ...]) -> float:
    times = []
    for n in lengths:
        x = torch.randn(1, 1, n, 32)
        times.append(seconds(lambda x=x: flow_attention(x, x, x, causal=causal))[0])
    return exponent(lengths, times)
