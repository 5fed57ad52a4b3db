"""Bae et al. (arXiv:2602.23057): scaled and shifted weights put less on the first token, at no cost in loss.

On the task of `_backcopy`, where heads have nothing to look for at most tokens. Of several trainings of plain attention
those count in which a sink came up, and the same are trained with scaled and shifted weights. Two readings of "the sink
falls" are told apart: effective weights, and their softmax part. The control leaves out what the paper adds: a factor
of one half for all, without the shift, which the output projection can make up for; its softmax part and its share of
the row's sum should stay. Rate, length and steps were chosen on seeds 1 and 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding, Premise
from ...mechanisms.affine_scaled import AffineScaled, affine_scaled, weights
from .._measure import mean
from ._backcopy import TRIGGERS, Model, chain, loss_of, sequences, train

LENGTH, DIM, STEPS, RATE, TRAININGS, SINK = 64, 32, 300, 1e-2, 4, 0.2
WAYS = "plain", "affine", "a constant factor"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Weight on the first token, effective and of the softmax, and loss, in the three ways."""
    expected = (
        "where plain attention has a sink: the effective weight on the first token is half of plain's or less, by two "
        "standard errors over trainings, and the loss no more than 0.01 nats higher; with a constant factor its share "
        "of the row's sum stays above half of plain's"
    )
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    tried = []
    for run in range(TRAININGS):
        at = TRAININGS * seed + run
        likely, generator = chain(at), torch.Generator().manual_seed(at)
        batches = [sequences(32, LENGTH, likely, generator) for _ in range(STEPS)]
        held_out = sequences(256, LENGTH, likely, generator)
        plain = _trained("plain", batches, held_out, at)
        tried.append(plain[0])
        if plain[0] >= SINK:
            found["plain"].append(plain)
            for way in WAYS[1:]:
                found[way].append(_trained(way, batches, held_out, at))
    many = len(found["plain"])
    premise = Premise(
        f"there are sinks, of {SINK} or more, without scaling",
        "in 2 trainings",
        f"in {many} of {TRAININGS} ({', '.join(f'{sink:.2f}' for sink in tried)})",
        many >= 2,
    )
    if many < 2:
        return Finding(None, "too few sinks to compare", expected, seed, premises=[premise])
    (sinks, soft, losses), (affine, affine_soft, affine_losses), (constant, constant_soft, _) = (
        zip(*found[way]) for way in WAYS
    )
    half = mean([0.5 * a - b for a, b in zip(sinks, affine)])
    lost = mean([b - a for a, b in zip(losses, affine_losses)])
    share = mean(constant_soft).value / mean(soft).value
    holds = half.above() and lost.value <= 0.01 and share > 0.5
    measured = (
        f"on the first token {mean(sinks):.2f}, affine {mean(affine):.2f} (softmax part {mean(affine_soft):.2f}), "
        f"half of plain's less affine's {half:.3f}; a constant factor {mean(constant):.2f} (softmax part "
        f"{mean(constant_soft):.2f}); loss {mean(losses):.3f}, affine more by {lost:+.3f}; over {many} trainings"
    )
    rates = {way: tuple(mean(v).value for v in list(zip(*found[way]))[:2]) for way in WAYS}
    return Finding(holds, measured, expected, seed, premises=[premise], draw=partial(_draw, rates=rates))


def _draw(figure: Any, *, rates: dict[str, tuple[float, ...]]) -> None:
    axes = figure.subplots()
    for i, name in enumerate(("effective", "softmax part")):
        axes.bar([x + 0.4 * i for x in range(len(rates))], [of[i] for of in rates.values()], 0.4, label=name)
    axes.set_xticks([x + 0.2 for x in range(len(rates))], list(rates))
    axes.set(ylabel="mean weight on the first token")
    axes.legend()


class _Attention(nn.Module):
    is_causal, head_dim = True, DIM

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.query, self.key = self.q_proj(hidden_states)[:, None], self.k_proj(hidden_states)[:, None]
        value = self.v_proj(hidden_states)[:, None]
        return self.o_proj(F.scaled_dot_product_attention(self.query, self.key, value, is_causal=True)[:, 0])


class _Constant(nn.Module):
    """Half of attention, whatever the input, and no shift: the mean of the factors stays that of the factor."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1)


def _trained(way: str, batches: list[Tensor], held_out: Tensor, seed: int) -> tuple[float, float, float]:
    """Weight on the first token of queries from the ninth on that are no trigger, its softmax part, and the loss."""
    torch.manual_seed(seed)
    model = Model(_Attention, LENGTH, DIM)
    if way != "plain":
        affine_scaled(model)
    scaled = next((m for m in model.modules() if isinstance(m, AffineScaled)), None)
    if scaled is not None and way == "a constant factor":
        scaled.factor, scaled.momentum = _Constant(), 0.0  # type: ignore[assignment]
    train(model, RATE, batches)
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, held_out)
        attention = next(m for m in model.modules() if isinstance(m, _Attention))
        one = torch.ones(*attention.query.shape[:3])
        soft = weights(attention.query, attention.key, one, one[0, :, 0])
        effective = soft
        if scaled is not None and scaled.alpha is not None:
            effective = weights(attention.query, attention.key, scaled.alpha, scaled.mean)  # type: ignore[arg-type]
    asked = held_out[:, 8:-1] > TRIGGERS
    return float(effective[:, 0, 8:, 0][asked].mean()), float(soft[:, 0, 8:, 0][asked].mean()), float(loss)
