"""Rounds of competition from a given start."""

from regard.models.slot_attention import SlotAttention

from .. import Case, Source, Unmapped

SOURCE = Source("reimplementation", "lucidrains/slot-attention, SlotAttention")
NAMES = {
    "slots_mu": "mean",
    "slots_logsigma": "log_deviation",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "norm_input": "norm_inputs",
    "norm_pre_ff": "norm_mlp",
}


def compare(case: Case):
    weights, leaves = dict(case.weights), case.leaves("input")
    biases = [weights.pop(f"to_{part}.bias") for part in "qkv"]
    if any(bias.any() for bias in biases):
        raise Unmapped("projections have no bias, as in the paper")
    state = {}
    for name, value in weights.items():
        module, dot, rest = name.partition(".")
        state[NAMES.get(module, module) + dot + rest] = value
    settings = case.settings
    model = SlotAttention(
        case["input"].shape[-1],
        case["start"].shape[-1],
        slots=settings["slots"],
        rounds=settings["rounds"],
        hidden=len(weights["mlp.0.weight"]),
        epsilon=settings["epsilon"],
    )
    model.load_state_dict(state)
    output = model(leaves["input"], start=case["start"])
    return {"output": output, **case.gradients(output, leaves)}
