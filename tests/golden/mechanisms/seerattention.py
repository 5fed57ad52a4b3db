"""The gate, and the blocks that it chooses."""

import re

from regard.mechanisms.seerattention import Gate, choose

from .. import Case, Source

SOURCE = Source("authors", "microsoft/SeerAttention, prefill_sparse/attn_gate.py and modules/common.py")
POOLS = {"avg": "mean", "max": "max", "min": "min"}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    query, key = case["query_before_rope"], case["key_before_rope"]
    of_queries, of_keys = (
        tuple(POOLS[p] for p in re.findall("avg|max|min", part)) for part in settings["gate"][1:].split("_K")
    )
    knobs = {"queries": of_queries, "keys": of_keys, "block": settings["block"], "width": settings["hidden"]}
    gate = Gate(query.shape[-1], query.shape[1], key.shape[1], base=settings["rope_base"], **knobs).to(query.dtype)
    names = {"mask_linear_q.weight": "query", "mask_linear_k.weight": "key"}
    gate.load_state_dict({names[name]: weight for name, weight in weights.items()})
    logits = gate.logits(query, key, positions_of=(case["cos"], case["sin"]))
    scores = gate(query, key)
    by = {"threshold": settings["threshold"]}
    dense = settings["last_block_dense"]
    return {
        "logits": logits,
        "scores": scores,
        "mask_threshold": choose(scores, **by, last_dense=dense),
        "mask_threshold_plain": choose(scores, **by, last_dense=False),
        "mask_ratio": choose(scores, ratio=settings["nz_ratio"], last_dense=dense),
    }
