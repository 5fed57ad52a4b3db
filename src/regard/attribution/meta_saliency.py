"""Meta-saliency: a map of the model after one step of learning the class that is to be explained.

Rebuffi, Fong, Ji and Vedaldi, There and Back Again (arXiv:2004.02866), section 5; the step is that of the authors'
code, one of gradient descent on the cross-entropy of the target, and so is its size. Each sample has a step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from .. import catalog
from ..prediction import Prediction, Target, predict


def meta_saliency(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    of: str = "normgrad",
    rate: float = 1e-4,
    **knobs: Any,
) -> xr.DataArray:
    """The map of another method, once the model has learned a little more of the target. As that method's.

    of: a file of this room, with its `knobs`. rate: of the one step, as a factor of the gradient. `score` is that
    before the step. Weights are put back, to the bit; needs a copy of them.
    """
    explain = catalog.method("attribution", of.replace("-", "_"))
    if explain is meta_saliency:
        raise ValueError("meta_saliency(of='meta_saliency'): give another method")
    with predict(model, inputs, target) as prediction:
        weights = [p for p in model.parameters() if p.dtype.is_floating_point]
        before, wanted = [p.detach().clone() for p in weights], [p.requires_grad for p in weights]
        parts: list[xr.DataArray] = []
        try:
            for i in range(len(prediction.target)):
                one = prediction.sample(i)
                for weight in weights:
                    weight.requires_grad_()
                slopes = torch.autograd.grad(_loss(one), weights, allow_unused=True)
                with torch.no_grad():
                    for weight, slope in zip(weights, slopes):
                        if slope is not None:
                            weight.sub_(rate * slope)
                parts.append(explain(model, one.inputs, one.question, **knobs))
                _restore(weights, before)
        finally:
            _restore(weights, before)
            for weight, was in zip(weights, wanted):
                weight.requires_grad_(was)
        whole = xr.concat(parts, "batch").rename("meta_saliency")
        with torch.no_grad():
            score = prediction.score().double().cpu().numpy()
        return whole.assign_coords(score=("batch", score)).assign_attrs(long_name="meta_saliency")


def _loss(prediction: Prediction) -> Tensor:
    """Cross-entropy of the target, among all or beside the one that it is explained against."""
    if prediction.question.against is not None:
        return softplus(-prediction.score()).mean()
    logits = prediction.logits()
    if logits.shape[1] == 1:
        kind = type(prediction.model).__name__
        raise ValueError(f"meta_saliency: {kind} gives one number, so there is no class of several to learn")
    return cross_entropy(logits, prediction.target)


@torch.no_grad()
def _restore(weights: list[nn.Parameter], before: list[Tensor]) -> None:
    for weight, was in zip(weights, before):
        weight.copy_(was)
