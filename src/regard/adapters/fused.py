"""Implementations that hand out no map: flex attention, flash attention, and kernels of the hub in its place.

What each does with the arguments of transformers' interface, as fields of a `Call`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from ..call import Unreadable

if TYPE_CHECKING:
    from .interface import Asked

_PIECES = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table", "cache")  # of sequences that are packed, or paged
_dense: weakref.WeakKeyDictionary[BlockMask, Tensor] = weakref.WeakKeyDictionary()


def is_flash(implementation: str) -> bool:
    """Whether it is flash attention, or a kernel of the hub, which transformers calls as such."""
    return implementation.startswith("flash_attention_") or "/" in implementation.rpartition("|")[2]


def flex(asked: Asked) -> dict[str, Any]:
    """It caps scores, adds a mask that is a tensor, and hides what a `BlockMask` hides; nothing is causal by itself."""
    kwargs, mask = asked.keywords, asked.mask
    if isinstance(mask, BlockMask):
        mask = _visible(mask, asked)
    elif isinstance(mask, Tensor):
        mask = mask[:, :1, :, : asked.key.shape[2]].to(asked.query.dtype)
    fields = {"bias": kwargs.get("position_bias"), "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    return {"mask": mask, **fields}


def flash(asked: Asked) -> dict[str, Any]:
    """It takes padding out of each row, aligns causality and windows at the last key, and knows no bias.

    A query that is padding looks nowhere.
    """
    kwargs, mask = asked.keywords, asked.mask
    name, module = asked.implementation, type(asked.module).__name__
    if given := [k for k in _PIECES if kwargs.get(k) is not None] or ["paged"] * ("|" in name):
        raise Unreadable(
            f"{module} runs {name} on packed or paged sequences ({given[0]}), whose rows Regard cannot tell apart; pad "
            f"them to a batch"
        )
    if _packed(kwargs.get("position_ids"), len(asked.query)) and mask is None:
        raise Unreadable(
            f"{module} runs {name} on a packed row, whose sequences only position_ids tell apart; pad them to a batch"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise Unreadable(f"{module} hands {name} a mask that is not one of padding [batch, key]")
    key, value = asked.key, asked.value
    if mask is not None:  # of a static cache, the mask says how much is filled
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    n, n_key = asked.query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(getattr(asked.module, "is_causal", True) if causal is None else causal)
    window = kwargs.get("sliding_window")
    window = window if window is not None and asked.key.shape[2] > window else None
    fields = {"key": key, "value": value, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    if mask is None and window is None and (n == n_key or n == 1 or not causal):
        return {**fields, "causal": causal and n > 1}
    there = torch.ones(1, n_key, dtype=torch.bool, device=key.device) if mask is None else mask.bool()
    at = there.cumsum(1)  # places once padding is out
    if n == n_key:
        asks, queries = at, there
    elif n == 1:
        asks, queries = at[:, -1:], there.new_ones(len(there), 1)
    else:  # new positions, with padding on the left
        asks, queries = at[:, -n:], there[:, -n:]
    ahead = at[:, None, :] - asks[:, :, None]  # [batch, query, key]
    seen = there[:, None, :] & queries[:, :, None]
    if causal:
        seen = seen & (ahead <= 0)
    if window is not None:
        seen = seen & (ahead.abs() < window)
    return {**fields, "mask": seen[:, None]}


def _packed(positions: Any, batch: int) -> bool:
    """Whether one row holds several sequences, as transformers tells by its positions."""
    if not isinstance(positions, Tensor) or batch != 1 or positions.shape[-1] == 1:
        return False
    whole = torch.arange(positions.shape[-1], device=positions.device) + positions.min()
    return bool((whole != positions).any())


def _visible(mask: BlockMask, asked: Asked) -> Tensor:
    """Which pairs a block mask shows: those of its function, in blocks that are computed."""
    if mask not in _dense:
        n, n_key = mask.seq_lengths
        rows, columns = mask.BLOCK_SIZE
        blocks = mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        batch, heads = mask.shape[:2]
        shown = create_mask(mask.mask_mod, batch, heads, n, n_key, device=str(blocks.device))
        _dense[mask] = shown & blocks[..., :n, :n_key]
    return _dense[mask][..., : asked.query.shape[2], : asked.key.shape[2]]
