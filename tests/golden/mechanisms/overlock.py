"""The block, and the operator inside it."""

import torch.nn.functional as F

from regard.mechanisms.overlock import BRANCHES, OVERVIEW, ContextMixBlock

from .. import Case, Source
from ._maps import loaded, run

SOURCE = Source("authors", "LMMMEng/OverLoCK, models/contmix.py")
NAMES = {
    "rpb1": "mix.offsets_small",
    "rpb2": "mix.offsets",
    "dwconv1": "place",
    "dwconv2": "place_again",
    "norm1": "norm",
    "norm2": "norm_mlp",
    "weight_query": "mix.query",
    r"weight_key\.1": "mix.key.0",
    r"weight_key\.2": "mix.key.1",
    "weight_value": "mix.value",
    "weight_proj": "mix.make",
    "fusion_proj": "fuse",
    r"lepe\.1": "local_norm",
    r"se_layer\.proj": "squeeze",
    "proj": "project",
    r"mlp\.0": "mlp.first",
    r"mlp\.2": "mlp.place",
    r"mlp\.3\.gamma": "mlp.gain",
    r"mlp\.3\.beta": "mlp.offset",
    r"mlp\.4": "mlp.last",
    "ls1": "scale",
    "ls2": "scale_mlp",
}


def compare(case: Case):
    settings, weights = case.settings, {}
    for name, value in case.weights.items():
        if name.startswith("lepe.0."):
            _, _, layer, kind = name.split(".")
            name = f"local.branches.{_branch(case, layer)}.{int('bn' in layer)}.{kind}"
        weights[name] = value
    block = ContextMixBlock(
        settings["dim"],
        kernel=settings["kernel_size"],
        small=settings["smk_size"],
        heads=settings["num_heads"],
        ratio=len(case.weights["mlp.0.weight"]) / settings["dim"],
        scale=1.0 if "ls1.weight" in case.weights else None,
    )
    loaded(block, weights, NAMES)
    x = case["mix_input"]
    found = {"mixed": block.mix(x), "value": block.mix.value(x), "query": block.mix.query(x)}
    return {
        **found,
        "key": block.mix.key(F.adaptive_avg_pool2d(x, OVERVIEW)),
        "logits": block.mix.logits(x),
        **run(case, block),
    }


def _branch(case: Case, layer: str) -> int:
    """Their branches are named by width and dilation."""
    if layer in ("lk_origin", "origin_bn"):
        return 0
    width, apart = (int(n) for n in layer.rpartition("_k")[2].split("_"))
    return 1 + BRANCHES[case.settings["kernel_size"]].index((width, apart))
