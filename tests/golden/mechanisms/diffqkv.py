"""Attention with its own numbers of key and value heads, causal ones aligned at the end."""

from regard.mechanisms.diffqkv import diffqkv

from .. import Case, Source

SOURCE = Source("authors", "xiayuqing0622/flex_head_fa, attention_ref of its tests")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    mask = case.get("mask")
    knobs = {
        "causal": case.settings["causal"],
        "scale": case.settings["scale"],
        "mask": None if mask is None else mask.bool()[:, None, None],
    }
    output = diffqkv(**leaves, **knobs)
    weights = diffqkv.spec.weights(case["query"], case["key"], **knobs)
    return {"weights": weights, "output": output, **case.gradients(output, leaves)}
