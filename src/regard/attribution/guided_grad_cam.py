"""Guided Grad-CAM.

Selvaraju et al., Grad-CAM (arXiv:1610.02391), section 3.2: the map, pixel by pixel, times the gradient that
Springenberg et al. (arXiv:1412.6806) let through ReLUs only where it is positive. The paper keeps the channels of that
gradient; here they are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import xarray as xr
from torch import Tensor, nn

from ..prediction import Prediction, Target, predict
from .grad_cam import cam


def guided_grad_cam(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, layer: str | None = None
) -> xr.DataArray:
    """Fine detail that raises the score, within the map of Grad-CAM; below 0 it lowers it. [batch, row, column]

    layer: as of `grad_cam`. ValueError where the model has no ReLU, as most transformers, or reads text.
    """
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no ReLU to guide gradients at; use grad_cam")
    with predict(model, inputs, target) as prediction:
        if not prediction.sees:
            raise ValueError(
                f"guided_grad_cam is for pictures, and {type(model).__name__} {prediction.takes}; use grad_cam"
            )
        coarse = cam(prediction, layer)
        return prediction.labelled(coarse * prediction.summed(guided(prediction)), "guided_grad_cam")


def guided(prediction: Prediction) -> Tensor:
    """The gradient of the score that ReLUs let through where it is positive; of `given`'s shape."""
    with ExitStack() as undo:
        for module in prediction.model.modules():
            if isinstance(module, nn.ReLU):
                undo.callback(module.register_forward_hook(_positive).remove)
        return prediction.gradient()


def _positive(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    if not output.requires_grad:
        return None
    output = output.clone()  # a model may go on to change it
    output.register_hook(lambda slope: slope.relu())
    return output
