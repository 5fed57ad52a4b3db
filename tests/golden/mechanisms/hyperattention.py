"""With the directions and draws of the file."""

import itertools

import torch

from regard.mechanisms.hyperattention import _planned, hyperattention, parts, rank

from .. import Case, Source

SOURCE = Source("authors", "insuhan/hyper-attn, hyper_attn.py")


def compare(case: Case):
    settings = case.settings
    leaves = case.leaves("query", "key", "value")
    names = itertools.takewhile(lambda name: name in case, (f"sampled{i}" for i in itertools.count()))
    knobs = {
        "block": settings["block_size"],
        "sample": settings["sample_size"],
        "least": settings["min_seq_len"],
        "projections": case["projections"],
        "sampled": [case[name] for name in names],
        "mask_sampled": settings["sample_mask_applied"],
    }
    how = {"causal": settings["causal"], "scale": settings["scale"]}
    output = hyperattention(**leaves, **how, **knobs)
    lse = parts(*leaves.values(), _planned(**knobs), mask=None, **how)[1]
    weights = hyperattention.spec.weights(leaves["query"], leaves["key"], mask=None, **how, **knobs)
    bits = torch.arange(len(case["order"]))[:, None] >> torch.arange(case["projections"].shape[1]) & 1
    return {
        "output": output,
        "log_sum_exp": lse,
        "bucket_query": rank(case["query"], case["projections"]),
        "bucket_key": rank(case["key"], case["projections"]),
        "order": rank(2 * bits[None, None] - 1, torch.eye(bits.shape[1], dtype=torch.long))[0, 0],
        "weights": (weights @ leaves["value"], case["output"]),
        **case.gradients(output, leaves),
    }
