"""NormGrad, and the family of saliency maps that it belongs to.

Rebuffi, Fong, Ji and Vedaldi, There and Back Again: Revisiting Backpropagation Saliency Methods (arXiv:2004.02866),
sections 3 and 4. Behind a layer one thinks of a convolution that is the identity. The gradient of its weights is a sum
over places; each place's term is its contribution, and the map is the size of these terms. What the convolution is, and
how a term becomes one number, are the two phases of the framework: gradient (bias), linear approximation (scaling, sum)
and NormGrad (conv1x1, norm) are members.

Several layers are joined as in the authors' code, by the product of maps that each are stretched from 0 to 1, here its
root, which ranks the same. Their loss is the negative score, and their terms are negated: signs are those of the score.
Their depthwise 3 x 3 convolution is left out. Of a model with attention, and over tokens, ours reads layers as
`grad_cam` does; the paper has convolutional networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import unfold

from ..prediction import Target, predict
from ._maps import Map, enlarged, maps

Contribution = Literal["conv1x1", "conv3x3", "scaling", "bias"]
Aggregation = Literal["norm", "filter_norm", "sum", "max"]


def normgrad(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    layers: Sequence[str] | None = None,
    contribution: Contribution = "conv1x1",
    aggregation: Aggregation = "norm",
) -> xr.DataArray:
    """How much a place adds to the gradient of a layer's weights; from 0 up. [batch, token] or [batch, row, column]

    Contributions: "conv1x1" is the outer product of activations and gradient, "conv3x3" the same of the activations
    around the place, "scaling" their product channel by channel, "bias" the gradient alone. Aggregations of its
    entries: "norm", "filter_norm" (of the positive ones), "sum" (signed), "max" (signed).

    layers: names of modules whose outputs are read; None takes the last that reaches the score, as in `grad_cam`.
    Several are joined by the geometric mean of their maps, each stretched to 0 to 1. Before a mean over places the
    gradient is the same at all of them, and the norm knows no target: name earlier layers too, or "scaling".

    >>> import regard
    >>> from regard.data.scenes import Object, Scene, render
    >>> model, processor = regard.load("viewer")
    >>> picture = render(Scene((Object("star", "red", "large", 0.3, 0.5),))).image()
    >>> regard.attribute(model, processor(picture, return_tensors="pt"), method="normgrad").dims
    ('batch', 'row', 'column')
    """
    for what, value, among in (
        ("contribution", contribution, Contribution),
        ("aggregation", aggregation, Aggregation),
    ):
        if value not in among.__args__:
            raise ValueError(f"normgrad({what}={value!r}): it is one of {', '.join(among.__args__)}")
    if layers is not None and (isinstance(layers, str) or not layers):
        raise ValueError(f"normgrad(layers={layers!r}): give a list of names of modules")
    with predict(model, inputs, target) as prediction:
        found = [enlarged(prediction, saliency(one, contribution, aggregation)) for one in maps(prediction, layers)]
        return prediction.labelled(found[0] if len(found) == 1 else _joined(found), "normgrad")


def saliency(found: Map, contribution: Contribution, aggregation: Aggregation) -> Tensor:
    """The map of one layer, without making the outer products. [batch, row, column] or [batch, token]"""
    values, gradient = found.values, found.gradient
    if contribution in ("scaling", "bias"):
        term = gradient if contribution == "bias" else values * gradient
        if aggregation in ("norm", "filter_norm"):
            return (term if aggregation == "norm" else term.relu()).norm(dim=1)
        return term.sum(1) if aggregation == "sum" else term.amax(1)
    if contribution == "conv3x3":
        values = _around(values)
    if aggregation == "norm":
        return values.norm(dim=1) * gradient.norm(dim=1)
    if aggregation == "sum":
        return values.sum(1) * gradient.sum(1)
    if aggregation == "max":
        ends = ((values.amax(1), values.amin(1)), (gradient.amax(1), gradient.amin(1)))
        return torch.stack([value * slope for value in ends[0] for slope in ends[1]]).amax(0)
    # a product is positive where both are, or neither
    alike = ((values.relu(), gradient.relu()), ((-values).relu(), (-gradient).relu()))
    return torch.hypot(*(value.norm(dim=1) * slope.norm(dim=1) for value, slope in alike))


def _around(values: Tensor) -> Tensor:
    """Activations of the 3 x 3 places (of 3 tokens) around each. [batch, channel * 9, ...]"""
    if values.ndim == 3:
        return unfold(values[:, :, None], (1, 3), padding=(0, 1))
    return unfold(values, 3, padding=1).unflatten(-1, values.shape[2:])


def _joined(found: Sequence[Tensor]) -> Tensor:
    whole = torch.ones_like(found[0])
    for one in found:
        flat = one.flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        whole = whole * ((flat - low) / (high - low).clamp(min=1e-30)).reshape(one.shape)
    return whole ** (1 / len(found))
