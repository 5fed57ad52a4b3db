"""Layer-wise relevance propagation for convolutional networks.

Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation (PLoS
ONE, 2015), with the rules of the code of Li, Tian, Mueller and Chen, Beyond saliency (arXiv:1712.08268): the positive
weights share out the relevance of a linear layer, all weights that of a convolution, and the largest takes that of a
maximum.

Their networks are chains of these. Where there is more, the rule is that of a convolution: normalisation, once trained,
is part of the convolution before it, and a sum is shared out among its terms. A rule is a gradient times an activation
with part of the slope held, so one backward pass does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import xarray as xr
from torch import Tensor, nn

from ..prediction import Prediction, Target, predict

_KNOWN = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
)


def layerwise_relevance(model: nn.Module, inputs: Mapping[str, Any], target: Target = None) -> xr.DataArray:
    """Each pixel's part in the score, handed back layer by layer; above 0 speaks for it. [batch, row, column]

    Summed over channels. Sums to the score where no layer has an offset, to the coordinate `score`. ValueError where
    the model is not a convolutional network with ReLUs.
    """
    with predict(model, inputs, target) as prediction:
        return prediction.labelled(relevance(prediction).sum(1), "layerwise_relevance")


def relevance(prediction: Prediction) -> Tensor:
    """Of each channel of each pixel. [batch, channel, row, column]"""
    model = prediction.model
    kind = type(model).__name__
    if not prediction.sees:
        raise ValueError(f"layer-wise relevance is for convolutional networks, and {kind} {prediction.takes}")
    for name, module in model.named_modules():
        if not [*module.children()] and not isinstance(module, _KNOWN):
            raise ValueError(f"{kind}: {name} is a {type(module).__name__}, for which there is no rule; see normgrad")
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                undo.callback(module.register_forward_hook(_by_positive_weights).remove)
        return prediction.given * prediction.gradient()


def _by_positive_weights(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The output, whose gradient shares out what arrives by the positive weights."""
    shared = args[0] @ module.weight.clamp(min=0).T + 1e-9
    return shared * (output / shared).detach()
