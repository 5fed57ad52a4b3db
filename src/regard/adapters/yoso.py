"""YOSO: how likely the hashes of a query and of a key are to collide, a length that the output then loses.

Rows are given summing to 1, which changes nothing: the module brings its output to length 1. With hashes that are drawn
at every call, the weights are counts that no one sees.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from .joined import Joined, Kept

parts = ("query", "key", "value")


def refused(module: Any) -> str:
    """Why this module cannot be read, if it cannot."""
    if module.use_expectation:
        return ""
    return (
        f"{type(module).__name__} counts collisions of hashes that it draws at every call, so its weights are not "
        f"known; load the model with use_expectation=True, which uses what they are on average"
    )


def join(module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined:
    query, key, value = (
        kept.gave[name][0].unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for name in parts
    )
    there = (1.0 + given["attention_mask"] / 10000.0).int()[:, None]  # [batch, 1, token]
    likely = (1 - (normalize(query, dim=-1) @ normalize(key, dim=-1).mT).acos() / math.pi) ** module.hash_code_len
    likely = likely * there[..., :, None] * there[..., None, :]
    weights = likely / likely.sum(-1, keepdim=True).clamp_min(1e-30)

    def after(result: Tensor) -> Tensor:
        heads = normalize(result, dim=-1)
        if module.use_conv:
            heads = heads + module.conv(value * given["attention_mask"][:, None, :, None]).transpose(1, 2)
        return heads.flatten(2)

    result = (weights @ value).transpose(1, 2)
    return Joined(weights, value, result, lambda new: (after(new), *output[1:]), compared=(after(result), output[0]))
