"""A pooler, with the authors' context of the mean, and a linear layer after it in some cases."""

from torch.nn import functional as F

from regard.mechanisms.low_rank_heads import low_rank_heads

from .. import Case, Source

SOURCE = Source("reimplementation", "JohnGiorgi/compact-multi-head-self-attention-pytorch, LAMA")


def compare(case: Case):
    weights, leaves = case.weights, case.leaves("input")
    mask = case.get("mask")
    factors = weights["_attention._p"], weights["_attention._q"]
    pooled, attention = low_rank_heads(leaves["input"], *factors, mask=None if mask is None else mask.bool())
    if "projection_layer.weight" in weights:
        pooled = F.linear(pooled.flatten(1), weights["projection_layer.weight"], weights.get("projection_layer.bias"))
    elif case["output"].ndim == 2:
        pooled = pooled.flatten(1)
    return {"attention": attention, "output": pooled, **case.gradients(pooled, leaves)}
