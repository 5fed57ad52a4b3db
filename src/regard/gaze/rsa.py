"""Representational similarity: do a model and brains find the same things alike?

Kriegeskorte, Mur and Bandettini, Representational similarity analysis (Frontiers in Systems Neuroscience 2, 2008). The
ceiling is that of Nili et al., A toolbox for representational similarity analysis (PLoS Comp. Biol. 10, 2014), with
ranks throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def rsa(
    features: Mapping[str, xr.DataArray],
    subjects: ArrayLike,
    *,
    distance: Literal["correlation", "euclidean"] = "correlation",
    shuffles: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Rank correlation of a model's dissimilarities with those of subjects, -1 to 1; the mean over subjects.

    features: by name [..., batch, dim], as from `regard.gaze.brain_profile.brain_features`, of the same things in the
    same order; or dissimilarities themselves [..., batch, other]. subjects [subject, batch, batch], of people or
    sessions. The result holds a variable of each name, without batch and dim; NAME_error is the standard error over
    subjects, NaN of one. `attrs`: `ceiling_low` and `ceiling_high`, how well subjects agree with the mean of the
    others, and of all: no model can be expected above, and one within is as good as can be told (NaN of one subject);
    `chance` of each variable is what the highest of its values stays below in 95 of 100 shuffles of the things.

    NaN where all dissimilarities are one. ValueError where sizes do not fit.

    >>> rng = np.random.default_rng(0)
    >>> some = xr.DataArray(rng.normal(size=(12, 5)), dims=("batch", "dim"))
    >>> same = dissimilarities(some.values)
    >>> float(rsa({"things": some}, [same, same]).things.round(6))
    1.0
    """
    given = np.asarray(subjects, np.float64)
    if given.ndim != 3 or given.shape[1] != given.shape[2] or given.shape[1] < 3 or not np.isfinite(given).all():
        raise ValueError(f"subjects are finite [subject, batch, batch], three things or more: got {list(given.shape)}")
    n = given.shape[1]
    theirs = _standard(_ranks(_upper(given)))  # [subject, pair]
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(shuffles)]
    found: dict[str, xr.DataArray] = {}
    for name, array in features.items():
        lead = array.dims[:-2]
        if name in lead:
            raise ValueError(f"features are named otherwise than an axis, which {name!r} is")
        if array.dims[-2:] == ("batch", "other"):
            rdms = array.values.astype(np.float64)
        elif array.dims[-2:] == ("batch", "dim"):
            rdms = dissimilarities(array.values, distance=distance)
        else:
            raise ValueError(f"features {name!r} are [..., batch, dim] or [..., batch, other]: got {array.dims}")
        if rdms.shape[-2:] != (n, n):
            raise ValueError(f"features {name!r} are of {rdms.shape[-2]} things, subjects of {n}")
        ours = _standard(_ranks(_upper(rdms)))  # [..., pair]
        alike = ours @ theirs.T  # [..., subject]
        coords = {dim: array.coords[dim] for dim in lead if dim in array.coords}
        one = xr.DataArray(alike.mean(-1), dims=lead, coords=coords)
        mean, square = theirs.mean(0), np.zeros((n, n))
        rows, columns = np.triu_indices(n, 1)
        square[rows, columns] = square[columns, rows] = mean
        if shuffles:
            flat = np.nan_to_num(ours.reshape(-1, len(rows)))
            most = [float((flat @ square[order][:, order][rows, columns]).max()) for order in orders]
            one.attrs["chance"] = float(np.quantile(most, 0.95))
        found[name] = one
        with np.errstate(invalid="ignore", divide="ignore"):
            error = alike.std(-1, ddof=1) / len(theirs) ** 0.5 if len(theirs) > 1 else np.full(alike.shape[:-1], np.nan)
        found[f"{name}_error"] = xr.DataArray(error, dims=lead, coords=coords)
    low, high = _ceiling(theirs)
    return xr.Dataset(found, attrs={"things": n, "subjects": len(theirs), "ceiling_low": low, "ceiling_high": high})


def dissimilarities(features: ArrayLike, *, distance: Literal["correlation", "euclidean"] = "correlation") -> Floats:
    """Of each two things. [..., batch, dim] -> [..., batch, batch], 0 on the diagonal

    One less the correlation over features, 0 to 2, or the Euclidean distance. NaN beside a thing whose features are all
    one, under the first.
    """
    x = np.asarray(features, np.float64)
    if x.ndim < 2 or not np.isfinite(x).all():
        raise ValueError(f"features are finite numbers [..., batch, dim]: got {list(x.shape)}")
    if distance == "euclidean":
        square = (x**2).sum(-1)
        apart = square[..., :, None] + square[..., None, :] - 2 * x @ np.swapaxes(x, -1, -2)
        found = np.sqrt(np.maximum(apart, 0))
    elif distance == "correlation":
        found = 1 - (y := _standard(x)) @ np.swapaxes(y, -1, -2)
    else:
        raise ValueError(f'distance is "correlation" or "euclidean": got {distance!r}')
    diagonal = np.arange(x.shape[-2])
    found[..., diagonal, diagonal] = 0
    return found


def _ceiling(theirs: Floats) -> tuple[float, float]:
    """How well subjects [subject, pair] agree with the mean of the others, and with that of all."""
    if len(theirs) < 2:
        return float("nan"), float("nan")
    total = theirs.sum(0)
    low = np.mean([row @ _standard(total - row) for row in theirs])
    return float(low), float(np.mean(theirs @ _standard(total)))


def _upper(rdms: Floats) -> Floats:
    row, column = np.triu_indices(rdms.shape[-1], 1)
    return rdms[..., row, column]


def _ranks(values: Floats) -> Floats:
    """Along the last axis; equal values share the mean of their ranks."""

    def of(row: Floats) -> Floats:
        if np.isnan(row).any():
            return np.full(len(row), np.nan)
        _, which, counts = np.unique(row, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[which]

    return np.apply_along_axis(of, -1, values)


def _standard(values: Floats) -> Floats:
    """Mean 0 and length 1 along the last axis; NaN where all are one."""
    centred = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(length > 1e-12 * np.abs(values).max(-1, keepdims=True), centred / length, np.nan)
