"""Lin et al. (arXiv:2501.13629): keys can be compressed more than values, and decoding is the faster for it.

The model is the zoo's reader, of 4 key and 4 value heads, converted and trained on; the paper trains from the start.
Speed is judged by a line: what a query over a long cache costs, with as many key as value heads, over the numbers that
the cache holds. An operator that copies keys for each value head would leave it, which is the control. Lengths and
steps were chosen on seed 1.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...catalog import Finding, Premise
from ...mechanisms.diffqkv import convert, diffqkv
from .._measure import mean, seconds
from ._reader import losses_of, prose, train

STEPS, TOKENS = 25, 24576
WAYS: dict[str, dict[str, int]] = {
    "as it is": {},
    "1 key head": {"key_heads": 1},
    "1 value head": {"value_heads": 1},
    "keys of 16": {"key_dim": 16},
}
EVEN, UNEVEN = (4, 8, 16), (4, 16)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Loss of the converted reader before and after training on, bytes of its cache, and seconds of a decoding step."""
    expected = (
        "caches hold what the formula says; with a quarter of the key heads the loss after training on is lower than "
        "with a quarter of the value heads, by two standard errors; a decoding step with 4 key and 16 value heads is "
        "within 15% of the line through equal numbers, and takes at most 85% of 16 and 16; one that copies keys is "
        "further off"
    )
    torch.manual_seed(seed)
    dense, held_out, batches = prose(STEPS, seed=seed)
    before, after, held, formula = {}, {}, {}, {}
    for way, knobs in WAYS.items():
        model = copy.deepcopy(dense)
        if knobs:
            convert(model, **knobs)
        held[way], formula[way] = _cached(model, held_out[:1]), _formula(model.config, **knobs)
        before[way] = losses_of(model, held_out)
        train(model, batches)
        after[way] = losses_of(model, held_out)
    keys, values = (after[f"1 {what} head"] - after["as it is"] for what in ("key", "value"))
    less, narrow = mean(values - keys), mean(after["keys of 16"] - after["as it is"])
    costs, fit = _decoding()
    line = np.polyval(fit.line, _numbers(*UNEVEN))
    off, ratio = costs[UNEVEN] / line - 1, costs[UNEVEN] / costs[16, 16]
    copied = costs["copied"] / line - 1
    holds = held == formula and less.above() and abs(off) <= 0.15 and ratio <= 0.85 and copied > max(abs(off), 0.15)
    premises = [
        Premise("time follows what the cache holds", "0.9 of the variance", f"{fit.share:.2f}", fit.share >= 0.9),
        Premise(
            "heads matter: one value head loses something",
            "0.01 nats",
            f"{float(values.mean()):.3f}",
            float(values.mean()) >= 0.01,
        ),
    ]
    measured = (
        "; ".join(
            f"{way} {float(before[way].mean()):.3f} nats when converted, {float(after[way].mean()):.3f} after "
            f"{STEPS} steps, {held[way]:,} numbers a token"
            for way in WAYS
        )
        + f"; value heads lose more than key heads by {less:.3f}, keys of half the width {narrow:+.3f}; a step with 4 "
        f"and 16 heads {off:+.0%} off the line and {ratio:.2f} of 16 and 16, with copied keys {copied:+.0%} off"
    )
    draw = partial(_draw, losses={way: (float(before[way].mean()), float(after[way].mean())) for way in WAYS})
    return Finding(bool(holds), measured, expected, seed, premises=premises, draw=draw)


def _draw(figure: Any, *, losses: dict[str, tuple[float, float]]) -> None:
    axes = figure.subplots()
    at = np.arange(len(losses))
    for i, when in enumerate(("converted", f"after {STEPS} steps")):
        axes.bar(at + 0.4 * i, [of[i] for of in losses.values()], 0.4, label=when)
    axes.set_xticks(at + 0.2, list(losses))
    axes.set(ylabel="nats a token", ylim=(min(min(of) for of in losses.values()) * 0.9, None))
    axes.legend()


@torch.no_grad()
def _cached(model: Any, texts: Tensor) -> int:
    """Numbers that the model's cache holds for each token."""
    layers = model(texts, use_cache=True).past_key_values.layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers) // texts.numel()


def _formula(config: Any, *, key_heads: int = 4, value_heads: int = 4, key_dim: int = 32) -> int:
    return config.num_hidden_layers * (key_heads * key_dim + value_heads * 32)


def _numbers(keys: int, values: int) -> int:
    return 64 * (keys + values) * TOKENS


class _Fit:
    def __init__(self, x: list[float], y: list[float]) -> None:
        self.line = np.polyfit(x, y, 1)
        self.share = 1 - float(np.var(np.polyval(self.line, x) - y) / np.var(y))


@torch.no_grad()
def _decoding() -> tuple[dict[Any, float], _Fit]:
    """Seconds of one query of 32 heads over a cache, by numbers of key and value heads."""
    query = torch.randn(1, 32, 1, 64)
    cases: dict[Any, Any] = {}
    for keys, values in [*((n, n) for n in EVEN), UNEVEN]:
        key, value = torch.randn(1, keys, TOKENS, 64), torch.randn(1, values, TOKENS, 64)
        cases[keys, values] = partial(diffqkv, query, key, value)
    key, value = torch.randn(1, 4, TOKENS, 64), torch.randn(1, 16, TOKENS, 64)
    cases["copied"] = lambda: diffqkv(query, key.repeat_interleave(4, 1), value)
    costs = dict(zip(cases, seconds(*cases.values(), least=7), strict=True))
    return costs, _Fit([_numbers(n, n) for n in EVEN], [costs[n, n] for n in EVEN])
