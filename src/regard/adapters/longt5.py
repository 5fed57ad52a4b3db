"""LongT5's encoders: blocks that see themselves and the two beside them, and, transiently, means of all blocks."""

from __future__ import annotations

from typing import Any

import torch

from .joined import Joined, Kept, laid

parts = ("v", "o")


def join(module: Any, kept: Kept, given: dict[str, Any], output: Any) -> Joined:
    """Means of blocks are keys after those of the text. A key before its first or after its last token has value 0."""
    block, heads = module.block_len, module.n_heads
    own, states = kept.softmaxes[0].transpose(1, 2), kept.took["o"][0]  # [batch, head, block, query, key]
    n, blocks = states.shape[1], own.shape[2]
    values = torch.cat(kept.gave["v"], dim=1).unflatten(-1, (heads, -1)).transpose(1, 2)
    first = block * torch.arange(blocks, device=own.device)[:, None].expand(blocks, block)
    near = laid(own[..., : 3 * block], first, (blocks + 2) * block)[..., block : block + n]
    weights = torch.cat([near, own[..., 3 * block :]], dim=-1).flatten(2, 3)[:, :, :n]
    return Joined(
        weights.to(values.dtype),
        values,
        states.unflatten(-1, (heads, -1)),
        lambda result: (module.o(result.flatten(2)), *output[1:]),
        appended=values.shape[2] - n,
    )
