"""Entropy of patches, and what they matter by what global ones give them."""

import torch

from regard.interventions.vflowopt import importance, patch_entropy

from .. import Case, Source
from ._calls import call

SOURCE = Source("authors", "sihany077/VFlowOpt, siglip_encoder.py and llava_qwen_training_free.py")


def compare(case: Case):
    settings = case.settings
    entropy = torch.stack([patch_entropy(picture, settings["patch"]) for picture in case["pixels_u8"]])
    weights = call(case["weights"], causal=False).weights
    every = torch.ones(entropy.shape, dtype=torch.bool)
    value = importance(weights, every, t=settings["t"]) + settings["alpha_v"] * entropy.softmax(1)
    return {"entropy": entropy, "importance": value}
