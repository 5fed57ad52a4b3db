"""Titans: a memory that is a small network, whose weights are learned while it reads, beside short attention.

Behrouz et al., Titans: Learning to Memorize at Test Time (arXiv:2501.00663), sections 3 and 4. Of each token the memory
learns to recall the value from the key: the gradient of its error is the surprise, which is added with momentum, and
weights decay. The memory follows lucidrains/titans-pytorch; the authors published no code. In that, the error of a
token is the mean over channels (the text: the sum), the norm is RMSNorm, and what several heads recall is gated.

The language model around it has transformers' Llama parts (norm, MLP, rotary positions) and the three ways to join the
two: as a gate (`"gate"`, MAG), as context (`"context"`, MAC) and as a layer (`"layer"`, MAL).

Deviations: in `"context"` what was recalled for a token is seen from that token on; in the text a segment sees all of
it, so that a token would be told of those after it. Maps of query, key and value have no depthwise convolution. The two
sides of the gate are normed and multiplied, without a further function. Persistent tokens are keys and values of each
layer. The language model generates without a cache: each new token reads the text anew.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ._neural_memory import NeuralMemory

__all__ = ["NeuralMemory", "TitansConfig", "TitansForCausalLM", "titans"]


class TitansConfig(PreTrainedConfig):
    """Sizes of a `TitansForCausalLM`.

    join: how a layer's memory and attention stand to each other, None for attention alone; window: tokens that
    attention sees, the segment of `"context"`; persistent: learned keys before them; memory: knobs of `NeuralMemory`.
    """

    model_type = "regard_titans"
    attribute_map: ClassVar = {"num_hidden_layers": "layers", "hidden_size": "dim", "num_attention_heads": "heads"}

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        mlp_dim: int | None = None,
        join: Literal["gate", "context", "layer"] | None = "gate",
        window: int = 64,
        persistent: int = 4,
        memory: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if dim % (2 * heads):
            raise ValueError(f"TitansConfig: {dim} channels do not divide by {heads} heads into even widths")
        if join not in ("gate", "context", "layer", None) or window < 1 or persistent < 0:
            raise ValueError(
                f"TitansConfig: join is 'gate', 'context', 'layer' or None, window 1 or more, persistent 0 or more; "
                f"got {join=}, {window=}, {persistent=}"
            )
        self.vocab_size, self.dim, self.layers, self.heads = vocab_size, dim, layers, heads
        self.mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.join, self.window, self.persistent = join, window, persistent
        self.memory = {"chunk": 4, "batch": 16, **(memory or {})}
        super().__init__(**{"tie_word_embeddings": False, "use_cache": False, **kwargs})


def _llama(config: TitansConfig) -> LlamaConfig:
    return LlamaConfig(hidden_size=config.dim, intermediate_size=config.mlp_dim, num_attention_heads=config.heads)


class WindowAttention(nn.Module):
    """Causal softmax attention to the last `window` tokens, to what was recalled up to there, and to learned keys."""

    is_causal = True

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.window = c.heads, c.window
        self.query, self.key, self.value, self.output = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(4))
        self.persistent = nn.Parameter(0.02 * torch.randn(2, c.heads, c.persistent, c.dim // c.heads))

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], before: Tensor | None = None) -> Tensor:
        """hidden, before: [batch, token, dim], `before` as long as `hidden` and of the same places."""
        n, batch = hidden.shape[1], len(hidden)

        def split(part: nn.Module, x: Tensor) -> Tensor:
            return part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key = apply_rotary_pos_emb(split(self.query, hidden), split(self.key, hidden), *rotary)
        value = split(self.value, hidden)
        at = torch.arange(n, device=hidden.device)
        seen = (at <= at[:, None]) & (at > at[:, None] - self.window)
        if before is not None:
            recalled, _ = apply_rotary_pos_emb(split(self.key, before), query, *rotary)
            key, value = torch.cat([recalled, key], 2), torch.cat([split(self.value, before), value], 2)
            seen = torch.cat([seen, seen], 1)
        learned = self.persistent[:, None].expand(-1, batch, -1, -1, -1)
        seen = torch.cat([seen.new_ones(n, learned.shape[3]), seen], 1)
        key, value = torch.cat([learned[0], key], 2), torch.cat([learned[1], value], 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.output(mixed.transpose(1, 2).flatten(2))


class TitansLayer(nn.Module):
    """Attention and memory, joined as the configuration says, then an MLP; both with residuals."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        c = self.config = config
        self.mlp = LlamaMLP(_llama(c))
        self.norm, self.norm_mlp = LlamaRMSNorm(c.dim), LlamaRMSNorm(c.dim)
        self.attention = WindowAttention(c)
        self.memory = NeuralMemory(c.dim, **c.memory) if c.join else None
        self.norms = nn.ModuleList(LlamaRMSNorm(c.dim) for _ in range(2 if c.join == "gate" else 0))

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self._mixed(self.norm(hidden), rotary)
        return hidden + self.mlp(self.norm_mlp(hidden))

    def _mixed(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.memory is None:
            return self.attention(x, rotary)
        if self.config.join == "gate":
            return self.norms[0](self.attention(x, rotary)) * self.norms[1](self.memory(x)[0])
        if self.config.join == "layer":
            return self.attention(x + self.memory(x)[0], rotary)
        state, found = None, []
        for at in range(0, x.shape[1], self.config.window):
            here = slice(at, at + self.config.window)
            before = self.memory.recalled(x[:, here], state)
            cos, sin = rotary
            mixed = self.attention(x[:, here], (cos[:, here], sin[:, here]), before)
            recalled, state = self.memory(mixed, state)
            found.append(mixed * recalled)
        return torch.cat(found, 1)


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: token ids to scores of the next. `save_pretrained`, `from_pretrained`, `generate` as usual.

    `regard.record` sees the attention of each layer; its keys are the learned ones, what was recalled, then the tokens.

    >>> import torch
    >>> from regard.models.titans import titans
    >>> model, ids = titans(vocab_size=30, dim=16, heads=2, window=4), torch.tensor([[3, 7, 1]])
    >>> model(ids).logits.shape, model.generate(ids, max_new_tokens=2, do_sample=False).shape
    (torch.Size([1, 3, 30]), torch.Size([1, 5]))
    """

    config_class = TitansConfig
    _supports_cache_class = False

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(TitansLayer(c) for _ in range(c.layers))
        self.norm, self.head = LlamaRMSNorm(c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(_llama(c))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, LlamaRotaryEmbedding):
            super()._init_weights(module)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *_: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """input_ids: [batch, token]; labels: as input_ids, -100 where nothing is asked.

        attention_mask: [batch, token]. Rows may be filled up at their end, which changes nothing before it; ValueError
        where one is filled up at its start, since the memory would read that.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("TitansForCausalLM: fill rows up at their end (padding_side='right'), not at their start")
        hidden = self.embed(input_ids)
        rotary = self.rotary(hidden, torch.arange(input_ids.shape[1], device=hidden.device)[None])
        for layer in self.layers:
            hidden = layer(hidden, rotary)
        logits = self.head(self.norm(hidden))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def titans(**sizes: Any) -> TitansForCausalLM:
    """An untrained `TitansForCausalLM` of these sizes, the fields of `TitansConfig`."""
    return TitansForCausalLM(TitansConfig(**sizes))
