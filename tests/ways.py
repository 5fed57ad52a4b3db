"""Ways in which tests run models, and how a model must look afterwards."""

from __future__ import annotations

import torch
from transformers import AttentionInterface

from regard import seam
from regard.functions import innermost


def first(output):
    return output[0] if not hasattr(output, "logits") else output.logits


def is_clean(model):
    """Whether nothing of a session is left, on the model or in transformers."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = [h for h in hooks if getattr(innermost(h), "__module__", "").startswith("regard")]
    return not seam._sessions and AttentionInterface.get_interface is seam._get_interface and not ours


def checkpoint(model, **settings):
    """Under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(*[settings] * bool(settings))


class Scale:
    """Multiply the weights on the first key, and renormalise."""

    def __init__(self, by):
        self.by = by

    def weights(self, call, weights, rows):
        factors = torch.ones(weights.shape[-1])
        factors[0] = self.by
        weights = weights * factors
        return weights / weights.sum(-1, keepdim=True)
