"""The authors' attention: its query projection holds, of each key head, queries and then gates."""

import torch

from regard.mechanisms.gated_attention import gated_attention

from .. import Case, Source, Unmapped
from ._llama import attention, run

SOURCE = Source("authors", "qiuzh20/gated_attention, Qwen3Attention")


def compare(case: Case):
    settings = case.settings
    if settings["qk_norm"]:
        raise Unmapped("Llama's attention has no norm of queries and keys")
    heads, kv_heads, width = settings["heads"], settings["kv_heads"], settings["head_dim"]
    rows = case.weights["q_proj.weight"].unflatten(0, (kv_heads, -1))
    queries, gates = (part.flatten(0, 1) for part in rows.tensor_split([heads // kv_heads * width], 1))
    weights = {**case.weights, "q_proj.weight": queries}
    model, config = attention(weights, heads=heads, kv_heads=kv_heads, rope_theta=settings["rope_theta"])
    gated_attention(model, granularity=settings["granularity"])
    with torch.no_grad():
        model["attention"].gate.weight.copy_(gates)
    leaves = case.leaves("hidden")
    output = run(model, config, leaves["hidden"], causal=settings.get("causal", True))
    return {"output": output, **case.gradients(output, leaves)}
