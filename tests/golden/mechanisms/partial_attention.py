"""The three kinds, in evaluation mode."""

from regard.mechanisms.partial_attention import PartialChannel, PartialSelf, PartialSpatial, buckets

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("authors", "haiduo/PartialNet, models/partialnet.py and models/irpe.py")
CHANNEL = {"partial_conv3": "convolution", r"attn\.cfc1": "mix", r"attn\.bn": "norm_gate"}
SPATIAL = {"conv": "convolution", "conv_attn": "score", "norm": "norm_gated", "norm2": "norm_convolved"}
SELF = {
    "partial_conv3": "convolution",
    r"attn\.qkv": "attention.parts",
    r"attn\.proj": "attention.output",
    r"attn\.rpe_k\.lookup_table_bias": "attention.bias",
}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    if settings["kind"] == "channel":
        return run(case, loaded(PartialChannel(settings["dim"], split=settings["n_div"]), weights, CHANNEL))
    if settings["kind"] == "self":
        heads = len(weights["attn.rpe_k.lookup_table_bias"])
        module = loaded(PartialSelf(settings["dim"], split=settings["n_div"], heads=heads), weights, SELF)
        return {"bucket": buckets(*case["input"].shape[2:]), **run(case, module)}
    if settings.get("n_head", 1) != 1:
        raise Unmapped("the gate of positions is one")
    return run(case, loaded(PartialSpatial(settings["dim"], share=settings["partial"]), weights, SPATIAL))
