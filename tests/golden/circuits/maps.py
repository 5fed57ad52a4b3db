"""Shares of a random relation that heads map, and what one head amplifies, from given matrices."""

import numpy as np
import torch
from torch import nn

from regard.circuits.maps import Heads

from .. import Case, Source

SOURCE = Source("authors", "amitelhelo/MAPS, src/maps.py")
APART = ("output",)  # of the projection, and given
ACTIVATIONS = {"gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"), "gelu": nn.functional.gelu}


def compare(case: Case):
    settings, weights = case.settings, case.weights

    def first(embedded):
        normed = nn.functional.layer_norm(
            embedded, embedded.shape[-1:], weights["norm.weight"], weights["norm.bias"], settings["norm_eps"]
        )
        wide = nn.functional.linear(normed, weights["up.weight"], weights["up.bias"])
        wide = ACTIVATIONS[settings["act"]](wide)
        return nn.functional.linear(wide, weights["down.weight"], weights["down.bias"])

    layers = range(len(case["value"]))
    heads = Heads(
        case["embedding"],
        case["unembedding"],
        {layer: case["value"][layer] for layer in layers},
        {layer: case["output"][layer] for layer in layers},
        first if settings["first_mlp"] else None,
    )
    found = heads.scores(torch.stack([case["sources"], case["targets"]], 1), k=settings["k"])
    most = heads.salient(
        settings["salient_layer"],
        settings["salient_head"],
        tokens=settings["k_salient"],
        mappings=settings["k_mappings"],
    )
    # their shares are single precision
    shares = {name: found[of].values.astype(np.float32) for name, of in (("scores", "score"), ("suppression",) * 2)}
    return {**shares, "salient_tokens": most["source"].values, "salient_mappings": most["target"].values}
