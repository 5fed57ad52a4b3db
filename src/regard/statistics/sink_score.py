"""Sink score: the mean weight that a key receives from the queries that come at or after it.

Gu et al., When Attention Sink Emerges in Language Models: An Empirical View (arXiv:2410.10781), section 3.2, where a
head has a sink at a key whose score is above 0.3.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from ..padding import real


def sink_score(stack: xr.Dataset) -> xr.DataArray:
    """Mean weight on each key over all queries at or after it, 0 to 1. [batch, layer, head, key]

    stack: a node of a recording of "received". Padding counts as no query. In attention that is not causal every query
    counts. Where no query is left, as on padding at the end, it is NaN.

    A window or a mask that keeps a query from a key counts as a weight of 0. Keys near the end have few queries, their
    own among them, so their scores say little.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "received") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> scores = sink_score(recording.tree["language_model"].dataset)
    >>> scores.dims
    ('batch', 'layer', 'head', 'key')
    """
    if "received" not in stack:
        raise ValueError("a sink score is made from what keys receive: regard.record(model, 'received')")
    keys, queries = stack["key"].values, stack["query"].values
    counted = real(stack, "query").values.astype(float)
    sees = queries[:, None] >= keys if stack.attrs["causal"] else np.ones((len(queries), len(keys)), bool)
    n = xr.DataArray(counted @ sees, dims=("batch", "key"))
    scores = stack["received"] / n.where(n > 0)
    scores.attrs = {"long_name": "Sink score", "units": "share", "range": [0, 1]}
    return scores.rename("sink_score").transpose("batch", "layer", "head", "key")
