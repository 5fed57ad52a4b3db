"""The authors' block of heads."""

import torch

from regard.mechanisms.gaussian_attention import GaussianAttention

from .. import Case, Source

SOURCE = Source("authors", "gioannides/Gaussian-Adaptive-Attention, GaussianBlock.py")


def compare(case: Case):
    heads, gaussians, weights = case.settings["num_heads"], case.settings["num_gaussians"], case.weights
    layer = GaussianAttention(heads, gaussians, axis=case.settings["norm_axis"]).to(case["input"].dtype)
    for name, learned in (("mean_offsets", layer.offsets), ("c", layer.widths)):
        learned.data = torch.stack([weights[f"attention_heads.{head}.{name}"] for head in range(heads)])
    leaves = case.leaves("input")
    output = layer(leaves["input"])
    return {"output": output, "attention": layer.weights(case["input"]), **case.gradients(output, leaves)}
