"""TransNormerLLM: a causal language model whose attention is linear, with a decay for each head and layer.

Qin et al., Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (arXiv:2405.17381),
section 3; attention, rates and norm as in the authors' code (OpenNLPLab/lightning-attention). The products are
`regard.mechanisms.lightning_2`. The channel mixer is the paper's gated unit without activation.

Deviations: rates are those of the code, ALiBi's slopes times 1 - layer / (layers - 1) + 1e-5, where the text has
another form. The learned rotation of the first layer (LRPE) is left out, as in the code: the decay tells distances.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..mechanisms.lightning_2 import lightning_2, slopes, step

States = tuple[Tensor, ...]


class TnlConfig(PreTrainedConfig):
    """Sizes of a `TnlForCausalLM`. mlp_dim: 8/3 of dim, rounded up to 8, unless given. decay: False forgets nothing."""

    model_type = "regard_tnl"

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        mlp_dim: int | None = None,
        decay: bool = True,
        gate: bool = True,
        **kwargs: Any,
    ) -> None:
        if dim % heads:
            raise ValueError(f"TnlConfig: {dim} channels do not divide by {heads} heads")
        self.vocab_size, self.dim, self.layers, self.heads = vocab_size, dim, layers, heads
        self.mlp_dim = -(-8 * dim // 24) * 8 if mlp_dim is None else mlp_dim
        self.decay, self.gate = decay, gate
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def simple_rms_norm(x: Tensor) -> Tensor:
    """Divided by the root of the mean square over channels; nothing is learned. The same shape

    >>> import torch
    >>> from regard.models.lightning_tnl import simple_rms_norm
    >>> simple_rms_norm(torch.tensor([3.0, -3.0]))
    tensor([ 1.0000, -1.0000])
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rates(heads: int, layer: int, layers: int) -> Tensor:
    """How fast each head of a layer forgets, per token; next to nothing in the last layer. [head]"""
    return slopes(heads) * (1.0 if layers == 1 else 1 - layer / (layers - 1) + 1e-5)


class TnlAttention(nn.Module):
    """Gated linear attention with decay: [batch, query, dim] to the same.

    query, key and value are silu of linear maps; sums over keys are neither scaled nor normalised, but the joined heads
    are, by a layer norm; a sigmoid of two narrow maps of the input gates what comes out. There is no softmax, so
    `regard.record` has nothing to read here, and says so.
    """

    def __init__(self, dim: int, heads: int, *, layer: int, layers: int, decay: bool = True, gate: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(dim)
        narrow = dim // heads
        self.gate = (
            nn.Sequential(nn.Linear(dim, narrow, bias=False), nn.Linear(narrow, dim, bias=False)) if gate else None
        )
        self.register_buffer("rates", rates(heads, layer, layers) * decay, persistent=False)

    def forward(
        self, hidden: Tensor, state: Tensor | None = None, *, mask: Tensor | None = None, whole: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: [batch, query, dim]; mask: boolean [batch, query], False for padding. -> output, and the state.

        state: [batch, head, dim, dim] of the tokens before; then, or where not `whole`, tokens are taken one by one.
        """
        query, key, value = (
            F.silu(part(hidden)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if mask is not None:
            key, value = (t.where(mask[:, None, :, None], 0.0) for t in (key, value))
        rates = cast(Tensor, self.rates)
        if whole and state is None:
            mixed = lightning_2(query, key, value, causal=True, decay=rates)
        else:
            outputs = []
            for i in range(query.shape[2]):
                output, state = step(state, *(t[:, :, i : i + 1] for t in (query, key, value)), decay=rates)
                outputs.append(output)
            mixed = torch.cat(outputs, 2)
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            mixed = mixed * self.gate(hidden).sigmoid()
        return self.output(mixed), state


class TnlLayer(nn.Module):
    def __init__(self, config: TnlConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.attention = TnlAttention(c.dim, c.heads, layer=layer, layers=c.layers, decay=c.decay, gate=c.gate)
        self.up, self.gate = (nn.Linear(c.dim, c.mlp_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(c.mlp_dim, c.dim, bias=False)

    def forward(self, hidden: Tensor, state: Tensor | None, **how: Any) -> tuple[Tensor, Tensor | None]:
        mixed, state = self.attention(simple_rms_norm(hidden), state, **how)
        hidden = hidden + mixed
        x = simple_rms_norm(hidden)
        return hidden + self.down(self.up(x) * self.gate(x)), state


class TnlForCausalLM(PreTrainedModel):
    """The language model: token ids to scores of the next. `save_pretrained` and `from_pretrained` as in transformers.

    >>> import torch
    >>> from regard.models.lightning_tnl import lightning_tnl
    >>> model = lightning_tnl(vocab_size=30, dim=16, heads=2)
    >>> ids = torch.tensor([[3, 7, 1]])
    >>> model(ids).logits.shape, model.continued(ids, 4).shape
    (torch.Size([1, 3, 30]), torch.Size([1, 7]))
    """

    config_class = TnlConfig

    def __init__(self, config: TnlConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TnlLayer(config, layer) for layer in range(config.layers))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, TnlAttention):
            layers = self.config.layers
            layer = next(i for i, of in enumerate(self.layers) if of.attention is module)
            cast(Tensor, module.rates).copy_(rates(module.heads, layer, layers) * self.config.decay)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: States | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: [batch, token]; attention_mask: 0 for padding; labels: as input_ids, -100 where nothing is asked.

        past_key_values: the states of the tokens before, one a layer, [batch, head, dim, dim], as `use_cache` gives
        them; they take the place of a cache and do not grow.
        """
        mask = None if attention_mask is None else attention_mask.bool()[:, -input_ids.shape[1] :]
        hidden, states = self.embed(input_ids), []
        for i, layer in enumerate(self.layers):
            hidden, state = layer(
                hidden, past_key_values[i] if past_key_values else None, mask=mask, whole=not use_cache
            )
            states.append(state)
        logits = self.head(simple_rms_norm(hidden))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=tuple(states) if use_cache else None)  # type: ignore[arg-type]  # states, not a cache

    @torch.no_grad()
    def continued(self, input_ids: Tensor, tokens: int, *, attention_mask: Tensor | None = None) -> Tensor:
        """The ids and as many more, each the likeliest, in constant memory. [batch, token + tokens]

        Rows are filled up at their start. The prompt is read once; then a state goes from token to token.
        """
        found = self(input_ids, attention_mask, use_cache=True)
        ids = [input_ids]
        for _ in range(tokens):
            ids.append(found.logits[:, -1:].argmax(-1))
            found = self(ids[-1], past_key_values=found.past_key_values, use_cache=True)
        return torch.cat(ids, 1)


def lightning_tnl(**sizes: Any) -> TnlForCausalLM:
    """An untrained `TnlForCausalLM` of these sizes, the fields of `TnlConfig`."""
    return TnlForCausalLM(TnlConfig(**sizes))
