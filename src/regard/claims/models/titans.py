"""Behrouz et al. (arXiv:2501.00663): a memory that learns while it reads recalls what the window no longer holds.

Associative recall: four words, each a pair of key and value, stand early in noise; at the end four keys ask for their
values. One layer, whose window of attention ends long before the pairs. Controls: the window alone, and the memory with
a step of 0, which learns nothing. The pairs are words of their own, so that one layer suffices: with key and
value apart, attention over everything had not learned to bind them in 600 steps. A second attempt is this one; settings
were chosen on seed 100.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...models.titans import titans
from .._measure import Mean, mean

SCALES = "small", "large"
KEYS = VALUES = 8
PAIRS, NOISE, EARLY = 4, 16, 12  # pairs stand among the first so many tokens
TOKENS, WINDOW, DIM, BATCH, RATE, HELD = 64, 16, 32, 32, 5e-3, 300
LENGTHS = TOKENS, 2 * TOKENS, 4 * TOKENS
STEPS, LAYERS = {"small": 200, "large": 2000}, {"small": 1, "large": 2}
MEMORY = {"depth": 1, "residual": False, "chunk": 8, "batch": 16}
CHANCE = 1 / VALUES
WAYS: dict[str, dict[str, Any]] = {
    "gate": {"join": "gate"},
    "context": {"join": "context"},
    "layer": {"join": "layer"},
    "gate, step 0": {"join": "gate", "memory": {**MEMORY, "max_step": 0.0}},
    "window alone": {"join": None},
    "all tokens": {"join": None, "window": TOKENS},
}
JOINS, BLIND = ("gate", "context", "layer"), ("gate, step 0", "window alone")


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """What each way to join memory and attention recalls, at the length of training and beyond."""
    expected = (
        f"of values {TOKENS - EARLY - PAIRS} tokens or more back, with a window of {WINDOW}, the gate recalls 60% or "
        f"more (at large scale the best of three joins), and at least half of that at twice the length of training; "
        f"without steps, and with the window alone, 20% or less (chance {CHANCE:.1%}); apart by two standard errors"
    )
    found: dict[str, list[Mean]] = {}
    for way, how in WAYS.items():
        model = _trained(how, scale, seed)
        found[way] = [mean(_right(model, length)) for length in LENGTHS]
    best = max(JOINS, key=lambda way: found[way][0].value) if scale == "large" else "gate"
    own, blind = found[best], max((found[way][0] for way in BLIND), key=lambda of: of.value)
    apart = Mean(own[0].value - blind.value, (own[0].error ** 2 + blind.error**2) ** 0.5)
    holds = own[0].value >= 0.6 and own[1].value >= own[0].value / 2 and blind.value <= 0.2 and apart.above()
    said = "; ".join(f"{way} {', '.join(f'{of:.1%}' for of in each)}" for way, each in found.items())
    ceiling = found["all tokens"][0].value
    measured = (
        f"recalled at {', '.join(map(str, LENGTHS))} tokens: {said}; {best} above the better control by {apart:.1%}"
    )
    premises = [
        Premise(
            "the task can be learned in these steps", "attention to all 90% or more", f"{ceiling:.1%}", ceiling >= 0.9
        )
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for way, each in found.items():
            style = "-" if way in JOINS else "--"
            axes.errorbar(LENGTHS, [m.value for m in each], [2 * m.error for m in each], fmt="o" + style, label=way)
        axes.axhline(CHANCE, color="grey", linestyle=":", label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.set(xlabel=f"tokens (trained at {TOKENS})", ylabel="values recalled", ylim=(0, 1.05))
        axes.legend()

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _drawn(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [row, token] and the values that the last tokens ask for [row, pair]."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    ids = KEYS * VALUES + KEYS + torch.randint(NOISE, (count, length), generator=generator)
    ids.scatter_(1, torch.rand(count, EARLY, generator=generator).argsort(1)[:, :PAIRS], keys * VALUES + values)
    asked = torch.rand(count, PAIRS, generator=generator).argsort(1)
    ids[:, -PAIRS:] = KEYS * VALUES + keys.gather(1, asked)
    return ids, values.gather(1, asked)


def _answers(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits[:, -PAIRS:, :VALUES]


def _trained(how: dict[str, Any], scale: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator, layers = torch.Generator().manual_seed(seed), LAYERS[scale]
    sizes = {"vocab_size": KEYS * VALUES + KEYS + NOISE, "dim": DIM, "layers": layers, "heads": 2}
    model = titans(**sizes, **{"window": WINDOW // layers, "memory": MEMORY, **how})
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS[scale])
    for _ in range(STEPS[scale]):
        ids, values = _drawn(BATCH, TOKENS, generator)
        optimiser.zero_grad()
        F.cross_entropy(_answers(model, ids).flatten(0, 1), values.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _right(model: nn.Module, length: int) -> Tensor:
    """Share of the four answers that is right, of each sequence held out."""
    ids, values = _drawn(HELD, length, torch.Generator().manual_seed(10_000 + length))
    return (_answers(model, ids).argmax(-1) == values).float().mean(1)
