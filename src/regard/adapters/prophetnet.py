"""ProphetNet's decoder: a stream that reads the text, and streams that each foretell a token further ahead.

Each stream is attention over the same positions. One that foretells looks at the text and at guesses of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .joined import Joined, Kept

parts = ("value_proj", "out_proj")


def join(module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined:
    heads, streams = module.num_attn_heads, 1 + module.ngram
    main, foretold = kept.softmaxes  # [batch, head, query, key], [batch, stream, head, query, key]
    n, n_key = main.shape[2:]
    values = _heads(kept.gave["value_proj"][0], heads).chunk(streams, dim=2)
    text = values[0]
    if n_key > n:  # with what the cache held before
        cache = getattr(given["past_key_values"], "self_attention_cache", given["past_key_values"])
        text = cache.layers[module.layer_idx].values
    result, results = (states.unflatten(-1, (heads, -1)) for states in kept.took["out_proj"])

    def put(*new: Tensor) -> Any:
        states = torch.cat(new, dim=1).flatten(2)
        given_on = nn.functional.dropout(module.out_proj(states), p=module.dropout, training=module.training)
        return given_on, *output[1:]

    others = [
        Joined(foretold[:, i].to(text.dtype), torch.cat([text, values[1 + i]], dim=2), results[:, i], put, appended=n)
        for i in range(module.ngram)
    ]
    return Joined(main.to(text.dtype), text, result[:, 0], put, then=tuple(others))


def _heads(states: Tensor, heads: int) -> Tensor:
    """[batch, head, key, dim] of [batch, key, head * dim]"""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
