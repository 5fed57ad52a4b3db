"""One attention of Llama's kind, with weights of a file."""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding


def attention(weights, *, heads: int, kv_heads: int, rope_theta: float) -> tuple[nn.Module, LlamaConfig]:
    """A model that is no more than this attention, and its configuration."""
    dim, mixed = weights["o_proj.weight"].shape
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=mixed // heads,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        attn_implementation="eager",
    )
    module = LlamaAttention(config, 0).to(weights["o_proj.weight"].dtype)
    module.load_state_dict(weights)
    return nn.ModuleDict({"attention": module}), config


def run(model: nn.Module, config: LlamaConfig, hidden: torch.Tensor, *, causal: bool) -> torch.Tensor:
    n = hidden.shape[1]
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(n)[None])
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None] if causal else None
    return model["attention"](hidden, position_embeddings=positions, attention_mask=mask)[0]
