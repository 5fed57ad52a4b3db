"""Do models place years on a line that is compressed away from a "now"?

The Other Mind: How Language Models Exhibit Human Temporal Cognition (arXiv:2507.15851). Pairs of years are rated for
their similarity, and ratings are explained by distances: of logarithms, of digits, or of logarithms of how far each
year is from a reference, the model's present. Units of feed-forward layers that prefer years to numbers, and the
dissimilarity of states layer by layer, are asked the same.

The paper's text and code were not at hand. Ours are: the distance from a reference, with a sign and with 1 added, so
that it is finite; the search for the reference; the criterion for units; and the judgement: pairs share years, so a fit
is judged on pairs of years that it has not seen, and a timeline counts as detected where it explains more of them than
the other distances do, 0.05 of the variance or more, with digits and a tokenizer's lengths already taken into account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import nn

Kind = Literal["linear", "log", "digits", "reference"]
KINDS: tuple[Kind, ...] = ("linear", "log", "digits", "reference")
LEAST = 20  # years
MARGIN, INSIDE, FOLDS = 0.05, 0.9, 5
Floats = NDArray[np.float64]


def distance(years: ArrayLike, kind: Kind = "reference", *, reference: float | None = None) -> Floats:
    """Distances between all pairs of years. [year, year]

    "linear": |i - j|; "log": |log i - log j|; "digits": how many digits to change, add or take away (Levenshtein);
    "reference": |u(i) - u(j)| with u(y) = sign(y - reference) log(1 + |y - reference|).

    >>> distance([1999, 2001], reference=2000).round(4).tolist()  # 2 ln 2
    [[0.0, 1.3863], [1.3863, 0.0]]
    """
    years = _years(years)
    if (kind == "reference") != (reference is not None):
        raise ValueError(f"a reference is for kind='reference', and needed there: got {reference} with {kind!r}")
    if kind == "digits":
        texts = [f"{year:g}" for year in years]
        return np.array([[_changes(a, b) for b in texts] for a in texts], float)
    if kind == "linear":
        at = years
    elif kind == "log":
        if (years <= 0).any():
            raise ValueError(f"logarithms are of years above 0, got {years.min():g}")
        at = np.log(years)
    elif reference is not None:
        at = np.sign(years - reference) * np.log1p(np.abs(years - reference))
    else:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    return np.abs(at[:, None] - at)


@cache
def _changes(one: str, other: str) -> int:
    last = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        now = [i]
        for j, b in enumerate(other, 1):
            now.append(min(last[j] + 1, now[-1] + 1, last[j - 1] + (a != b)))
        last = now
    return last[-1]


def temporal_cognition(
    similarity: ArrayLike,
    years: ArrayLike,
    *,
    covariates: Sequence[ArrayLike] = (),
    references: ArrayLike | None = None,
    draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """Which distance explains similarities of years [year, year] best, and whether there is a reference.

    covariates: other things about pairs [year, year], such as how many tokens their years have, which go into every fit
    beside the digits. references: those tried; every year if not given.

    covered: the share that covariates and digits explain of the variance among pairs of years held out (five folds of
    years; pairs within a fold are judged by a fit on pairs within the others). share [kind]: of what they leave, what
    each distance explains besides; 1 is all, below 0 worse than without it. reference, reference_low and
    reference_high: the best year, and the middle 90% of what `draws` resamplings of years give. detected: the share of
    "reference" is 0.05 or more above that of all others, and 0.05 or more, and the reference is not among the outer 5%
    of the range on either side, where it is a logarithm or a line.

    ValueError for fewer than 20 years, and where all similarities are one.

    >>> years = np.arange(1800, 2200, 10)
    >>> found = temporal_cognition(-distance(years, reference=2000), years, draws=0)
    >>> bool(found.detected), float(found.reference)
    (True, 2000.0)
    """
    years, similarity = _years(years), np.asarray(similarity, float)
    n = len(years)
    if n < LEAST:
        raise ValueError(f"a timeline is fitted to {LEAST} years or more, got {n}")
    every = [similarity, *(np.asarray(c, float) for c in covariates)]
    if any(of.shape != (n, n) for of in every):
        shapes = ", ".join(str(list(of.shape)) for of in every)
        raise ValueError(f"similarities and covariates of {n} years are [{n}, {n}], got {shapes}")
    if np.ptp(similarity[_pairs(np.arange(n))]) == 0:
        raise ValueError(f"all similarities are {similarity[0, 1]:g}, so nothing can explain them")
    tried = years if references is None else np.asarray(references, float)
    base = np.stack([np.ones((n, n)), distance(years, "digits"), *every[1:]])
    other = {"none": None, "linear": distance(years, "linear"), "log": distance(years, "log")}
    maps = np.stack([distance(years, reference=r) for r in tried])
    rng = np.random.default_rng(seed)

    fold = rng.permutation(np.arange(n) % FOLDS)
    left: dict[str, list[float]] = {name: [] for name in [*other, "reference"]}
    for held in range(FOLDS):
        seen, judged = (_pairs(np.flatnonzero(of)) for of in (fold != held, fold == held))
        best = maps[_scan(similarity, base, maps, seen).argmax()]
        whole = np.square(similarity[judged] - similarity[judged].mean()).sum()
        for name, more in {**other, "reference": best}.items():
            both = base if more is None else np.concatenate([base, more[None]])
            weights = np.linalg.lstsq(both[:, *seen].T, similarity[seen], rcond=None)[0]
            left[name].append(np.square(similarity[judged] - weights @ both[:, *judged]).sum() / whole)
    mean = {name: float(np.mean(of)) for name, of in left.items()}
    covered = 1 - mean.pop("none")
    share = {name: 1 - of / (1 - covered) for name, of in mean.items()}

    def found(of: NDArray[np.int64]) -> float:
        return float(tried[_scan(similarity, base, maps, _pairs(of)).argmax()])

    reference = found(np.arange(n))
    resampled = [found(np.sort(rng.integers(0, n, n))) for _ in range(draws)]
    low, high = np.quantile(resampled, [0.05, 0.95]) if draws else (np.nan, np.nan)
    edge = (1 - INSIDE) / 2 * np.ptp(years)
    ahead = share["reference"] - max(0.0, *(of for name, of in share.items() if name != "reference"))
    detected = ahead >= MARGIN and years.min() + edge <= reference <= years.max() - edge
    return xr.Dataset(
        {
            "covered": covered,
            "share": ("kind", list(share.values()), {"long_name": "Share of what is left, held out"}),
            "reference": reference,
            "reference_low": low,
            "reference_high": high,
            "detected": detected,
        },
        coords={"kind": list(share)},
    )


def _pairs(of: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of different years, each once."""
    i, j = np.triu_indices(len(of), 1)
    keep = of[i] != of[j]
    return of[i[keep]], of[j[keep]]


def _scan(similarity: Floats, base: Floats, maps: Floats, pairs: tuple[NDArray[np.int64], ...]) -> Floats:
    """How much of the squares that the base leaves each map explains, where similarity falls with it. [map]"""
    basis = np.linalg.qr(base[:, *pairs].T)[0]
    target, other = similarity[pairs], maps[:, *pairs]
    target = target - basis @ (basis.T @ target)
    other = other - (other @ basis) @ basis.T
    return np.square(np.minimum(other @ target, 0)) / np.maximum(np.square(other).sum(1), 1e-12)


class Units(NamedTuple):
    """Units that prefer one of two kinds of prompt, from the largest effect on."""

    unit: NDArray[np.int64]
    effect: Floats  # mean paired difference in its standard deviations, of these units
    profile: Floats  # mean activation of these units, by year
    reference: float  # where log(1 + |year - reference|) explains it best, and
    slope: float  # by which it rises from there: above 0 is a trough


def preferential_units(
    year: ArrayLike, number: ArrayLike, years: ArrayLike, *, effect: float = 2.0, agree: float = 0.95, most: int = 1000
) -> Units:
    """Units that respond more to years than to the same numbers; activations [year, unit], prompts in the same order.

    Kept where the paired difference is `effect` of its standard deviations or more, and above 0 for `agree` of the
    years; the `most` of largest effect, of which `profile` is the mean of standardised activations to years.
    """
    one, other, years = np.asarray(year, float), np.asarray(number, float), _years(years)
    if one.ndim != 2 or one.shape != other.shape or len(one) != len(years):
        raise ValueError(f"activations are [{len(years)} years, unit], got {list(one.shape)} and {list(other.shape)}")
    apart = one - other
    size = apart.mean(0) / np.maximum(apart.std(0, ddof=1), 1e-12)
    kept = np.flatnonzero((size >= effect) & ((apart > 0).mean(0) >= agree))
    kept = kept[np.argsort(-size[kept], kind="stable")][:most]
    if not len(kept):
        return Units(kept, size[kept], np.full(len(years), np.nan), np.nan, np.nan)
    chosen = one[:, kept]
    profile = ((chosen - chosen.mean(0)) / np.maximum(chosen.std(0), 1e-12)).mean(1)
    away = np.log1p(np.abs(years - years[:, None]))  # [reference, year]
    away = away - away.mean(1, keepdims=True)
    slopes = away @ (profile - profile.mean()) / np.square(away).sum(1)
    best = int((slopes**2 * np.square(away).sum(1)).argmax())
    return Units(kept, size[kept], profile, float(years[best]), float(slopes[best]))


def layer_profile(states: ArrayLike, years: ArrayLike, *, reference: float) -> xr.DataArray:
    """How much of the dissimilarity (1 - cosine) of years' states each distance explains alone, R^2. [layer, kind]

    states [layer, year, dim], at the year's last token. In sample: to compare layers, not to detect anything.
    """
    states, years = np.asarray(states, float), _years(years)
    if states.ndim != 3 or states.shape[1] != len(years):
        raise ValueError(f"states are [layer, {len(years)} years, dim], got {list(states.shape)}")
    pairs = _pairs(np.arange(len(years)))
    maps = [distance(years, kind, **({"reference": reference} if kind == "reference" else {}))[pairs] for kind in KINDS]
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    apart = (1 - unit @ unit.swapaxes(1, 2))[:, *pairs]
    shares = [[np.corrcoef(of, by)[0, 1] ** 2 if of.std() > 0 else np.nan for by in maps] for of in apart]
    return xr.DataArray(shares, dims=("layer", "kind"), coords={"kind": list(KINDS)}, name="share")


@torch.no_grad()
def embedding_similarity(
    model: nn.Module, tokenizer: Any, years: ArrayLike, template: str | Callable[[int], str] = "Year: {}"
) -> tuple[Floats, NDArray[np.int64]]:
    """Cosines of a text encoder's mean last states over the words of years, and how many tokens each has.

    template: text with {} for the year, or a function that makes it. [year, year] and [year]
    """
    write = template if callable(template) else template.format
    found, counts = [], []
    for year in _years(years):
        inputs = tokenizer(write(int(year)), return_tensors="pt").to(next(model.parameters()).device)
        found.append(model(**inputs).last_hidden_state[0].mean(0))
        counts.append(inputs["input_ids"].shape[1])
    unit = nn.functional.normalize(torch.stack(found).double(), dim=-1)
    return (unit @ unit.mT).cpu().numpy(), np.array(counts)


def _years(years: ArrayLike) -> Floats:
    found = np.asarray(years, float)
    if found.ndim != 1 or len(np.unique(found)) != len(found):
        raise ValueError(f"years are a row of different numbers, got {list(found.shape)}")
    return found
