"""What attributions read off attention weights."""

from __future__ import annotations

import math
import re

import torch
import xarray as xr
from torch import Tensor

from .. import sites
from ..call import Call, UnreachableAttention
from ..prediction import Prediction
from ..seam import intervene
from ._maps import blocks, enlarged, grid, read


def stack_of(prediction: Prediction) -> str:
    """The one stack of self attention over what is explained, through which alone the score depends on it."""
    kind = type(prediction.model).__name__
    if not sites.find(prediction.model):
        raise ValueError(f"{kind} has no attention to read")
    ran = _Ran()
    try:
        with intervene(prediction.model, ran):
            prediction.score(prediction.given.clone().requires_grad_())
    except UnreachableAttention as error:
        raise ValueError(f"{kind}: {error}") from error
    found = [
        call for call in ran.calls if call.value.requires_grad
    ]  # weights have none, so it comes from what is given
    if any(call.site.cross for call in found):
        raise ValueError(f"{kind} has cross attention, so no one stack leads from its input to its score")
    stacks = list(dict.fromkeys(call.site.stack for call in found))
    whole = {re.sub(r"\.\d+$", "", stack) for stack in stacks}  # of parts that see a picture in several ways
    if len(whole) != 1 or not blocks(prediction.model):
        ways = f"attends to it in {', '.join(stacks)}" if stacks else "does not attend to it"
        raise ValueError(f"{kind} {ways}; there is no one way from {prediction.over} to its score")
    sizes = [(len(call.query), call.query.shape[2], call.key.shape[2]) for call in found]
    batch = math.prod(prediction.shape[: 1 + (prediction.dims[0] == "choice")])
    if any(size[0] != batch for size in sizes):
        raise ValueError(
            f"{kind} attends within windows, whose weights do not chain from layer to layer ({sizes[0][0]} maps of "
            f"{sizes[0][1]} positions for {batch} samples); gradients, grad_cam and normgrad do without them"
        )
    rows, keys = (list(dict.fromkeys(size[i] for size in sizes)) for i in (1, 2))
    if len(rows) > 1 or rows != keys:
        raise ValueError(
            f"{kind}: layers of {', '.join(map(str, rows))} positions look at {', '.join(map(str, keys))}, so their "
            f"weights do not chain; gradients, grad_cam and normgrad do without them"
        )
    if len(stacks) > 1:
        raise ValueError(f"{kind} sees a picture in several ways, in {', '.join(stacks)}; their weights do not chain")
    return stacks[0]


def of_word(prediction: Prediction, refusal: str) -> tuple[str, Tensor]:
    """The stack of a model that writes, and the positions that a word is said at; ValueError where it writes none."""
    if prediction.kind != "token" or prediction.over != "input_ids":
        raise ValueError(refusal)
    stack, at = stack_of(prediction), prediction.question.at
    assert isinstance(at, Tensor)
    return stack, at


class _Ran:
    """An intervention that changes nothing, and keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def inputs(self, call: Call) -> Call:
        self.calls.append(call)
        return call


def of_tokens(prediction: Prediction, stack: str, rows: Tensor, method: str) -> xr.DataArray:
    """What the positions that the score reads hold of each token. rows: [batch, query, key]"""
    shares = read(prediction, stack).to(rows)
    if rows.shape[1] != shares.shape[1]:
        raise ValueError(
            f"{type(prediction.model).__name__}: weights of {rows.shape[1]} positions, and {shares.shape[1]} of its "
            f"last layer; they do not chain"
        )
    along = torch.einsum("bq,bqk->bk", shares, rows)
    return prediction.labelled(enlarged(prediction, grid(prediction, along), "nearest"), method)
