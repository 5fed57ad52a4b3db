"""Xue et al. (arXiv:2510.11602): what fails in every layer does not where every second layer attends in the usual way.

Two generated tasks for a Llama of two layers. "back": the next word is the one two before, which a map that depends on
position alone can do. "recall": words tell a key and its value at once, then a key is asked for, which needs queries
and keys of the sequence. Gaps are closed from the loss of knowing nothing, ln(words) or ln(values), to that of the
standard model. Hybrids have the simple layer first. Also reported: the hybrid when its simple attention is left out
after training, which the paper finds to collapse. Rate, steps and the number of keys were chosen on seed 1: of 4 keys
and values, random maps can keep all, and fail at nothing.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ...catalog import Finding, Premise
from ...mechanisms.deconstructed import deconstruct
from .._measure import mean

WORDS, LENGTH, KEYS, VALUES, DIM, STEPS, RATE, BATCH, TESTED = 16, 24, 12, 8, 32, 200, 1e-2, 32, 500
MODELS = {
    "back": ("standard", "no-mixing", "random"),
    "recall": ("standard", "no-mixing", "random", "no-mixing, hybrid", "random, hybrid"),
}
FLOOR = {"back": math.log(WORDS), "recall": math.log(VALUES)}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Share of the gap that each model closes on the two tasks."""
    expected = (
        "back: no mixing closes 2% at most, random maps 70% or more; recall: both in all layers 30% at most, in every "
        "second layer 80% or more; each by two standard errors over sequences"
    )
    closed: dict[tuple[str, str], Any] = {}
    losses: dict[tuple[str, str], float] = {}
    skipped = {}
    for task, models in MODELS.items():
        tested = _texts(task, TESTED, torch.Generator().manual_seed(100_000 + seed))
        gap = 1.0
        for name in models:
            model = _trained(task, name, seed)
            each = _losses(model, *tested).detach()
            losses[task, name] = float(each.mean())
            gap = FLOOR[task] - float(each.mean()) if name == "standard" else gap
            closed[task, name] = mean((FLOOR[task] - each) / gap)
            if "hybrid" in name:
                model.model.layers[0].self_attn = _Nothing()
                skipped[name] = (FLOOR[task] - float(_losses(model, *tested).mean())) / gap
    holds = (
        closed["back", "no-mixing"].below(0.02)
        and closed["back", "random"].above(0.7)
        and all(closed["recall", name].below(0.3) for name in ("no-mixing", "random"))
        and all(closed["recall", f"{name}, hybrid"].above(0.8) for name in ("no-mixing", "random"))
    )
    premises = [
        Premise(
            f"the standard model learns {task}",
            f"{bar} nats or less",
            f"{losses[task, 'standard']:.2f} of {FLOOR[task]:.2f}",
            losses[task, "standard"] <= bar,
        )
        for task, bar in (("back", 0.5), ("recall", 0.3))
    ]
    measured = (
        ", ".join(f"{task}, {name} {of:.2f}" for (task, name), of in closed.items() if name != "standard")
        + " of the gap; without the simple layer after training "
        + ", ".join(f"{name} {share:.2f}" for name, share in skipped.items())
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, closed=closed))


def _draw(figure: Any, *, closed: dict[tuple[str, str], Any]) -> None:
    axes = figure.subplots()
    shown = {of: share for of, share in closed.items() if of[1] != "standard"}
    axes.bar([f"{task}\n{name.replace(', ', chr(10))}" for task, name in shown], [s.value for s in shown.values()])
    axes.set(ylabel="share of the gap that is closed")


class _Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def _texts(task: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [text, token], and the id to be told at each, -100 where it cannot be known."""
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    told = torch.full_like(ids, -100)
    if task == "back":
        told[:, 2:] = ids[:, :-2]
        return ids, told
    # each key once, with its value, in an order of each text's own; then keys are asked for
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)
    asked = torch.randint(KEYS, (count, LENGTH - KEYS), generator=generator)
    ids = torch.cat([keys * VALUES + values.gather(1, keys), KEYS * VALUES + asked], 1)
    told[:, KEYS:] = values.gather(1, asked)
    return ids, told


def _losses(model: nn.Module, ids: Tensor, told: Tensor) -> Tensor:
    """Nats of each text's answers, mean. [text]"""
    with torch.set_grad_enabled(model.training):
        found = F.cross_entropy(model(ids, use_cache=False).logits.mT, told, reduction="none", ignore_index=-100)
    return found.sum(1) / (told >= 0).sum(1)


def _trained(task: str, name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * DIM,
        vocab_size=KEYS * VALUES + KEYS,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    variant, _, hybrid = name.partition(", ")
    if variant != "standard":
        more: dict[str, Any] = {"length": LENGTH} if variant == "random" else {}
        deconstruct(model, variant, layers="odd" if hybrid else "all", **more)
    optimizer, generator = torch.optim.AdamW(model.parameters(), RATE), torch.Generator().manual_seed(seed)
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        optimizer.zero_grad()
        _losses(model, *_texts(task, BATCH, generator)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
