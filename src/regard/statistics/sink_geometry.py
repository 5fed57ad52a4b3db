"""Reference frames: is attention anchored at one token, at several, or at both ends; and the shape of its graph.

Ruscio, Nanni and Silvestri, What are you sinking? A geometric approach on attention sink (arXiv:2508.02546). The
paper's text was not at hand beyond its abstract and the start of its introduction, nor any code, so definitions and
thresholds here are ours. From the abstract: a centralised frame has one dominant reference point, a distributed one
several weaker ones, a bidirectional one two, at the start and at the end; position encodings decide which. From what is
cited of the paper: topology (Betti numbers of the attention graph at thresholds) and spectrum (algebraic connectivity,
centralisation, likeness to a star).

A key is a reference point of a head where its sink score (see `sink_score`) is above what even attention over the same
keys would give it, by `threshold`. Keys that fewer than 2 / threshold queries can see are left out: of so few, a single
one moves the score. The graph of a layer has the tokens as its nodes, and as its edges the mean of the layer's heads,
from either side. Betti numbers are those of the graph itself, without filled triangles: its components, and its
independent cycles. How far a layer's attention is from that of the one before is the Jensen-Shannon divergence, which,
unlike that of Kullback and Leibler, is finite where a weight is 0. Fisher information, which needs a loss, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from .. import padding
from .sink_score import sink_score


def reference_frame(stack: xr.Dataset, *, threshold: float = 0.1, dominant: float = 0.5) -> xr.Dataset:
    """Which tokens a stack's heads are anchored at, and the kind of frame that these make.

    stack: a node of a recording of "received". threshold: how much more than even attention a reference point gets.
    dominant: share of all reference points, over layers and heads, that one token has in a centralised frame, and the
    first and the last token together, with half of it each at least, in a bidirectional one.

    `reference` [batch, key]: share of the heads, 0 to 1, of which the key is a reference point. `anchored` [batch]:
    share of the heads that have one. `frame` [batch]: "centralised", "distributed", "bidirectional", or "" where there
    is none.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "received") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> found = reference_frame(recording.tree["language_model"].to_dataset())
    >>> found["frame"].dims
    ('batch',)
    """
    score = sink_score(stack).values  # [batch, layer, head, key]
    real, sees = padding.real(stack, "query").values.astype(float), _sees(stack)
    keys = padding.real(stack, "key").values
    visible = sees * keys[:, None]  # [batch, query, key]
    even = visible / np.maximum(visible.sum(-1, keepdims=True), 1)
    seen_by = np.einsum("bq,bqk->bk", real, visible)
    even = np.einsum("bq,bqk->bk", real, even) / np.maximum(seen_by, 1)
    judged = (seen_by >= min(2 / threshold, visible.shape[1])) & keys
    point = (np.nan_to_num(score) - even[:, None, None] > threshold) & judged[:, None, None]

    counts = point.sum((1, 2))
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    row = np.arange(len(share))
    first, last = share[row, keys.argmax(1)], share[row, keys.shape[1] - 1 - keys[:, ::-1].argmax(1)]
    frame = np.full(len(share), "distributed", object)
    frame[share.max(-1) >= dominant] = "centralised"
    frame[(np.minimum(first, last) >= dominant / 2)] = "bidirectional"
    frame[counts.sum(-1) == 0] = ""
    return xr.Dataset(
        {
            "reference": (("batch", "key"), point.mean((1, 2)), {"units": "share of heads"}),
            "anchored": (("batch",), point.any(-1).mean((1, 2)), {"units": "share of heads"}),
            "frame": (("batch",), frame),
        },
        {"key": stack["key"].values},
    )


def sink_geometry(
    stack: xr.Dataset,
    *,
    threshold: float = 0.1,
    dominant: float = 0.5,
    edges: Sequence[float] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
) -> xr.Dataset:
    """The reference frame of a stack, and the shape of each layer's graph of attention.

    stack: a node of a recording of "rows", the maps themselves; where these do not fit, `reference_frame` needs none.
    threshold, dominant: as there. edges: weights from which on an edge counts for Betti numbers.

    Beside what `reference_frame` gives, of each layer [batch, layer]: `centralisation`, Freeman's, of the attention
    that tokens receive (0 even, 1 all on one); `star_likeness`, the share of all edges that end at the token of the
    heaviest ones (2 / n even, 1 a star); `algebraic_connectivity`, the second smallest eigenvalue of the graph's
    Laplacian (0 where it falls apart); `divergence` from the layer before (nats, at most ln 2; NaN in the first), mean
    over queries; and `betti_0` and `betti_1` [batch, layer, edge].

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> with regard.record(model, "rows") as recording:
    ...     _ = model(**tokenizer("to be or not to be", return_tensors="pt"))
    >>> found = sink_geometry(recording.tree["language_model"].to_dataset())
    >>> found["betti_0"].dims
    ('batch', 'layer', 'edge')
    """
    if "rows" not in stack:
        raise ValueError("graphs are made of maps: regard.record(model, 'rows'); reference_frame needs 'received' only")
    if stack.attrs["kind"] != "self" or not np.array_equal(stack["query"], stack["key"]):
        raise ValueError("a graph of tokens is made of self-attention over a whole sequence, from its start on")
    maps = stack["rows"].fillna(0.0)
    real = padding.real(stack, "query")
    found = reference_frame(stack.assign(received=(maps * real).sum("query")), threshold=threshold, dominant=dominant)
    mean = maps.mean("head").transpose("batch", "layer", "query", "key").values.astype(float)
    batch, layer = mean.shape[:2]
    measured = {
        name: np.full((batch, layer), np.nan)
        for name in ("centralisation", "star_likeness", "algebraic_connectivity", "divergence")
    }
    betti = np.zeros((2, batch, layer, len(edges)), int)
    for b in range(batch):
        tokens = np.flatnonzero(real.values[b])
        part = mean[b][:, tokens[:, None], tokens]
        for i, weights in enumerate(part):
            graph = (weights + weights.T) / 2
            np.fill_diagonal(graph, 0)
            received, n = weights.mean(0), len(tokens)
            measured["centralisation"][b, i] = (received.max() - received).sum() / max(n - 1, 1)
            measured["star_likeness"][b, i] = graph.sum(0).max() / max(graph.sum() / 2, 1e-30)
            measured["algebraic_connectivity"][b, i] = _connectivity(graph)
            betti[:, b, i] = np.transpose([_betti(graph >= edge) for edge in edges])
            if i:
                measured["divergence"][b, i] = _divergence(weights, part[i - 1]).mean()
    by_layer = ("batch", "layer")
    return found.assign(
        {name: (by_layer, values) for name, values in measured.items()}
        | {f"betti_{k}": ((*by_layer, "edge"), betti[k]) for k in (0, 1)}
    ).assign_coords(layer=stack["layer"].values, edge=list(edges))


def _sees(stack: xr.Dataset) -> np.ndarray:
    """Which keys a query may see by position. [query, key]"""
    apart = stack["query"].values[:, None] - stack["key"].values
    return (apart >= 0) if stack.attrs["causal"] else np.ones(apart.shape, bool)


def _connectivity(graph: np.ndarray) -> float:
    if len(graph) < 2:
        return np.nan
    return float(np.linalg.eigvalsh(np.diag(graph.sum(0)) - graph)[1])


def _betti(edges: np.ndarray) -> tuple[int, int]:
    """Components, and independent cycles, of an undirected graph without loops."""
    n = len(edges)
    reach = np.arange(n)
    while True:  # each node takes the smallest label around it
        least = np.minimum(reach, np.where(edges, reach, n).min(1, initial=n))
        if (least == reach).all():
            break
        reach = least
    components = len(np.unique(reach))
    return components, int(edges.sum()) // 2 - n + components


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon, nats, of each row of p and q."""

    def entropy(weights: np.ndarray) -> np.ndarray:
        return -(weights * np.log(weights, where=weights > 0, out=np.zeros_like(weights))).sum(-1)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
