"""The authors' layer, and its moving average by itself."""

from regard.mechanisms.mega import Mega, MovingAverage

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "facebookresearch/mega, fairseq modules")
TOLERANCE = dict.fromkeys(("input", "output", "weights", "kernel", "grad"), 2e-5)
NAMES = {
    "norm.norm.": "norm.",
    "v_proj.": "to_value.",
    "mx_proj.": "to_parts.",
    "h_proj.": "to_output.",
    "rel_pos_bias.rel_pos_bias": "bias.table",
    "rel_pos_bias.": "bias.",
}


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("input")
    mask = None if "padding" not in case else ~case["padding"].bool()
    knobs = {"order": settings["ema_dim"], "bidirectional": settings.get("bidirectional", False)}
    knobs["truncation"] = settings.get("truncation")
    if "attention" not in settings:
        average = MovingAverage(settings["dim"], **knobs).to(case["input"].dtype)
        average.load_state_dict(case.weights)
        output = average(leaves["input"], mask=mask)
        kernel = average.kernel(case["input"].shape[1])
        return {"output": output, "kernel": kernel, **case.gradients(output, leaves)}
    if not settings.get("norm", "layernorm before").startswith("layernorm before"):
        raise Unmapped(f"ours has no norm but a layer's, before: {settings['norm']}")
    chunk = settings.get("chunk")
    layer = Mega(
        settings["dim"],
        z=settings["z_dim"],
        value=settings["value_dim"],
        attention=settings["attention"],
        chunk=None if chunk is None or chunk < 0 else chunk,
        causal=settings.get("causal", False),
        bias=settings["relative_bias"],
        positions=settings["max_positions"],
        **knobs,
    ).to(case["input"].dtype)
    layer.load_state_dict(_renamed(case.weights, layer))
    output = layer(leaves["input"], mask=mask)
    weights = layer.weights(case["input"], mask=mask)
    return {"output": output, "weights": weights, **case.gradients(output, leaves)}


def _renamed(weights, layer):
    found = {}
    for name, value in weights.items():
        theirs = next((t for t in NAMES if name.startswith(t)), "")
        found[NAMES.get(theirs, "") + name.removeprefix(theirs)] = value
    if "bias.table" in found:  # theirs is as long as the most positions, also where chunks are shorter
        extra = (len(found["bias.table"]) - len(layer.bias.table)) // 2
        found["bias.table"] = found["bias.table"][extra : len(found["bias.table"]) - extra]
    return found
