"""Gradient times input.

Shrikumar et al., Not Just a Black Box: Learning Important Features Through Propagating Activation Differences
(arXiv:1605.01713), section 2. For a network of linear maps and ReLUs without offsets it sums to the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr
from torch import nn

from ..prediction import Target, predict


def gradient_x_input(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> xr.DataArray:
    """Slope of the score along each feature times the feature; above 0 speaks for the target. [batch, token] or pixels

    Summed over the dimensions of an embedding, or over the channels of a pixel. Units of the logit.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> regard.attribute(model, inputs, method="gradient_x_input", processor=tokenizer).dims
    ('batch', 'token')
    """
    with predict(model, inputs, target) as prediction:
        found = prediction.gradient() * prediction.given
        return prediction.labelled(prediction.summed(found), "gradient_x_input")
