"""Softmax attention chunk by chunk."""

from regard.mechanisms.memory_efficient import memory_efficient

from .. import Case, Source

SOURCE = Source("reimplementation", "AminRezaei0x443/memory-efficient-attention, efficient_dot_product_attention_pt")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    knobs = {name: case.settings[name] for name in ("causal", "query_chunk", "key_chunk")}
    output = memory_efficient(**leaves, mask=case.get("mask"), **knobs)
    return {"output": output, **case.gradients(output, leaves)}
