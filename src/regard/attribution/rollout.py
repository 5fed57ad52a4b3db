"""Attention rollout as an attribution.

Abnar and Zuidema, Quantifying Attention Flow in Transformers (arXiv:2005.00928), section 3; the shares of the input in
the positions that the score reads: of those of a mean, the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import nn

from .. import catalog
from ..prediction import Target, predict
from ..seam import record
from ._attention import of_tokens, stack_of


def rollout(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, residual: float = 0.5
) -> xr.DataArray:
    """Share of each token or patch in what the score reads, by attention alone, 0 to 1. [batch, token] or pixels

    The same for every target: weights do not know it. Tokens sum to 1; a patch's share stands at each of its pixels.
    residual: share of a position that comes from itself, past the attention.

    Takes the memory of every layer's weights. ValueError where the input is not what one stack of self attention reads.
    """
    rolled = catalog.method("statistics", "rollout")
    with predict(model, inputs, target) as prediction:
        stack = stack_of(prediction)
        with torch.no_grad(), record(model, "rows") as recording:
            prediction.score()
        rows = torch.from_numpy(rolled(recording.tree[stack], residual=residual).values[:, -1])
        return of_tokens(prediction, stack, rows, "rollout").assign_attrs(knows_target=False)
