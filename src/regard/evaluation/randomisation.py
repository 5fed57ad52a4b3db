"""Whether an attribution depends on what it explains: on the model's weights, and on the class.

Weights: Adebayo et al., Sanity Checks for Saliency Maps (arXiv:1810.03292), section 3, cascading randomisation from the
output to the input, by Spearman's rank correlation of absolute values. Class: Rebuffi et al., There and Back Again
(arXiv:2004.02866), section 5, the same correlation of the maps, with their signs, of the most and the least likely
class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from ..prediction import Target, predict
from .disagreement import spearman

Explain = Callable[..., xr.DataArray]  # (model, inputs, target) -> scores, such as a partial of regard.attribute;
# target is a `Question`, or an index a sample


def randomisation_error(
    model: nn.Module,
    inputs: Mapping[str, Any],
    explain: Explain,
    target: Target = None,
    *,
    stages: int | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """How alike a map stays while layers lose what they learned, -1 to 1; near 0 is right. [layer, batch]

    Layers are the modules with weights of their own, from the output to the input; at each, its weights and those of
    all before it in this order have been put in another order, drawn at random, so that their distribution stays. The
    class that is explained stays what it was. Weights are put back, to the bit. stages: at how many layers, evenly
    spread up to the last, the map is looked at; None: at each.

    >>> import regard
    >>> from functools import partial
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> randomisation_error(model, inputs, partial(regard.attribute, method="gradient_x_input")).dims
    ('layer', 'batch')
    """
    if stages is not None and stages < 1:
        raise ValueError(f"stages={stages}: look at one layer at least")
    with predict(model, inputs, target) as prediction:
        inputs, question = prediction.inputs, prediction.question  # what a decoder began with stays, too
    before = explain(model, inputs, question)
    layers = [(n, m) for n, m in model.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))][::-1]
    at = (
        np.arange(len(layers))
        if stages is None
        else np.linspace(0, len(layers), stages + 1).round().astype(int)[1:] - 1
    )
    looked = set(at.clip(0).tolist())
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    found = []
    try:
        for i, (_, module) in enumerate(layers):
            with torch.no_grad():
                for weight in module.parameters(recurse=False):
                    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                    weight.copy_(weight.flatten()[order].reshape(weight.shape))
            if i in looked:
                found.append(_alike(abs(before), abs(explain(model, inputs, question))))
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(kept[name])
    return xr.DataArray(np.array(found), {"layer": [layers[i][0] for i in sorted(looked)]}, ("layer", "batch"), "alike")


def class_sensitivity(model: nn.Module, inputs: Mapping[str, Any], explain: Explain) -> NDArray[np.float64]:
    """Rank correlation of the maps of the most and the least likely class, -1 to 1; lower is more sensitive. [batch]

    NaN where a map is the same everywhere.
    """
    with predict(model, inputs) as prediction, torch.no_grad():
        logits = prediction.logits()
    return _alike(explain(model, inputs, logits.argmax(-1)), explain(model, inputs, logits.argmin(-1)))


def _alike(one: xr.DataArray, other: xr.DataArray) -> NDArray[np.float64]:
    return np.array([spearman(a.ravel(), b.ravel()) for a, b in zip(one.values, other.values)])
