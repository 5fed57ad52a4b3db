"""Graphs of attention: arithmetic only, since the paper's own definitions were not at hand."""

import xarray as xr

from regard.statistics.sink_geometry import sink_geometry

from .. import Case, Source

SOURCE = Source("reimplementation", "networkx and scipy, for the measures of graphs")


def compare(case: Case):
    maps = case["weights"].numpy()
    layers, heads, n, _ = maps.shape
    stack = xr.Dataset(
        {"rows": (("batch", "layer", "head", "query", "key"), maps[None])},
        {"layer": range(layers), "head": range(heads), "query": range(n), "key": range(n)},
        {"kind": "self", "causal": case.settings["causal"]},
    )
    found = sink_geometry(stack, edges=case.settings["edges"])
    return {name: found[name].values[0] for name in ("algebraic_connectivity", "betti_0", "betti_1", "divergence")}
