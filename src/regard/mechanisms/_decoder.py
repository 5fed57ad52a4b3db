"""Attention of decoders like Llama's, taken apart: what modules that replace it have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import projections

Angles = tuple[Tensor, Tensor]


def decoders(model: nn.Module, asked_by: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The part of a model that holds the layers and the rotary angles, and its attention modules by name in the model.

    ValueError for models that are built in another way: encoders, sliding windows, cross attention, softcaps.
    """
    for name, holder in model.named_modules():
        layers = getattr(holder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(holder, "rotary_emb", None), nn.Module):
            continue
        start = f"{name}." if name else ""
        found = {f"{start}layers.{i}.self_attn": getattr(layer, "self_attn", None) for i, layer in enumerate(layers)}
        config: Any = getattr(holder, "config", None)
        odd = [n for n in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size") if getattr(config, n, 0)]
        rotated = getattr(config, "rope_parameters", None) or {}
        odd += ["partial_rotary_factor"] if rotated.get("partial_rotary_factor", 1.0) != 1.0 else []
        odd += ["sinks"] if any(hasattr(m, "sinks") for m in found.values()) else []
        if odd and not (odd == ["sliding_window"] and not getattr(config, "use_sliding_window", True)):
            raise ValueError(f"{asked_by}: {type(model).__name__} has {', '.join(odd)}, which this does not keep")
        if all(isinstance(m, nn.Module) and getattr(m, "is_causal", False) for m in found.values()):
            for module in found.values():
                assert module is not None
                projections(module, asked_by)
            return holder, {n: m for n, m in found.items() if m is not None}
    raise ValueError(
        f"{asked_by}: {type(model).__name__} is not a decoder like Llama's or Qwen's, with layers.N.self_attn, q_proj, "
        f"k_proj, v_proj, o_proj and rotary positions"
    )


def heads(attention: nn.Module, name: str, hidden: Tensor, width: int) -> Tensor:
    """A projection's heads, through the norm of queries or keys where the model has one. [batch, head, token, dim]"""
    projected = getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, width))
    norm = getattr(attention, f"{name}_norm", None)
    return (projected if norm is None else norm(projected)).transpose(1, 2)


def rotated(tensor: Tensor, angles: Angles) -> Tensor:
    """angles: cosines and sines [batch, token, dim], as the model makes them."""
    cos, sin = (a[:, None] for a in angles)
    first, second = tensor.chunk(2, -1)
    return tensor * cos + torch.cat([-second, first], -1) * sin


def seen(mask: Tensor | None, asked_by: str) -> Tensor | None:
    """A model's mask as which pairs are visible; None where causality says all."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        raise ValueError(
            f"{asked_by}: takes masks of 'sdpa' or 'eager', not {mask.dtype if isinstance(mask, Tensor) else mask!r}; "
            f'use model.set_attn_implementation("sdpa")'
        )
    return mask > torch.finfo(mask.dtype).min / 2


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention whose queries are the last; key and value heads are as many. [batch, head, query, dim]"""
    n_query, n_key = query.shape[2], key.shape[2]
    square = mask is None and n_query == n_key
    if mask is None and not square and n_query > 1:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).tril(n_key - n_query)
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, square, scale=scale, enable_gqa=True)
