"""Onset and lifetime of planted sinks; kinds are named otherwise, as the module says."""

import numpy as np
import torch
import xarray as xr

from regard import Site
from regard.statistics.secondary_sinks import SinkReader, secondary_sinks

from .. import Case, Source

SOURCE = Source(
    "authors", "JeffreyWong20/Secondary-Attention-Sinks, hidden_state_norm_detection and sink_labeling_machine"
)


def compare(case: Case):
    hidden, reader = case["hidden"], SinkReader()
    layers, tokens = hidden.shape[:2]
    for layer, states in enumerate(hidden):
        site = Site(f"layers.{layer}", "language_model", layer, causal=True)
        added = states - hidden[layer - 1] if layer else torch.zeros_like(states)  # it sees no growth in the first
        reader.mlp(site, added[None])
        reader.hidden(site, states[None])
    stack = xr.Dataset(
        {"received": (("batch", "layer", "head", "key"), np.ones((1, layers, 1, tokens)))},
        {"layer": range(layers), "query": range(tokens), "key": range(tokens)},
        {"kind": "self", "causal": True},
    )
    knobs = {name: case.settings[name] for name in ("cosine", "shortest")}
    found = secondary_sinks(stack, reader, **knobs)
    starts, there = int(case["start_layer"]), int(found["lifetime"][0, 0])  # of the first token
    return {
        "onset": found["onset"].values[0],
        "lifetime": found["lifetime"].values[0],
        "start_layer": int(found["onset"][0, 0]),
        "end_layer": starts + there,
    }
