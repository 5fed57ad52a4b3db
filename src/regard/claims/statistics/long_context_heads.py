"""Planted heads whose distant keys are Gaussian: are those that reach back foreseen, at what cost? And the reader's.

Donhauser et al., Unveiling Simplicities of Attention (arXiv:2502.09647). 256 planted heads, each with a mean and a
covariance of its own, look over 4096 keys of which the last 512, and 16 sinks, are local; local keys lie off along one
direction, along which queries look more or less. Moments are those of distant keys of another draw. Controls: means
without covariances; the moments of another head; keys whose distribution has heavy tails. Strengths of queries were
chosen on other seeds so that a fifth of the heads are needy, as in the paper's models a tenth to a fifth are.

The reader is reported beside: it copies segments of 96 random tokens with a window of 32, and nearly all of its heads
are needy there, so that nothing can be spared.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from ... import zoo
from ...call import Call, Site
from ...catalog import Finding, Premise
from ...data.prompts.copying import FILLER
from ...statistics.long_context_heads import (
    THRESHOLD,
    Judged,
    distant_mass,
    foreseen_mass,
    judge,
    key_moments,
    long_context_heads,
    moments_of,
)
from .._measure import Mean, mean

SCALES = "small", "large"
SEGMENT, COPIES, N_SINK, WINDOW = 96, 6, 16, 32  # of the reader's texts
KNOBS = {"n_sink": N_SINK, "window": WINDOW}
TEXTS = {"small": 8, "large": 32}
SITE = Site("planted", "language_model", 0, causal=True)

HEADS, KEYS, NEAR, DIM = {"small": 256, "large": 1024}, 4096, 512, 16  # of planted heads; NEAR keys are local
STRENGTH, SHIFT = (2.0, 2.0), 5.0  # of queries at most, towards local keys and elsewhere; of local keys

EXPECTED = (
    "of planted heads at least 90% of the needy ones are called (recall) and of those called at least 90% are needy "
    "(precision), and at least half of the visits to keys are spared; means alone recall less than 85%; more heads are "
    "told rightly than with the moments of another head, and than where keys have heavy tails, by two standard errors"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Needy heads are foreseen from local keys; the others can do without distant ones."""
    plants = _planted(HEADS[scale], seed)
    sure, blind, other = (plants[name] for name in ("foreseen", "means alone", "another head"))
    tails = _planted(HEADS[scale], seed, heavy=True)["foreseen"]
    more, heavier = mean(_right(sure) - _right(other)), _apart(_right(sure), _right(tails))
    judged = sure.judged
    holds = min(judged.recall, judged.precision) >= 0.9 and more.above() and heavier.above()
    holds = holds and judged.saved >= 0.5 and blind.judged.recall < 0.85

    model, tokenizer = zoo.load("reader")
    texts, others = (_texts(tokenizer, TEXTS[scale], (seed, part)) for part in (0, 1))
    moments = key_moments(model, {"input_ids": others}, n_sink=N_SINK)
    found = long_context_heads(model, {"input_ids": texts}, moments=moments, **KNOBS)
    reader = judge(found, dim=model.config.head_dim)
    measured = (
        f"planted heads: {judged.needy:.0%} needy, recall {judged.recall:.2f}, precision {judged.precision:.2f}, "
        f"{judged.saved:.0%} of the "
        f"visits spared; means alone: recall {blind.judged.recall:.2f}; told rightly {mean(_right(sure)):.0%}, with "
        f"another head's moments less by {more:.0%}, with heavy tails by {heavier:.0%}. The reader: {reader.needy:.0%} "
        "of "
        f"heads and queries needy, recall {reader.recall:.2f}, precision {reader.precision:.2f}, {reader.saved:.0%} "
        "spared"
    )
    needy = Premise(
        "some heads are needy, most are not", "a tenth to a half", f"{judged.needy:.0%}", 0.1 <= judged.needy <= 0.5
    )
    return Finding(bool(holds), measured, EXPECTED, seed, premises=[needy], draw=partial(_draw, found, plants))


class _Foreseen(NamedTuple):
    truth: np.ndarray  # mass on distant keys [head]
    seen: np.ndarray  # as foreseen
    judged: Judged


def _planted(heads: int, seed: int, *, heavy: bool = False) -> dict[str, _Foreseen]:
    """One query each at the end; the keys' distribution is Gaussian, or Student's with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mix, middle = normal(heads, DIM, DIM) / DIM**0.5, 0.3 * normal(heads, 1, DIM)
    aside, elsewhere = (F.normalize(normal(heads, DIM), dim=-1) for _ in range(2))
    one, two = (most * torch.rand(heads, 1, generator=generator) for most in STRENGTH)
    query = (one * aside + two * elsewhere)[None, :, None]
    keys = []
    for _ in range(2):  # moments come from the second
        drawn = normal(heads, KEYS, DIM)
        if heavy:
            drawn = drawn / (normal(heads, KEYS, 3).square().mean(-1, keepdim=True)).sqrt() / 3**0.5
        keys.append(middle + drawn @ mix)
        keys[-1][:, -NEAR:] += SHIFT * aside[:, None]
    call = Call(SITE, query, keys[0][None], keys[0][None], 1.0, query_start=KEYS - 1)
    distant = keys[1][None, :, :-NEAR]
    moments = moments_of(Call(SITE, query, distant, distant, 1.0, query_start=KEYS - NEAR - 1), n_sink=N_SINK)
    known = {
        "foreseen": moments,
        "means alone": moments._replace(covariance=torch.zeros_like(moments.covariance)),
        "another head": moments._replace(mean=moments.mean.roll(1, 1), covariance=moments.covariance.roll(1, 1)),
    }
    knobs = {"n_sink": N_SINK, "window": NEAR}
    truth = distant_mass(call, **knobs)
    assert truth is not None  # it is causal self-attention
    found = {}
    for name, of in known.items():
        seen = foreseen_mass(call, moments={(SITE.stack, SITE.layer): of}, **knobs)
        assert seen is not None
        dims = ("batch", "head", "query")
        both = {"distant": (dims, truth.numpy()), "foreseen": (dims, seen.numpy())}
        table = xr.Dataset(both, coords={"query": [KEYS - 1]}, attrs=knobs)
        found[name] = _Foreseen(truth.numpy().ravel(), seen.numpy().ravel(), judge(table, dim=DIM))
    return found


def _right(found: _Foreseen) -> np.ndarray:
    """Which heads are told rightly. [head]"""
    return ((found.truth > 1 - THRESHOLD) == (found.seen > 1 - THRESHOLD)).astype(float)


def _apart(one: np.ndarray, other: np.ndarray) -> Mean:
    """The difference of means of other heads."""
    first, second = mean(one), mean(other)
    return Mean(first.value - second.value, math.hypot(first.error, second.error))


def _texts(tokenizer: Any, n: int, seed: tuple[int, int]) -> Tensor:
    """A segment over and over, and plain sentences, half of each. [text, token]"""
    rng = np.random.default_rng(seed)
    length = SEGMENT * COPIES
    repeated = [np.tile(rng.integers(2, len(tokenizer), SEGMENT), COPIES).tolist() for _ in range(n // 2)]
    sentences = ("".join(rng.choice(FILLER, length // 8)) for _ in range(n - n // 2))
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in sentences]
    return torch.tensor([[tokenizer.bos_token_id, *body] for body in repeated + plain])


def _draw(found: xr.Dataset, plants: dict[str, _Foreseen], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    late = found.isel(query=slice(N_SINK + WINDOW, None))
    truth, seen = late["distant"].values.ravel(), late["foreseen"].values.ravel()
    counted = np.histogram2d(seen, truth, bins=40, range=((0, 1), (0, 1)))[0]
    right.imshow(np.log1p(counted), origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="Greys")
    for axes, (name, plant) in zip((left, middle), plants.items()):
        axes.plot(plant.truth, plant.seen, "o", markersize=4)
        axes.set(title=f"Planted heads: {name}")
    right.set(title="The reader")
    for axes in (left, middle, right):
        for draw in (axes.axvline, axes.axhline):
            draw(1 - THRESHOLD, color="red", linewidth=0.8)
        axes.set(xlabel="mass on distant keys", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    left.set(ylabel="foreseen from local keys")
