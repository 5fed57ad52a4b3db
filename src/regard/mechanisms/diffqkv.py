"""Queries, keys and values with numbers of heads and widths of their own: keys are compressed most.

Lin et al., Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models (arXiv:2501.13629),
section 2 and appendix B. Groups are of consecutive query heads: head h of n_q reads key head h // (n_q / n_k) and value
head h // (n_q / n_v). A cache holds n_k key_dim + n_v dim numbers a token.

Narrow keys (`key_dim`) are cached, and a linear map takes them to the width of the query before the product; positions
are turned into them after it, when every key's position is known. An augmented query has an intermediate width of its
own, dim -> `augmented` -> heads x head_dim; the text does not say what stands between the two maps: nothing, unless
`activation` does. Selective values (`top_values`) sum those of the largest weights only, which are not made to sum to 1
again; the paper has 100 of them at decoding, its models none.

Our choices: the map of narrow keys is one for each key head, and `convert`, which the paper, training from the start,
has no need of: heads of a group are averaged, and keys narrowed to what most of their projection's weights span.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _decoder
from ._layers import projections, replace
from ._mechanism import Cost, by_head, mechanism, pairs, scale_of, softmax, visible
from ._modules import module
from ._softmax import attend
from .memory_efficient import fold, unfold

FEW = 16  # queries, up to which scores are made at once, by products that read each head once


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    return _kept(softmax(scores, visible(query, key, causal=causal, mask=mask)), knobs.get("top_values"))


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = True, top_values: int | None = None) -> Cost:
    seen = pairs(n_query, n_key, causal)
    values = seen if top_values is None else min(seen, n_query * top_values)
    return Cost(2 * dim * (seen + values), 2 * dim * (n_query + n_key))


@mechanism("causal", "full", "cross", mask="pairs", weights=_weights, cost=_cost, apart=True)
def diffqkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    top_values: int | None = None,
) -> Tensor:
    """Softmax attention whose key heads and value heads differ in number. [batch, head, query, dim]

    query: [batch, head, query, dim]; key: [batch, key_head, key, dim]; value: [batch, value_head, key, dim]; both
    numbers divide that of query heads. mask: boolean, broadcasts to [batch, head, query, key]. top_values: how many
    values, those of the largest weights, a query head sums; all unless given. Raises ValueError where heads do not
    divide.

        >>> query, key, value = (torch.randn(1, heads, 9, 16) for heads in (8, 2, 4))
        >>> diffqkv(query, key, value).shape
        torch.Size([1, 8, 9, 16])
    """
    if top_values is not None and top_values < 1:
        raise ValueError(f"diffqkv: sums 1 value or more; got {top_values=}")
    heads, scale = query.shape[1], scale_of(query, scale)
    if query.shape[2] > FEW and top_values is None:
        both = math.lcm(key.shape[1], value.shape[1])
        return attend(query, by_head(key, both), by_head(value, both), causal=causal, mask=mask, scale=scale)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = unfold(fold(query.to(exact), key.shape[1]) @ key.to(exact).mT, heads) * scale
    weights = _kept(softmax(scores, visible(query, key, causal=causal, mask=mask)), top_values)
    return unfold(fold(weights, value.shape[1]) @ value.to(exact), heads).to(value.dtype)


def _kept(weights: Tensor, top: int | None) -> Tensor:
    if top is None or top >= weights.shape[-1]:
        return weights
    return torch.zeros_like(weights).scatter(-1, (found := weights.topk(top, -1)).indices, found.values)


@module(
    "causal",
    build=lambda dim, heads: DiffQKV(dim, heads, key_heads=1, value_heads=_half(heads)),
    held=lambda n, dim, heads: n * (1 + _half(heads)) * (dim // heads),
    mask="pairs",
)
class DiffQKV(nn.Module):
    """A causal self-attention: [batch, token, dim] to the same.

    key_heads, value_heads: divide `heads`. key_dim: width of the keys that a cache would hold, head_dim unless given.
    augmented: intermediate width of the query, none unless given.

    >>> DiffQKV(32, 8, key_heads=2, value_heads=4, key_dim=2, augmented=48)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_heads: int,
        value_heads: int,
        head_dim: int | None = None,
        key_dim: int | None = None,
        augmented: int | None = None,
        activation: Callable[[], nn.Module] = nn.Identity,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _divide(heads, key_heads, value_heads)
        width = head_dim or dim // heads
        self.head_dim, self.key_dim = width, key_dim or width
        query = nn.Linear(augmented or dim, heads * width, bias=bias)
        self.q_proj = (
            query if not augmented else nn.Sequential(nn.Linear(dim, augmented, bias=bias), activation(), query)
        )
        self.k_proj = nn.Linear(dim, key_heads * self.key_dim, bias=bias)
        self.v_proj = nn.Linear(dim, value_heads * width, bias=bias)
        self.o_proj = nn.Linear(heads * width, dim, bias=bias)
        self.widen = Widen(key_heads, self.key_dim, width) if self.key_dim != width else None

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, top_values: int | None = None) -> Tensor:
        """mask: which pairs are visible, boolean, broadcasts to [batch, head, query, key]."""
        query, value = (_decoder.heads(self, name, hidden, self.head_dim) for name in ("q", "v"))
        key = _decoder.heads(self, "k", hidden, self.key_dim)
        key = key if self.widen is None else self.widen(key)
        return self.o_proj(diffqkv(query, key, value, mask=mask, top_values=top_values).transpose(1, 2).flatten(2))

    def cached(self) -> int:
        """Numbers that a cache holds for each token."""
        return self.k_proj.out_features + self.v_proj.out_features


class Widen(nn.Module):
    """The map from narrow keys to the width of the query, of each key head."""

    def __init__(self, heads: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, narrow, wide) * narrow**-0.5)

    def forward(self, key: Tensor) -> Tensor:
        return key @ self.weight


class DiffAttention(nn.Module):
    """What `convert` puts in the place of a decoder's attention; `regard.record` sees it."""

    is_causal = True

    def __init__(self, attention: Any, rotary: Any, key: nn.Linear, value: nn.Linear, widen: Widen | None) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = attention.config, attention.layer_idx, attention.head_dim
        self.scaling, self.dropout = attention.scaling, float(getattr(attention, "attention_dropout", 0.0))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = attention.q_proj, key, value, attention.o_proj
        self.q_norm, self.k_norm = (getattr(attention, f"{name}_norm", None) for name in "qk")
        self.widen = widen
        self.rotary = [rotary]  # the model's own, which it holds already

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: _decoder.Angles,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if self.training and self.dropout:
            raise ValueError("diffqkv: has no dropout of weights; set the model's attention_dropout to 0")
        query = _decoder.rotated(_decoder.heads(self, "q", hidden_states, self.head_dim), position_embeddings)
        value = _decoder.heads(self, "v", hidden_states, self.head_dim)
        narrow = self.head_dim if self.widen is None else self.widen.weight.shape[1]
        key = self.k_proj(hidden_states).unflatten(-1, (-1, narrow)).transpose(1, 2)
        if self.widen is None:
            key = key if self.k_norm is None else self.k_norm(key)
            key = _decoder.rotated(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.widen is not None:
            if position_ids is None:
                raise ValueError("diffqkv: narrow keys are turned to their positions late; pass position_ids")
            if key.shape[2] != hidden_states.shape[1]:  # one after the other, up to the newest
                position_ids = position_ids[:, -1:] + torch.arange(1 - key.shape[2], 1, device=key.device)
            key = self.widen(key)
            key = key if self.k_norm is None else self.k_norm(key)
            key = _decoder.rotated(key, self.rotary[0](hidden_states, position_ids))
        both = math.lcm(key.shape[1], value.shape[1])
        mask = _decoder.seen(attention_mask, "diffqkv")
        output = self._scaled_dot_product_attention(query, by_head(key, both), by_head(value, both), mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def _scaled_dot_product_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _decoder.attend(query, key, value, mask, self.scaling)


@torch.no_grad()
def convert(
    model: nn.Module, *, key_heads: int | None = None, value_heads: int | None = None, key_dim: int | None = None
) -> Callable[[], None]:
    """Compress keys and values of a trained decoder like Llama's; gives the function that undoes it.

    key_heads, value_heads: divide those that the model has, which is what they are unless given. key_dim: even, and
    less than the width of a head, which it is unless given. What the model knows is kept where heads of a group agree,
    and where keys need no more than key_dim directions; it loses the rest until it is trained on. Its cache shrinks
    accordingly. Raises ValueError for other models, and for numbers that do not divide.

        undo = convert(model, key_heads=2, key_dim=16)
        undo()
    """
    if any(isinstance(module, DiffAttention) for module in model.modules()):
        raise ValueError(f"diffqkv: {type(model).__name__} is converted already; undo that first")
    holder, found = _decoder.decoders(model, "diffqkv")
    made = {}
    for name, attention in found.items():
        _, key, value, _ = projections(attention, "diffqkv")
        width: Any = attention.head_dim
        has = key.out_features // width, value.out_features // width
        wanted = key_heads or has[0], value_heads or has[1]
        for what, one, other in zip(("key", "value"), has, wanted):
            if other < 1 or one % other:
                raise ValueError(f"diffqkv: {other} {what} heads do not divide the {one} of {name}")
        narrow, widen = key_dim or width, None
        if not 1 <= narrow <= width:
            raise ValueError(f"diffqkv: key_dim is 1 to {width}, the width of a head; got {key_dim}")
        new_key, new_value = _averaged(key, wanted[0], width), _averaged(value, wanted[1], width)
        if narrow < width:
            new_key, widen = _narrowed(new_key, wanted[0], narrow)
        made[name] = DiffAttention(attention, holder.rotary_emb, new_key, new_value, widen)
    return replace(model, made)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def _averaged(layer: nn.Linear, heads: int, width: int) -> nn.Linear:
    if heads * width == layer.out_features:
        return layer
    parts = (None if t is None else t.unflatten(0, (heads, -1, width)) for t in (layer.weight, layer.bias))
    weight, bias = (None if t is None else t.mean(1).flatten(0, 1) for t in parts)
    assert weight is not None
    return _linear(weight, bias)


def _narrowed(layer: nn.Linear, heads: int, narrow: int) -> tuple[nn.Linear, Widen]:
    """The projection to the directions that hold most of each head's weights, its bias among them, and the way back."""
    parts = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1)
    parts = parts.unflatten(0, (heads, -1))
    widen = Widen(heads, narrow, parts.shape[1]).to(device=parts.device, dtype=parts.dtype)
    kept = torch.linalg.svd(parts.double(), full_matrices=False).U[..., :narrow].to(parts.dtype)
    widen.weight.copy_(kept.mT)
    narrowed = (kept.mT @ parts).flatten(0, 1)
    return (_linear(narrowed, None) if layer.bias is None else _linear(narrowed[:, :-1], narrowed[:, -1])), widen


def _half(heads: int) -> int:
    return heads // 2 if heads % 2 == 0 else 1


def _divide(heads: int, key_heads: int, value_heads: int) -> None:
    if min(key_heads, value_heads) < 1 or heads % key_heads or heads % value_heads:
        raise ValueError(
            f"diffqkv: {key_heads} key heads and {value_heads} value heads have to divide {heads} query heads"
        )
