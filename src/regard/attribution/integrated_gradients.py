"""Integrated gradients.

Sundararajan et al., Axiomatic Attribution for Deep Networks (arXiv:1703.01365), section 3, computed by Captum. The
paper's baseline for text is zero embeddings, ours too; for pictures it is black, ours is zero after the processor's
normalisation, which mostly is grey. The paper finds 20 to 300 steps enough, and asks that the sum be checked: ours
warns where it is more than 5% off, as with a baseline at which a normalisation divides by nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..extras import needs
from ..prediction import Target, predict

OFF = 0.05  # of the total, from which on the sum is called wrong


def integrated_gradients(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 100,
    batch: int = 64,
) -> xr.DataArray:
    """Share of each feature in what the score rises by from a baseline to the input. [batch, token] or pixels

    Above 0 speaks for the target. Sums to the coordinate `total`, the score less that of the baseline, as closely as
    `steps` of Gauss-Legendre's rule allow. Units of the logit.

    baseline: what stands for nothing: pixels or an embedding, broadcast. batch: inputs that run together at most.

    >>> import regard
    >>> model, tokenizer = regard.load("namer")
    >>> inputs = tokenizer("the baker sang , feeling merry .", return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="integrated_gradients", processor=tokenizer)
    >>> bool(abs(found.sum("token") - found.total) < 0.05)
    True
    """
    with needs("integrated gradients", "explain"):
        from captum.attr import IntegratedGradients
    if steps < 1:
        raise ValueError(f"integrated_gradients(steps={steps}): at least one step is needed")
    with predict(model, inputs, target) as prediction:
        given = prediction.given
        start = torch.as_tensor(baseline, dtype=given.dtype, device=given.device).expand_as(given)
        found = IntegratedGradients(prediction.score).attribute(
            given, start, n_steps=steps, internal_batch_size=max(batch, len(given))
        )
        with torch.no_grad():
            total = prediction.score() - prediction.score(start)
        summed = prediction.summed(found)
        labelled = prediction.labelled(summed, "integrated_gradients", total=total)
    sums = labelled.sum(labelled.dims[1:])
    off = float((abs(sums - labelled.total) / np.maximum(abs(labelled.total), 1e-6)).max())
    if off > OFF:
        warnings.warn(
            f"integrated_gradients: the sum is {off:.0%} off the total; raise steps={steps}, or take another baseline",
            stacklevel=3,
        )
    return labelled
