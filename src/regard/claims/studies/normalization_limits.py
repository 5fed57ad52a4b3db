"""Mudarisov et al. (arXiv:2508.17821), on the heads of the zoo's reader in place of GPT-2's.

Rows are those of a text's last query, which looks at all keys; a token is its value vector. The distance is put
beside the largest that it could be, the weighted sum of the values' lengths. For the gradient the row's scores are
divided by a temperature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...catalog import Finding
from ...studies.normalization_limits import normalization_limits, sensitivity, sensitivity_bound, weight_bounds
from .._calls import reader_calls, shared

SCALES = "small", "large"
LENGTHS = {"small": (64, 128, 256), "large": (64, 128, 256, 512, 1024)}
TEXTS = 8
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the keys, that are selected; less than one key counts as one
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

EXPECTED = (
    "in every row of every head, weights, distances and the Jacobian are within their bounds; as the selection grows "
    "from 2% to 50% of the keys, both the mean distance and the mean share of the selection that can be told from the "
    "rest fall, the latter below 85%; over the rows, the largest norm of the Jacobian falls as 1/T (slope of its "
    "logarithm -1, +-0.1) for T from 0.05 to 2"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Bounds hold; what a head selects is told apart worse, the more it selects; gradients grow as 1/T."""
    distance: dict[int, list[float]] = {}
    told: dict[int, list[float]] = {}
    at_random: dict[int, list[float]] = {}
    broken, rows = 0, 0
    for length in LENGTHS[scale]:
        scores, values = _rows(length, seed)
        weights = scores.softmax(-1)
        low, high = weight_bounds_of(scores)
        broken += int(((weights < low * (1 - 1e-9)) | (weights > high * (1 + 1e-9))).sum())
        apart = [normalization_limits(weights, values, max(1, round(share * length))) for share in SHARES]
        broken += sum(int((s.distance > s.bound * (1 + 1e-9) + 1e-12).sum()) for s in apart)
        most = (weights * values.norm(dim=-1)).sum(-1)
        distance[length] = [float((s.distance / most).mean()) for s in apart]
        at_random[length] = [float((s.at_random / most).mean()) for s in apart]
        told[length] = [float(s.distinguishable.mean()) for s in apart]
        rows += weights[..., 0].numel()
    scores, _ = _rows(LENGTHS[scale][0], seed)
    steepest = []
    for temperature in TEMPERATURES:
        weights = (scores / temperature).softmax(-1)
        norms = sensitivity(weights, temperature=temperature)
        broken += int((norms > sensitivity_bound(weights, temperature=temperature) * (1 + 1e-9) + 1e-12).sum())
        steepest.append(float(norms.max()))
    logs = torch.tensor([TEMPERATURES, steepest], dtype=torch.float64).log()
    logs = logs - logs.mean(1, keepdim=True)
    slope = float((logs[0] * logs[1]).sum() / logs[0].square().sum())
    longest = LENGTHS[scale][-1]
    falls = all(d[-1] < d[0] for d in distance.values()) and all(t[-1] < min(t[0], 0.85) for t in told.values())
    measured = (
        f"{rows} rows, bounds broken: {broken}. With {longest} keys, from 2% to 50% of them selected, the distance "
        f"goes from {distance[longest][0]:.2f} to {distance[longest][-1]:.2f} of the largest possible (of keys drawn "
        f"at random, from {at_random[longest][0]:.2f} to {at_random[longest][-1]:.2f}), and the share told apart from "
        f"{told[longest][0]:.0%} to {told[longest][-1]:.0%}; the largest norm of the Jacobian goes as T to the "
        f"{slope:.2f}, and is at most {max(s * t for s, t in zip(steepest, TEMPERATURES)):.2f} / T."
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for length in LENGTHS[scale]:
            left.plot(SHARES, told[length], "o-", label=f"{length} keys")
            (line,) = middle.plot(SHARES, distance[length], "o-")
            middle.plot(SHARES, at_random[length], "--", color=line.get_color())
        left.set(xlabel="share of keys selected", title="Share told apart", ylim=(0, 1.02))
        middle.set(xlabel="share of keys selected", title="Distance / largest possible", ylim=(0, 1.02))
        left.legend()
        middle.plot([], [], "o-", color="grey", label="largest weights")
        middle.plot([], [], "--", color="grey", label="keys at random")
        middle.legend()
        right.loglog(TEMPERATURES, steepest, "o-", label="largest norm of rows")
        for part in (2, 4):
            right.loglog(
                TEMPERATURES, [1 / (part * t) for t in TEMPERATURES], ":", color="grey", label=f"1 / ({part} T)"
            )
        right.set(xlabel="temperature T", title="Norm of the Jacobian")
        right.legend()

    return Finding(broken == 0 and falls and abs(slope + 1) <= 0.1, measured, EXPECTED, seed, draw=draw)


def weight_bounds_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of corollary 1 for each row, from its own largest score. [..., 1]"""
    bounds = [weight_bounds(float(largest), scores.shape[-1]) for largest in scores.abs().amax(-1).flatten()]
    low, high = torch.tensor(bounds, dtype=scores.dtype).reshape(*scores.shape[:-1], 2).unbind(-1)
    return low[..., None], high[..., None]


def _rows(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores [row, key] of each text's last query in each head, which sees all keys, and values [row, key, dim]."""
    scores, values = [], []
    for call in reader_calls(length, texts=TEXTS, seed=seed):
        key, value = (shared(kv, call.query.shape[1]).double() for kv in (call.key, call.value))
        scores.append((call.query[:, :, -1:].double() @ key.mT * call.scale).flatten(0, 2))
        values.append(value.flatten(0, 1))
    return torch.cat(scores), torch.cat(values)
