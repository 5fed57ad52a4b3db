"""Gate, pooled features, embedding, pairs and loss; scores of dimensions, and those that are split off."""

import torch
from torch import nn
from torch.nn import functional as F

from regard.models.dynamic_subspace import SubspaceLearners, importance, kept_dimensions, margin_loss, pairs

from .. import Case, Source

SOURCE = Source("authors", "adigasu/Dynamic_subspace_learners, lib/model.py, lib/loss and train.py")


def compare(case: Case):
    settings, weights = case.settings, case.weights
    width, channels = weights["embedding.weight"].shape
    model = SubspaceLearners(nn.Identity(), channels=channels, width=width).eval()
    assert model.attention is not None
    model.attention.load_state_dict(
        {
            f"layers.{int(layer[-1]) - 1}.{name}": weights[f"attention.{layer}.{name}"]
            for layer in ("layer1", "layer2", "layer3")
            for name in ("weight", "bias")
        }
    )
    model.linear.load_state_dict({name: weights[f"embedding.{name}"] for name in ("weight", "bias")})
    found, unit = model(case["features"]), case["unit"].clone().requires_grad_()
    raw = model.linear(found.pooled)
    knobs = {name: settings[name] for name in ("margin", "cutoff")}
    loss = margin_loss(unit, case["labels"], settings["beta"], **knobs)
    anchors, positives, negatives = pairs(unit, case["labels"], cutoff=settings["cutoff"])
    scores = importance(case["activations"], case["gradients"], case["last_learner"])
    return {
        "attention": found.gate,
        "pooled": found.pooled,
        "embedding": raw,
        "unit": (F.normalize(raw, dim=1), case["unit"]),
        "loss": loss,
        "grad_unit": torch.autograd.grad(loss, unit)[0],
        "anchors": anchors,
        "positives": unit[positives],
        "negatives": unit[negatives],
        "scores": scores,
        "split": kept_dimensions(scores, case["last_learner"], threshold=settings["threshold"]),
    }
