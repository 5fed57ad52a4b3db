"""PEGASUS-X's encoder: blocks that see themselves and global tokens, which see everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .joined import Joined, Kept, laid

parts = ("v_proj", "out_proj")


def join(module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined:
    """Global tokens, in the module's softmaxes the first keys, stand after the text, as keys and as queries.

    In every other layer blocks are shifted by half a block: its text begins after as much padding.
    """
    block, heads = module.block_size, module.num_heads
    of_global, own = kept.softmaxes  # [batch, head, query, key], [batch, head, block, query, key]
    count, blocks = of_global.shape[2], own.shape[2]
    n = blocks * block
    first = block * torch.arange(blocks, device=own.device)[:, None].expand(blocks, block)
    local = torch.cat([laid(own[..., count:], first, n), own[..., :count]], dim=-1).flatten(2, 3)
    weights = torch.cat([local, of_global.roll(-count, -1)], dim=2)
    values = torch.cat(kept.gave["v_proj"], dim=1)
    asked, text = kept.took["out_proj"]
    result = torch.cat([text, asked], dim=1)
    shift = block // 2 if _shifted(given, block // 2) else 0
    there = torch.arange(n + count, device=own.device)
    there = there[(there >= n) | ((there >= shift) & (there < n - shift))]

    def put(new: Tensor) -> Any:
        whole = result.index_copy(1, there, new.flatten(2))
        return module.out_proj(whole[:, :n]), module.out_proj(whole[:, n:]), *output[2:]

    return Joined(
        weights[:, :, there][..., there].to(values.dtype),
        values[:, there].unflatten(-1, (heads, -1)).transpose(1, 2),
        result[:, there].unflatten(-1, (heads, -1)),
        put,
        appended=count,
    )


def _shifted(given: dict[str, Any], half: int) -> bool:
    """Whether half a block at either end is padding that the layer put there: zeros that are hidden."""
    states, mask = given["token_hidden_states"], given["attention_mask"]
    ends = [(states[:, part], mask[:, part]) for part in (slice(half), slice(-half, None))]
    return all(not bool(zeros.any()) and bool((hidden < 0).all()) for zeros, hidden in ends)
