"""Pruthi et al. (arXiv:1909.07913): attention leaves the words that decide, and the model goes on using them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import loading
from ...catalog import Finding, Premise
from ...objectives import collect
from ...objectives.deceptive_attention import KeepApart, deceptive_attention
from ...seam import intervene
from .._measure import mean
from .._sentences import Batch, batches, encoded

SCALES = "small", "large"
STEPS = {"small": 300, "large": 3000}
SIZE, RATE, STRENGTH = 48, 5e-4, 1.0


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """`namer` trained on, with and without the penalty on the words that are the reason for the feeling."""
    expected = (
        "trained with the penalty (strength 1), [CLS] gives the reason at most 1% of its weight in the last layer and "
        "at most a tenth of what it gives it without; accuracy on sentences held out is at most 2 points lower; with "
        "the reason hidden it falls by 30 points or more, and by two standard errors, so the reason is still used"
    )
    _, tokenizer = loading.load("namer")
    pool = encoded(tokenizer, 100 * SIZE, seed=seed, held=False)
    held = encoded(tokenizer, 1000, seed=seed, held=True)
    found = {}
    for name, strength in (("without", 0.0), ("with", STRENGTH)):
        model, _ = loading.load("namer")
        _train(model, pool, strength, STEPS[scale], seed)
        found[name] = _measure(model, held, tokenizer.mask_token_id)
    (weight, right, hidden), (weight_0, right_0, hidden_0) = found["with"], found["without"]
    mass, mass_0 = mean(weight), mean(weight_0)
    lost, falls = mean(right_0 - right), mean(right - hidden)
    holds = mass.value <= min(0.01, mass_0.value / 10) and lost.value <= 0.02 and falls.value >= 0.3 and falls.above()
    measured = (
        f"weight of [CLS] on the reason, last layer: {mass_0:.2%} without the penalty, {mass:.2%} with it; accuracy "
        f"{mean(right_0):.1%} and {mean(right):.1%} (lower by {lost:.1%}); with the reason hidden {mean(hidden_0):.1%} "
        f"and {mean(hidden):.1%} (chance: 25%)"
    )
    premises = [
        Premise(
            "[CLS] looks at the reason without the penalty",
            "5% of its weight or more",
            f"{mass_0:.1%}",
            mass_0.value >= 0.05,
        ),
        Premise(
            "the model needs the reason",
            "30 points less right without it",
            f"{mean(right_0 - hidden_0):.1%}",
            float((right_0 - hidden_0).mean()) >= 0.3,
        ),
    ]

    def draw(figure: Any) -> None:
        left, side = figure.subplots(1, 2)
        for i, (name, (weights, *shares)) in enumerate(found.items()):
            left.violinplot(weights.numpy(), [i], showmedians=True)
            side.bar([i * 0.4, 1 + i * 0.4], [float(s.mean()) for s in shares], width=0.38, label=f"{name} the penalty")
        left.set_xticks([0, 1], ["without the penalty", "with it"])
        left.set(ylim=(0, 1), ylabel="weight on the reason", title="[CLS] in the last layer, a sentence each")
        side.axhline(0.25, color="grey", linestyle=":")
        side.set_xticks([0.2, 1.2], ["whole sentence", "reason hidden"])
        side.set(ylim=(0, 1), ylabel="accuracy", title="1,000 sentences held out")
        side.legend(loc="center right")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _train(model: Any, pool: Batch, strength: float, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step, batch in enumerate(batches(pool, SIZE, steps)):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, (steps - step) / (steps / 4))
        reason = batch.pop("reason")
        with intervene(model, KeepApart(reason)), collect(model, _last(model, reason)) as seen:
            loss = model(**batch).loss
        loss = loss + strength * deceptive_attention(seen[0].value)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _last(model: Any, reason: Tensor) -> Any:
    """Weight of [CLS] on the reason, in the last layer. [batch, head, 1]"""
    last = model.config.num_hidden_layers - 1
    return lambda call: call.weights.mass(reason)[..., :1] if call.site.layer == last else None


@torch.no_grad()
def _measure(model: Any, held: Batch, mask: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of [CLS] on the reason, mean over heads; whether it is right; and with the reason hidden. [sentence]"""
    given = {name: held[name] for name in ("input_ids", "attention_mask")}
    reason, label = held["reason"], held["labels"]
    with intervene(model, KeepApart(reason)):
        with collect(model, _last(model, reason)) as seen:
            right = model(**given).logits.argmax(-1) == label
        given["input_ids"] = given["input_ids"].masked_fill(reason, mask)
        without = model(**given).logits.argmax(-1) == label
    return seen[0].value[..., 0].mean(1), right.float(), without.float()
