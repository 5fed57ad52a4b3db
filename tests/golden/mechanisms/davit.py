"""Blocks, and the attention inside them."""

import torch

from regard.mechanisms.davit import ChannelBlock, WindowBlock

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("reimplementation", "huggingface/pytorch-image-models, timm's davit")
NAMES = {
    r"cpe1\.proj": "place",
    r"cpe2\.proj": "place_again",
    "norm1": "norm",
    "norm2": "norm_mlp",
    r"attn\.qkv": "attention.parts",
    r"attn\.proj": "attention.output",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.2",
}


def to_ours(weights, *, second: bool, spatial: bool):
    """The first version of channel attention calls value, query and key what the paper calls query, key and value."""
    if spatial or second:
        return weights
    of = {"attn.qkv.weight", "attn.qkv.bias"} & weights.keys()
    turned = {name: torch.cat([weights[name].chunk(3)[i] for i in (1, 2, 0)]) for name in of}
    return {**weights, **turned}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    if "mlp.fc1.weight" not in weights:
        raise Unmapped("our blocks have an MLP")
    spatial = "spatial" in settings["block"]
    second = not spatial and ("v2" in settings["block"] or any("v2" in name and of for name, of in settings.items()))
    hidden, dim = weights["mlp.fc1.weight"].shape
    knobs = {
        "ratio": hidden / dim,
        "bias": "attn.qkv.bias" in weights,
        "bent": bool(settings.get("cpe_act", False)),
    }
    if spatial:
        window = settings["window_size"]
        if not isinstance(window, int):
            if len({*window}) > 1:
                raise Unmapped(f"our windows are square: {window}")
            window = window[0]
        block = WindowBlock(dim, settings["num_heads"], window=window, **knobs)
    else:
        block = ChannelBlock(dim, settings["num_heads"], scaled_by="positions" if second else "dim", **knobs)
    loaded(block, to_ours(weights, second=second, spatial=spatial), NAMES)
    inner = {"attention_output": block.attention(case["attention_input"])} if "attention_input" in case else {}
    return {**inner, **run(case, block)}
