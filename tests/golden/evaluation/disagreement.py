"""Correlations of attributions, and of their top."""

import itertools

import numpy as np
import xarray as xr

from regard.evaluation.disagreement import disagreement, kendall_top

from .. import Case, Source

SOURCE = Source("authors", "sfschouten/court-of-xai, kendall_top_k and correlation_measures")


def compare(case: Case):
    given, settings = case["attributions"].numpy(), case.settings
    named = {str(i): xr.DataArray(of, dims=("batch", "token")) for i, of in enumerate(given)}
    found = disagreement(named, k=settings["k"])

    def tops(k: np.ndarray, penalty: float = 0.5) -> np.ndarray:
        """[method, method, batch], k one of each"""
        values = np.empty(k.shape)
        for i, j, b in itertools.product(*map(range, k.shape)):
            values[i, j, b] = kendall_top(given[i, b], given[j, b], int(k[i, j, b]), penalty=penalty)
        return values

    whole = np.full((len(given), len(given), given.shape[1]), settings["k"])
    return {
        **{name: found[name].values for name in ("kendall", "spearman", "pearson", "weighted", "top")},
        "top_nonzero": tops(case["top_nonzero_k"].numpy()),
        "top_share": tops(case["top_share_k"].numpy()),
        "top_penalty": np.stack([tops(whole, penalty) for penalty in settings["penalties"]]),
    }
