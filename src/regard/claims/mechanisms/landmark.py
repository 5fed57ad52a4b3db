"""Mohtashami and Jaggi (arXiv:2305.16300): blocks fetched by their landmarks, far beyond the length of training.

A model is trained on 72 tokens with landmarks after every 8 (no positions: causality is all it has), and judged on 576,
with the two blocks of 64 that score best. Controls: two blocks at random, none, that is the end of the sequence alone,
and a model trained by plain softmax whose blocks its landmarks' scores choose. Steps were chosen on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.landmark import choice, fetched, insert, landmark
from ...mechanisms.memory_efficient import memory_efficient
from .. import _passkey as passkey
from .._measure import Mean, mean

SCALES = "small", "large"
BLOCK, TOP = 8, 2
MARK = passkey.NOISE + passkey.DIGITS
STEPS = {"small": 400, "large": 2000}
JUDGED = {"small": 100, "large": 1000}
LONG = 512  # tokens beside landmarks


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Digits named far outside the length of training, with 2 of 64 blocks."""
    expected = (
        "at 8 times the length of training, with 2 of 64 blocks, 90% of digits or more are named, and with blocks at "
        "random, the end of the sequence alone, and plain softmax with blocks chosen by its landmarks' scores, at "
        "least 20 points and two standard errors less (chance: 10%)"
    )
    steps, count = STEPS[scale], JUDGED[scale]
    ways = {"landmark": _grouped(None), "plain": partial(memory_efficient, causal=True)}
    models = {
        name: passkey.trained(way, layers=2, before=0, steps=steps, seed=seed, symbols=1, prompts=_short)
        for name, way in ways.items()
    }
    torch.manual_seed(seed + 10_000)
    short, long = _prompts(10 * count, passkey.TOKENS), _prompts(count, LONG)
    known = _right(models["landmark"], _grouped(None), *short)
    end = long[0][:, -passkey.TOKENS - passkey.TOKENS // BLOCK :]
    right = {
        "2 blocks": _right(models["landmark"], _grouped(TOP), *long),
        "2 at random": _right(models["landmark"], _at_random, *long),
        "the end alone": _right(models["landmark"], _grouped(None), end, long[1]),
        "plain softmax, 2 blocks": _right(models["plain"], _plain, *long),
    }
    shares = {name: mean(each) for name, each in right.items()}
    behind = {name: mean(right["2 blocks"] - each) for name, each in right.items() if name != "2 blocks"}
    holds = shares["2 blocks"].value >= 0.9 and all(gap.value >= 0.2 and gap.above() for gap in behind.values())
    learned = Premise(
        "the model learns the task at the length of training",
        "95% named or more",
        f"{mean(known):.1%}",
        mean(known).value >= 0.95,
    )
    measured = f"{int(LONG / passkey.TOKENS)} times the length of training, named: " + ", ".join(
        f"{name} {share:.1%}" for name, share in shares.items()
    )
    return Finding(holds, measured, expected, seed, premises=[learned], draw=partial(_draw, shares=shares))


def _draw(figure: Any, *, shares: dict[str, Mean]) -> None:
    axes = figure.subplots()
    axes.bar([name.replace(", ", ",\n") for name in shares], [share.value for share in shares.values()])
    axes.axhline(1 / passkey.DIGITS, color="grey", linestyle=":")
    axes.set(ylim=(0, 1), ylabel="share named", title=f"{LONG} tokens, trained on {passkey.TOKENS}")


def _prompts(count: int, n: int) -> tuple[Tensor, Tensor]:
    """Noise with one digit that stands anywhere, landmarks, and one token that asks."""
    tokens, digit = torch.randint(0, passkey.NOISE, (count, n)), torch.randint(0, passkey.DIGITS, (count,))
    tokens[torch.arange(count), torch.randint(0, n - BLOCK, (count,))] = passkey.NOISE + digit
    marked = insert(tokens, MARK, block=BLOCK)
    return torch.cat([marked, marked.new_zeros(count, 1)], 1), digit


def _short(count: int, before: int) -> tuple[Tensor, Tensor]:
    return _prompts(count, passkey.TOKENS)


def _grouped(top: int | None) -> passkey.Attention:
    return partial(landmark, block=BLOCK, top=top)


def _marks(key: Tensor) -> Tensor:
    return ((torch.arange(key.shape[2]) + 1) % (BLOCK + 1) == 0).expand(len(key), -1)


def _at_random(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    marks, scale = _marks(key), query.shape[-1] ** -0.5
    there = torch.ones_like(marks)
    chosen = choice(torch.randn_like(query), torch.randn_like(key), there, marks, top=TOP, scale=scale)
    return fetched(query, key, value, there, marks, chosen, scale)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over the own block, and over those whose landmarks score best."""
    marks, at = _marks(key), torch.arange(key.shape[2])
    chosen = choice(query, key, torch.ones_like(marks), marks, top=TOP, scale=1.0)
    block = at // (BLOCK + 1)
    seen = (block[:, None] == block) | (chosen[..., None, :] == block[:, None]).any(-1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen & (at[:, None] >= at))


@torch.no_grad()
def _right(model: torch.nn.Module, way: passkey.Attention, tokens: Tensor, digit: Tensor) -> Tensor:
    for layer in model.children():
        if isinstance(layer, passkey.Layer):
            layer.attention = way
    answers = torch.cat([model(part)[:, -1].argmax(-1) for part in tokens.split(50)])
    return (answers == digit).float()
