"""Shi et al. (arXiv:2508.02124): a few keys chosen by their values do what all keys do, where values can tell.

The digit of the task can be told from its value before anyone asks. Static controls see as many keys: a window, and
every eighth key with the own one. Beside these, the number is left out of the scores, so that nothing trains the
choice: values can learn to suit what is never trained, so this decides nothing. Steps were chosen on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.dynamic_mask import DynamicMask, dynamic_mask, kept
from ...mechanisms.memory_efficient import memory_efficient
from .. import _passkey as passkey
from .._measure import mean, seconds

SCALES = "small", "large"
WINDOW, HEADS, DIM = 8, 2, 32
STEPS = {"small": 250, "large": 1500}
BEFORE = passkey.TOKENS - 1 - 2 * (WINDOW - 1)  # farther than two layers of the window reach
LENGTH, KEPT = 4096, 256


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Digits named with 8 of 64 keys, chosen by value or by place, and time at 4096 tokens."""
    expected = (
        "with 8 of 64 keys at most 3 points below full attention, and 50 points or more above a window and every "
        "eighth key, by two standard errors; the digit is among the keys kept by a head of a layer in 95% of sequences "
        "or more; keeping 256 of 4096 keys takes at most 0.35 of the time of full attention"
    )
    torch.manual_seed(seed)
    dynamic = DynamicMask(DIM // HEADS, HEADS, window=WINDOW)
    nn.init.normal_(dynamic.A, std=0.02)
    ways: dict[str, passkey.Attention] = {
        "full": partial(memory_efficient, causal=True),
        "dynamic mask": dynamic,
        "window": partial(_static, near=WINDOW),
        "every eighth": partial(_static, near=1),
        "choice not trained": _Chooses(dynamic),
    }
    right, models = {}, {}
    for name, way in ways.items():
        models[name] = passkey.trained(
            way, layers=2, before=BEFORE, steps=STEPS[scale], seed=seed, dim=DIM, heads=HEADS
        )
        right[name] = passkey.judged(models[name], before=BEFORE, seed=seed)[1]
    shares = {name: mean(each) for name, each in right.items()}
    held = mean(_held(models["dynamic mask"], seed=seed))
    query, key, value = torch.randn(3, 1, 4, LENGTH, 64)
    bias = torch.randn(1, 4, LENGTH)
    own, all_of_them = seconds(
        lambda: dynamic_mask(query, key, value, bias=bias, window=KEPT),
        lambda: memory_efficient(query, key, value, causal=True),
        least=2,
    )
    gaps = [mean(right["dynamic mask"] - right[name]) for name in ("window", "every eighth")]
    near = shares["dynamic mask"].value >= shares["full"].value - 0.03
    holds = near and all(gap.value >= 0.5 and gap.above() for gap in gaps) and held.value >= 0.95
    holds = holds and own <= 0.35 * all_of_them
    learned = Premise(
        "full attention learns the task", "90% named or more", f"{shares['full']:.1%}", shares["full"].value >= 0.9
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar([name.replace(" ", "\n") for name in shares], [share.value for share in shares.values()])
        axes.set(ylim=(0, 1), ylabel="share named", title=f"Digit of {passkey.TOKENS} tokens, {WINDOW} keys a query")

    measured = (
        f"digit named: {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}; it is kept in {held:.1%} "
        f"of sequences; with {KEPT} of {LENGTH} keys {own / all_of_them:.2f} of the time of full attention"
    )
    return Finding(holds, measured, expected, seed, premises=[learned], draw=draw)


class _Chooses(nn.Module):
    """Keys are chosen by the number, which is not added, so that nothing trains it."""

    def __init__(self, dynamic: DynamicMask) -> None:
        super().__init__()
        self.dynamic = dynamic

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = self.dynamic.bias(value).detach()
        seen = kept(bias, query.shape[2], causal=True, mask=None, window=WINDOW)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def _static(query: Tensor, key: Tensor, value: Tensor, *, near: int) -> Tensor:
    """The nearest keys; beside the own one alone, every eighth."""
    at = torch.arange(query.shape[2])
    seen = at[:, None] - at < near
    if near == 1:
        seen = seen | (at % (passkey.TOKENS // WINDOW) == 0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen & (at[:, None] >= at))


@torch.no_grad()
def _held(model: nn.Sequential, *, seed: int) -> Tensor:
    """Whether the last query keeps the digit, in a head of a layer. [sequence]"""
    torch.manual_seed(seed + 10_000)
    tokens, _ = passkey.noise(1000, BEFORE)
    place = (tokens >= passkey.NOISE).long().argmax(-1)
    found = torch.zeros(len(tokens), dtype=torch.bool)
    hidden: Tensor = tokens
    for layer in model:
        if isinstance(layer, passkey.Layer):
            dynamic = layer.attention
            assert isinstance(dynamic, DynamicMask)
            value = layer.parts(layer.norms[0](hidden)).unflatten(-1, (3, HEADS, -1))[..., 2, :, :].transpose(1, 2)
            best = dynamic.bias(value).topk(WINDOW, dim=-1).indices
            found |= (best == place[:, None, None]).flatten(1).any(-1)
        hidden = layer(hidden)
    return found.float()
