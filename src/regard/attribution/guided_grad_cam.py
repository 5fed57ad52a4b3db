"""Guided Grad-CAM.

Selvaraju et al., Grad-CAM (arXiv:1610.02391), section 3.2: the map, pixel by pixel, times the gradient that
Springenberg et al. (arXiv:1412.6806) let through ReLUs only where it is positive, here by Captum. The paper keeps the
channels of that gradient; here they are summed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import xarray as xr
from torch import Tensor, nn

from ..extras import needs
from ..prediction import Prediction, Target, predict
from .grad_cam import cam


def guided_grad_cam(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, layer: str | None = None
) -> xr.DataArray:
    """Fine detail that raises the score, within the map of Grad-CAM; below 0 it lowers it. [batch, row, column]

    layer: as of `grad_cam`. ValueError where the model has no ReLU, as most transformers, or reads text.
    """
    with needs("guided gradients", "explain"):
        from captum.attr import GuidedBackprop
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no ReLU to guide gradients at; use grad_cam")
    with predict(model, inputs, target) as prediction:
        if not prediction.sees:
            raise ValueError(f"guided_grad_cam is for pictures, and {type(model).__name__} {prediction.takes}; use grad_cam")
        coarse = cam(prediction, layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it sets hooks, which it removes
            fine = GuidedBackprop(_Score(prediction)).attribute(prediction.given)
        return prediction.labelled(coarse * fine.detach().sum(1), "guided_grad_cam")


class _Score(nn.Module):
    """The prediction's score, as the module that Captum asks for."""

    def __init__(self, prediction: Prediction) -> None:
        super().__init__()
        self.prediction, self.model = prediction, prediction.model

    def forward(self, given: Tensor) -> Tensor:
        return self.prediction.score(given)
