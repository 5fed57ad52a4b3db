"""The Other Mind (arXiv:2507.15851): is a compressed timeline found where one is planted, and only there?

Similarities of 200 years, 1525 to 2520, fall with a distance, and half of their variance is noise; half of the data
sets have a digit term of equal size besides. Planted are references at three years, and, for the control, logarithms,
lines, digits and nothing. Units: 60 of 5,000 prefer years and have a trough at 1950; as many each have a trough but
respond to numbers alike, or prefer numbers. At the scale "real" MiniLM's embeddings of years are judged, with the
number of tokens of both years as covariates. The paper's claim is on large language models that rate similarities:
none is asked here, so that scale cannot tell.

Two designs were tried, on another seed: first, shares were of all variance, and a margin of 0.05 was out of reach where
digits explain half of it; they are of what digits and covariates leave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...catalog import Finding, Premise
from ...studies.temporal_cognition import Units, distance, embedding_similarity, preferential_units, temporal_cognition
from .._models import pretrained

SCALES = "small", "real", "large"
YEARS = np.arange(1525, 2525, 5)
REFERENCES, OTHERS, TRIED = (1700, 1950, 2150), ("log", "linear", "digits", "none"), np.arange(1525, 2525, 20)
SETS = {"small": 20, "real": 20, "large": 200}  # of each kind
UNITS, PLANTED, TROUGH = 5000, 60, 1950
TEMPLATES = ("Year: {}", "Number: {}", "In the year {}")

EXPECTED = (
    "a timeline is detected in at least 90% of the data sets in which one is planted, its reference within 40 years in "
    "the median, and in at most 5% of those with a logarithm, a line, digits or nothing; planted units are found with "
    "a precision and a recall of 0.9 or more, and their trough within 20 years"
)
REAL = "; of MiniLM's embeddings of years no timeline is detected with its tokens as covariates"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Compression from a reference is told from logarithms, lines and digits; preferring units are found."""
    rng = np.random.default_rng(seed)
    names: dict[str, float | None] = {**{str(year): year for year in REFERENCES}, **dict.fromkeys(OTHERS)}
    found = {name: [_judged(name, at, i % 2 == 1, rng) for i in range(SETS[scale])] for name, at in names.items()}
    share = {name: float(np.mean([of.detected.item() for of in each])) for name, each in found.items()}
    planted = float(np.mean([share[str(year)] for year in REFERENCES]))
    absent = float(np.mean([share[name] for name in OTHERS]))
    off = [abs(of.reference.item() - year) for year in REFERENCES for of in found[str(year)]]
    units, right = _units(rng)
    hits = int(np.isin(units.unit, right).sum())
    precision, recall = hits / max(len(units.unit), 1), hits / PLANTED
    holds = planted >= 0.9 and float(np.median(off)) <= 40 and absent <= 0.05
    holds = holds and min(precision, recall) >= 0.9 and abs(units.reference - TROUGH) <= 20 and units.slope > 0
    measured = (
        "detected with a reference at "
        + ", ".join(f"{year} {share[str(year)]:.0%}" for year in REFERENCES)
        + f" ({planted:.0%} together, off by {np.median(off):.0f} years in the median), with "
        + ", ".join(f"{name} {share[name]:.0%}" for name in OTHERS)
        + f" ({absent:.1%} together), of {SETS[scale]} data sets each; units: precision {precision:.2f}, recall "
        f"{recall:.2f}, trough at {units.reference:.0f} ({TROUGH})"
    )
    premises, expected = [], EXPECTED
    if scale == "real":
        embedded = {template: _embedded(template) for template in TEMPLATES}
        holds = holds and not any(of.detected.item() for of in embedded.values())
        expected += REAL
        measured += "; MiniLM: " + "; ".join(f"{template}: {_said(of)}" for template, of in embedded.items())
        premises.append(
            Premise("a language model rates similarities", "one that follows instructions", "none at hand", met=False)
        )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.bar(list(share), list(share.values()), color=["C0"] * len(REFERENCES) + ["C3"] * len(OTHERS))
        left.axhline(0.9, color="grey", linestyle=":")
        left.tick_params(axis="x", rotation=45)
        left.set(title="Timeline detected", ylim=(0, 1))
        right.plot(YEARS, units.profile)
        right.axvline(TROUGH, color="grey", linestyle=":")
        right.set(xlabel="year", title="Units that prefer years, mean activation")

    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def _judged(name: str, reference: float | None, digits: bool, rng: np.random.Generator) -> xr.Dataset:
    """What is made of similarities that fall with a distance, and are noise by half."""
    pairs = np.triu_indices(len(YEARS), 1)
    parts = [] if name == "none" else [distance(YEARS, "reference", reference=reference) if reference else _of(name)]
    parts += [_of("digits")] if digits else []
    whole = -sum((part / part[pairs].std() for part in parts), np.zeros((len(YEARS), len(YEARS))))
    noise = np.triu(rng.standard_normal(whole.shape), 1)
    whole = whole + (noise + noise.T) * (whole[pairs].std() or 1.0)
    return temporal_cognition(whole, YEARS, references=TRIED, draws=0, seed=int(rng.integers(2**31)))


def _of(name: str) -> NDArray[np.float64]:
    kinds = {"log": "log", "linear": "linear", "digits": "digits"}
    return distance(YEARS, kinds[name])  # type: ignore[arg-type]


def _units(rng: np.random.Generator) -> tuple[Units, NDArray[np.int64]]:
    """What is found of activations, and which units were planted."""
    year, number = rng.standard_normal((2, len(YEARS), UNITS))
    order = rng.permutation(UNITS)
    right, alike, contrary = order[:PLANTED], order[PLANTED : 2 * PLANTED], order[2 * PLANTED : 3 * PLANTED]
    code = np.log1p(np.abs(YEARS - TROUGH))[:, None]
    strength = rng.uniform(1.2, 2.4, PLANTED)
    year[:, right] += strength * code
    year[:, alike] += strength * code
    number[:, alike] += strength * code
    number[:, contrary] += strength * code
    return preferential_units(year, number, YEARS), right


def _embedded(template: str) -> xr.Dataset:
    model, tokenizer = pretrained("minilm")
    similarity, tokens = embedding_similarity(model, tokenizer, YEARS, template)
    both = tokens.astype(float)
    covariates = [both[:, None] + both, np.abs(both[:, None] - both)]
    return temporal_cognition(similarity, YEARS, covariates=covariates, references=TRIED, draws=0)


def _said(of: xr.Dataset) -> str:
    shares = ", ".join(f"{kind} {float(of.share.sel(kind=kind)):.2f}" for kind in of.kind.values)
    verdict = "detected" if of.detected.item() else "not detected"
    return f"digits and tokens {of.covered.item():.2f}, of the rest {shares} at {of.reference.item():.0f}, {verdict}"
