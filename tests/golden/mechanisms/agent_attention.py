"""The authors' layers of PVT, where keys may be fewer, and of DeiT, with a class token."""

from regard.mechanisms.agent_attention import AgentAttention

from .. import Case, Source

SOURCE = Source("authors", "LeapLabTHU/Agent-Attention, agent_pvt.py and agent_deit.py")
NAMES = {
    "query.weight": "q.weight",
    "query.bias": "q.bias",
    "key_value.weight": "kv.weight",
    "key_value.bias": "kv.bias",
    "output.weight": "proj.weight",
    "output.bias": "proj.bias",
    "local.weight": "dwc.weight",
    "local.bias": "dwc.bias",
    "reduce.weight": "sr.weight",
    "reduce.bias": "sr.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "key_bias": "an_bias",
    "key_rows": "ah_bias",
    "key_columns": "aw_bias",
    "key_class": "ac_bias",
    "query_bias": "na_bias",
    "query_rows": "ha_bias",
    "query_columns": "wa_bias",
    "query_class": "ca_bias",
}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in weights:
            joined = weights[f"qkv.{kind}"]
            weights[f"q.{kind}"], weights[f"kv.{kind}"] = joined.split([len(joined) // 3, len(joined) // 3 * 2])
    layer = AgentAttention(
        case["input"].shape[-1],
        heads=settings["heads"],
        shape=tuple(settings["shape"]),
        agents=settings["agents"],
        class_token=settings["class_token"],
        reduction=settings.get("spatial_reduction", 1),
        qkv_bias=settings["qkv_bias"],
    ).to(case["input"].dtype)
    # Theirs have agents last where queries are asked.
    for name in ("ha_bias", "wa_bias", "ca_bias"):
        if name in weights:
            weights[name] = weights[name].movedim(-1, 2)
    state = {ours: weights[NAMES[ours]] for ours in layer.state_dict()}
    layer.load_state_dict({ours: theirs.reshape(layer.state_dict()[ours].shape) for ours, theirs in state.items()})
    leaves = case.leaves("input")
    output = layer(leaves["input"])
    return {"output": output, **case.gradients(output, leaves)}
