"""Lu et al. (arXiv:2502.13189): a few blocks for each query do what full attention does, at the cost of these."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ...catalog import Finding
from ...mechanisms.memory_efficient import memory_efficient
from ...mechanisms.moba import moba
from .. import _passkey as passkey
from .._measure import seconds

SCALES = "small", "large"
TOPS = (2, 4, 8)
LENGTH, BLOCK = {"small": 4096, "large": 16384}, 256
STEPS = {"small": 200, "large": 2000}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The loss of the same model with three of eight blocks and with full attention; time against blocks taken."""
    expected = (
        "retrieving from anywhere in a sequence, a loss at most 0.05 nats above that of full attention, also when the "
        "model trained with blocks runs with full attention (cannot tell where full attention stays above half of "
        "chance); time with 8 blocks over that with 2 within 1.25 times of what the operations say"
    )
    sparse, full = partial(moba, block=passkey.TOKENS // 8, top=3), partial(memory_efficient, causal=True)
    before = passkey.TOKENS - 1
    models = [passkey.trained(way, layers=2, before=before, steps=STEPS[scale], seed=seed) for way in (sparse, full)]
    losses = {"blocks": passkey.judged(models[0], before=before)[0]}
    for layer in models[0]:
        if isinstance(layer, passkey.Layer):
            layer.attention = full
    losses["blocks, then full"] = passkey.judged(models[0], before=before)[0]
    losses["full"] = passkey.judged(models[1], before=before)[0]
    n = LENGTH[scale]
    query, key = torch.randn(2, 1, 2, n, 64)
    times = [seconds(lambda top=top: moba(query, key, key, block=BLOCK, top=top))[0] for top in TOPS]
    says = [moba.spec.cost(n, n, 64, block=BLOCK, top=top).operations for top in TOPS]  # type: ignore[attr-defined]
    grew, should = times[-1] / times[0], says[-1] / says[0]
    cost = should / 1.25 <= grew <= should * 1.25
    loss = max(losses["blocks"], losses["blocks, then full"]) <= losses["full"] + 0.05
    told = losses["full"] <= math.log(passkey.DIGITS) / 2
    holds = False if not cost or (told and not loss) else True if told else None

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.bar(list(losses), list(losses.values()))
        left.set(ylabel="loss, nats", title="Retrieval after training")
        right.plot(TOPS, [t * 1e3 for t in times], "o-", label="measured")
        right.plot(TOPS, [times[0] * o / says[0] * 1e3 for o in says], "o:", label="as the operations say")
        right.set(xlabel="blocks a query", ylabel="milliseconds", title=f"Forward pass, {n} tokens", ylim=(0, None))
        right.legend()

    measured = (
        f"losses {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}; time grows {grew:.2f} times "
        f"from {TOPS[0]} to {TOPS[-1]} blocks, operations {should:.2f} times"
    )
    return Finding(holds, measured, expected, seed, draw=draw)
