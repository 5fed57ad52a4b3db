"""Ren et al. (arXiv:2107.05768): every earlier key is reached, at less than the cost of all pairs.

The control keeps what is near, a query's own segment, and leaves the summaries out: two layers of segments never pass
a digit from one segment to another. Bars of time were settled on seed 1, where 300 steps named
every digit; there are 200, for the time that they take.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.combiner import FORMS, combiner
from ...mechanisms.memory_efficient import memory_efficient
from .. import _passkey as passkey
from .._measure import beside, grown, mean

SCALES = "small", "large"
LENGTHS = {"small": (2048, 4096, 8192, 16384), "large": (2048, 4096, 8192, 16384, 32768)}
STEPS = {"small": 200, "large": 2000}
SEGMENT = 8
BEFORE = passkey.TOKENS // 2


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Reach by the Jacobian, digits named after training, and how time grows."""
    expected = (
        "of 64 positions each reaches all earlier ones, itself, and no later one, in all three forms; the fixed and "
        "the logsparse form name a digit of the first half in 90% of sequences or more, a query's own segment alone, "
        "the control, in 20% or fewer (chance: 10%); time grows as length to the power of 1.65 at most in the fixed "
        "form, 1.4 at most in the logsparse one, and of 1.7 or more in full attention"
    )
    torch.manual_seed(seed)
    past = torch.ones(64, 64, dtype=torch.bool).tril()
    query, key = torch.randn(2, 1, 1, 64, 8, dtype=torch.float64)
    reached = {form: torch.equal(combiner(query, key, _eye(query), form=form)[0, 0] > 0, past) for form in FORMS}
    ways = {
        "full": partial(memory_efficient, causal=True),
        "fixed": partial(combiner, segment=SEGMENT),
        "logsparse": partial(combiner, form="logsparse"),
        "own segment": _segment,
    }
    right = {}
    for name, way in ways.items():
        model = passkey.trained(way, layers=2, before=BEFORE, steps=STEPS[scale], seed=seed)
        right[name] = mean(passkey.judged(model, before=BEFORE, seed=seed)[1])
    lengths = LENGTHS[scale]
    times, powers = grown({"fixed": combiner, "logsparse": ways["logsparse"], "full": ways["full"]}, lengths)
    holds = all(reached.values()) and min(right["fixed"].value, right["logsparse"].value) >= 0.9
    holds = holds and right["own segment"].value <= 0.2
    holds = holds and powers["fixed"] <= 1.65 and powers["logsparse"] <= 1.4 and powers["full"] >= 1.7
    learned = Premise(
        "full attention learns the task", "90% named or more", f"{right['full']:.1%}", right["full"].value >= 0.9
    )

    def draw(figure: Any) -> None:
        beside(figure, right, lengths, times, ylabel="share named", title="Digit of the first half")

    measured = (
        f"all earlier positions and no later one reached in {sum(reached.values())} of {len(FORMS)} forms; digit "
        f"named: {', '.join(f'{name} {share:.1%}' for name, share in right.items())}; time grows with powers of "
        f"{', '.join(f'{power:.2f} ({name})' for name, power in powers.items())}"
    )
    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


def _eye(query: Tensor) -> Tensor:
    return torch.eye(query.shape[2], dtype=query.dtype)[None, None]


def _segment(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A query's own segment up to itself."""
    query, key, value = (t.unflatten(2, (-1, SEGMENT)) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).flatten(2, 3)
