"""Grad-CAM.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization (arXiv:1610.02391),
section 3, equations 1 and 2.

The paper takes the last convolutional layer. Of a model with attention, ours takes the last layer whose patches or
tokens reach the score: with a class token, that before the last one. Over tokens, pooling is over those that are not
padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr
from torch import Tensor, nn

from ..prediction import Prediction, Target, predict
from ._maps import enlarged, maps


def grad_cam(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, layer: str | None = None
) -> xr.DataArray:
    """How far a place's activations raise the score, by the layer's mean slope; from 0 up. [batch, token] or pixels

    The map has the size of the layer, and is enlarged to pixels bilinearly.

    layer: name of the module whose output is read. ValueError where it gives no places.

    >>> import regard
    >>> from regard.data.scenes import Object, Scene, render
    >>> model, processor = regard.load("viewer")
    >>> picture = render(Scene((Object("star", "red", "large", 0.3, 0.5),))).image()
    >>> regard.attribute(model, processor(picture, return_tensors="pt"), method="grad_cam").dims
    ('batch', 'row', 'column')
    """
    with predict(model, inputs, target) as prediction:
        return prediction.labelled(cam(prediction, layer), "grad_cam")


def cam(prediction: Prediction, layer: str | None) -> Tensor:
    """The map of the last layer, or of one by name. [batch, token] or [batch, row, column]"""
    (found,) = maps(prediction, None if layer is None else [layer])
    if found.gradient.ndim == 4:
        slope = found.gradient.mean((2, 3), keepdim=True)
    else:
        assert prediction.real is not None
        slope = found.gradient.sum(2, keepdim=True) / prediction.real.flatten(0, -2).sum(-1)[:, None, None]
    return enlarged(prediction, (slope * found.values).sum(1).relu())
