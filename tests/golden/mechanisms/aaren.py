"""A layer around the scan: its heads are averaged, and one map follows."""

import torch

from regard.mechanisms.aaren import aaren

from .. import Case, Source

SOURCE = Source("reimplementation", "attention_as_rnn, a public one by associative scan")


def compare(case: Case):
    leaves, weights = case.leaves("input"), case.weights
    key, value = torch.einsum("bti,ihdc->cbhtd", leaves["input"], weights["kv_kernel"])
    mixed = aaren(weights["q_kernel"][None, :, None], key, value, scale=case.settings["scale"]).mean(1)
    output = mixed @ weights["to_out.weight"].mT + weights["to_out.bias"]
    return {"output": output, **case.gradients(output, leaves)}
