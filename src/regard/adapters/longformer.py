"""Longformer and the encoder of LED: a band around each query, and global tokens that see and are seen by all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import UnreachableAttention
from .joined import Joined, Kept, laid

parts = ("value", "value_global")


def join(module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined:
    """Global tokens stand before the band in its softmax; as queries they have a softmax, and values, of their own."""
    heads, side = module.num_heads, module.one_sided_attn_window_size
    own = kept.softmaxes[0].masked_fill(given["is_index_masked"][:, :, None, None], 0.0).transpose(1, 2)
    value = _heads(kept.gave["value"][0], heads)
    n = value.shape[2]
    among = own.shape[-1] - (2 * side + 1)  # the most global tokens of a row
    weights = laid(own[..., among:], torch.arange(n, device=own.device), n + 2 * side)[..., side : side + n]
    weights, compared = weights.to(value.dtype), None
    result = output[0].unflatten(-1, (heads, -1))
    if among:
        row, at = given["is_index_global_attn"].nonzero(as_tuple=True)
        number = given["is_index_global_attn"].cumsum(1)[row, at] - 1
        weights = weights.clone()
        weights[row, :, :, at] += own[row, :, :, number].to(value.dtype)
        asked = kept.softmaxes[1].unflatten(0, (-1, heads)).to(value.dtype)
        weights[row, :, at] = asked[row, :, number]
        follows = (weights @ value).transpose(1, 2)
        follows[row, at] = (weights @ _heads(kept.gave["value_global"][0], heads))[row, :, at]
        value, compared = torch.full_like(value, float("nan")), (follows, result)  # there is no one value for all rows

    def put(new: Tensor) -> Any:
        if compared is not None:
            raise UnreachableAttention(
                f"{type(module).__name__} gives global tokens values of their own, so its attention cannot be changed"
            )
        return new.flatten(2), *output[1:]

    return Joined(weights, value, result, put, compared=compared)


def _heads(states: Tensor, heads: int) -> Tensor:
    """[batch, head, key, dim] of [key, batch, head * dim]"""
    return states.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
