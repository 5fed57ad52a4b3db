"""Gao et al. (arXiv:2410.13276): gates learn from a model's own attention which key blocks hold its weight.

The model is the zoo's reader, on sequences that repeat random tokens: what it looks at there lies far away, in a place
that content alone tells. Gates of all layers but the first are trained; all ways keep three of ten blocks in each row.
Controls: the first block and the latest, and gates as they begin. Layers and rate were settled on seed 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...mechanisms.seerattention import SeerAttention, choose, convert, distil, seerattention, truth
from .._measure import Mean, mean

SCALES = "small", "large"
SEGMENT, BLOCK, WIDTH, LAYERS = 80, 16, 32, (1, 2, 3, 4, 5)  # the reader copies segments of up to 85 tokens
STEPS = {"small": 60, "large": 500}
BATCH, JUDGED, RATE = 4, {"small": 32, "large": 200}, 3e-3
RATIO = 0.53  # of pairs of blocks in the past: 3 of 10 in each row
PLACES = slice(
    6 * BLOCK, 8 * BLOCK
)  # judged: what they repeat is neither in the first block nor near; later ones see all


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Loss on what repeats, with three of ten blocks: by gates, by the true maxima, by place."""
    expected = (
        "with three of ten blocks a row in five of six layers, chosen by trained gates, the loss on what repeats is at "
        "most 0.1 nats above that of full attention, and 0.2 nats or more below that with the first and the latest "
        "blocks, by two standard errors, and below that with gates as they begin"
    )
    torch.manual_seed(seed)
    loaded, tokenizer = zoo.load("reader")
    model: Any = loaded
    base = model.config.rope_parameters["rope_theta"]
    convert(model, threshold=None, ratio=RATIO, base=base, block=BLOCK, width=WIDTH)
    modules = dict(enumerate(m for m in model.modules() if isinstance(m, SeerAttention)))
    draw_from = tokenizer.vocab_size
    batches = [{"input_ids": _repeated(BATCH, draw_from, tokenizer)} for _ in range(STEPS[scale])]
    torch.manual_seed(seed + 10_000)
    held_out = _repeated(JUDGED[scale], draw_from, tokenizer)
    ways = {"full": _full, "true maxima": _true, "first and latest": _by_place, "untrained gates": None}
    losses = {name: _losses(model, modules, held_out, way) for name, way in ways.items()}
    learned = distil(model, batches, rate=RATE)
    losses["gates"] = _losses(model, modules, held_out, None)
    over = {name: mean(each - losses["full"]) for name, each in losses.items() if name != "full"}
    place, blind = (mean(losses[name] - losses["gates"]) for name in ("first and latest", "untrained gates"))
    holds = over["gates"].value <= 0.1 and place.value >= 0.2 and place.above() and blind.above()
    possible = Premise(
        "so few blocks can be enough: those with the largest weights",
        "at most 0.05 nats above full attention",
        f"{over['true maxima']:.3f} nats",
        over["true maxima"].value <= 0.05,
    )
    measured = (
        f"full attention {mean(losses['full']).value:.3f} nats on what repeats; above it "
        f"{', '.join(f'{name} {value:.3f}' for name, value in over.items())}; the gates' loss fell from "
        f"{learned[0]:.4f} to {learned[-1]:.4f}"
    )
    return Finding(holds, measured, expected, seed, premises=[possible], draw=partial(_draw, over=over))


def _draw(figure: Any, *, over: dict[str, Mean]) -> None:
    axes = figure.subplots()
    axes.bar([name.replace(" ", "\n") for name in over], [value.value for value in over.values()])
    axes.set(ylabel="nats above full attention", title="What repeats, three of ten blocks")


def _repeated(count: int, size: int, tokenizer: Any) -> Tensor:
    segment = torch.randint(2, size, (count, SEGMENT))
    tokens = torch.cat([segment, segment], 1)
    tokens[:, 0] = tokenizer.bos_token_id
    return tokens


def _count(n_block: int) -> int:
    return max(1, int((1 - (1 - RATIO) ** 0.5) * n_block))


def _full(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    return seerattention(query, key, value, block=BLOCK, **how)


def _true(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    right = truth(query, key, block=BLOCK, mask=how.get("mask"), scale=how.get("scale"))
    return seerattention(query, key, value, block=BLOCK, blocks=choose(right, ratio=RATIO), **how)


def _by_place(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    n = -(-key.shape[2] // BLOCK)
    at = torch.arange(n)
    near = (at == 0) | (at[:, None] - at < _count(n) - 1)
    return seerattention(query, key, value, block=BLOCK, blocks=near[None, None] & (at[:, None] >= at), **how)


@torch.no_grad()
def _losses(model: Any, modules: dict[int, SeerAttention], tokens: Tensor, way: Any) -> Tensor:
    """Nats a token of the judged places, of each sequence; `way` in `LAYERS`, by the gates where that is None."""
    for i, module in modules.items():
        own = _full if i not in LAYERS else way
        if own is not None:
            module.forward = own  # type: ignore[method-assign]
    try:
        logits = torch.cat([model(part).logits for part in tokens.split(16)])
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)
    losses = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return losses[:, PLACES].mean(-1)
