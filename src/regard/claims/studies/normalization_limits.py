"""Mudarisov et al. (arXiv:2508.17821): keys and values on a sphere, and the heads of the zoo's reader.

On the sphere queries, keys and values are random unit vectors of 64 dimensions, and rows are softmax at temperature 1:
the setting of the theorems. The control is the same at a temperature of 0.02, where a few keys keep the weight however
many there are. In the reader (for the paper's GPT-2) rows are those of a text's last query, which looks at all keys,
and a token is its value vector; bounds and gradients are asked of these. The distance there is reported: a head that
looks at few keys puts nearly all of its weight into the selection, and the distance then goes to the length of its
output, whatever the theorem's bound. One design was tried, on other seeds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...catalog import Finding
from ...studies.normalization_limits import normalization_limits, sensitivity, sensitivity_bound, weight_bounds
from .._calls import reader_calls, shared
from .._measure import Mean, exponent, mean

SCALES = "small", "large"
LENGTHS = {"small": (64, 128, 256), "large": (64, 128, 256, 512, 1024)}
SPHERE, DIM, ROWS = (64, 128, 256, 512, 1024), 64, 60
FLAT, SHARP = 1.0, 0.02  # temperatures on the sphere
TEXTS = 8
SHARES = (0.02, 0.1, 0.25, 0.5)  # of the keys, that are selected; less than one key counts as one
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

EXPECTED = (
    "on the sphere, with the same share of the keys selected, the distance falls with their number as a power of -0.5, "
    "+-0.1, for each share, while at a temperature of 0.02 it falls by -0.15 at most; of 256 keys, the share of the "
    "selection that can be told from the rest falls as the selection grows from 2% to 50%, by two standard errors, to "
    "below 85%; in every row of every head of the reader weights, distances and the Jacobian are within their bounds, "
    "and the largest norm of the Jacobian falls as 1/T (slope of its logarithm -1, +-0.1) for T from 0.05 to 2"
)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Bounds hold; what a head selects is told apart worse, the more it selects; gradients grow as 1/T."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {length: _sphere(length, generator) for length in SPHERE}
    apart: dict[float, dict[float, list[float]]] = {t: {share: [] for share in SHARES} for t in (FLAT, SHARP)}
    told: dict[int, list[Mean]] = {}
    for length, (scores, values) in drawn.items():
        for temperature, of in apart.items():
            weights = (scores / temperature).softmax(-1)
            found = [normalization_limits(weights, values, max(1, round(share * length))) for share in SHARES]
            for share, one in zip(SHARES, found):
                of[share].append(float(one.distance.mean()))
            if temperature == FLAT:
                told[length] = [mean(one.distinguishable) for one in found]
    slopes = {t: [exponent(SPHERE, d) for d in of.values()] for t, of in apart.items()}
    few, half = told[256][0], told[256][-1]
    fewer = Mean(few.value - half.value, math.hypot(few.error, half.error))

    broken, rows, heads = 0, 0, []
    for length in LENGTHS[scale]:
        scores, values = _rows(length, seed)
        weights = scores.softmax(-1)
        low, high = weight_bounds_of(scores)
        broken += int(((weights < low * (1 - 1e-9)) | (weights > high * (1 + 1e-9))).sum())
        found = [normalization_limits(weights, values, max(1, round(share * length))) for share in SHARES]
        broken += sum(int((s.distance > s.bound * (1 + 1e-9) + 1e-12).sum()) for s in found)
        most = (weights * values.norm(dim=-1)).sum(-1)
        heads = [float((s.distance / most).mean()) for s in found]
        rows += weights[..., 0].numel()
    scores, _ = _rows(LENGTHS[scale][0], seed)
    steepest = []
    for temperature in TEMPERATURES:
        weights = (scores / temperature).softmax(-1)
        norms = sensitivity(weights, temperature=temperature)
        broken += int((norms > sensitivity_bound(weights, temperature=temperature) * (1 + 1e-9) + 1e-12).sum())
        steepest.append(float(norms.max()))
    slope = exponent(TEMPERATURES, steepest)
    flat, sharp = slopes.values()
    holds = broken == 0 and all(abs(s + 0.5) <= 0.1 for s in flat) and min(sharp) >= -0.15
    holds = holds and fewer.above() and half.value < 0.85 and abs(slope + 1) <= 0.1
    measured = (
        f"on the sphere the distance goes as keys to the {min(flat):.2f} to {max(flat):.2f} over shares (at a "
        f"temperature of {SHARP} {min(sharp):.2f} to {max(sharp):.2f}); of 256 keys, {few:.0%} of the selection is "
        f"told apart with 2% selected, {half:.0%} with 50%; {rows} rows of the reader, bounds broken: {broken}; the "
        f"largest norm of the Jacobian goes as T to the {slope:.2f}, and is at most "
        f"{max(s * t for s, t in zip(steepest, TEMPERATURES)):.2f} / T; with {LENGTHS[scale][-1]} keys the reader's "
        f"distance goes from {heads[0]:.2f} to {heads[-1]:.2f} of the largest possible as more are selected"
    )

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3)
        for length in SPHERE:
            left.plot(SHARES, [share.value for share in told[length]], "o-", label=f"{length} keys")
        left.set(xlabel="share of keys selected", title="Share told apart", ylim=(0, 1.02))
        left.legend()
        for (temperature, of), style in zip(apart.items(), ("o-", "o--")):
            for i, (share, distances) in enumerate(of.items()):
                label = f"{share:.0%}" if temperature == FLAT else None
                middle.loglog(SPHERE, distances, style, color=f"C{i}", label=label)
        middle.set_xticks(SPHERE, [str(n) for n in SPHERE])
        middle.minorticks_off()
        middle.set(xlabel="keys", title=f"Distance (dashed: T = {SHARP})")
        middle.legend()
        right.loglog(TEMPERATURES, steepest, "o-", label="largest norm of rows")
        for part in (2, 4):
            right.loglog(
                TEMPERATURES, [1 / (part * t) for t in TEMPERATURES], ":", color="grey", label=f"1 / ({part} T)"
            )
        right.set(xlabel="temperature T", title="Norm of the Jacobian")
        right.legend()

    return Finding(holds, measured, EXPECTED, seed, draw=draw)


def weight_bounds_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of corollary 1 for each row, from its own largest score. [..., 1]"""
    bounds = [weight_bounds(float(largest), scores.shape[-1]) for largest in scores.abs().amax(-1).flatten()]
    low, high = torch.tensor(bounds, dtype=scores.dtype).reshape(*scores.shape[:-1], 2).unbind(-1)
    return low[..., None], high[..., None]


def _sphere(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores [row, key] and values [row, key, dim] of random unit vectors."""
    query, key, value = (
        F.normalize(torch.randn(ROWS, n, DIM, generator=generator, dtype=torch.float64), dim=-1)
        for n in (1, length, length)
    )
    return (query @ key.mT)[:, 0], value


def _rows(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores [row, key] of each text's last query in each head, which sees all keys, and values [row, key, dim]."""
    scores, values = [], []
    for call in reader_calls(length, texts=TEXTS, seed=seed):
        key, value = (shared(kv, call.query.shape[1]).double() for kv in (call.key, call.value))
        scores.append((call.query[:, :, -1:].double() @ key.mT * call.scale).flatten(0, 2))
        values.append(value.flatten(0, 1))
    return torch.cat(scores), torch.cat(values)
