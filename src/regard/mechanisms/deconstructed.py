"""Language models in whose layers attention lacks one of its principles: mixing, softmax's form, or queries and keys of
the sequence.

Xue et al., Deconstructing Attention: Investigating Design Principles for Effective Language Modeling
(arXiv:2510.11602), sections 3 and 4. Of a layer's hidden states H:

    no-mixing   W_down (silu(H W_gate) * (H W_up)), as wide as has attention's number of weights
    taylor      weights proportional to 1 + s + s^2 / 2, with s the scaled score (equation 6)
    running     softmax over the past of a score that is the key's own: silu(query_j) . key_j, a running mean
    random      queries and keys from what the layers below make of a random text, the same for every input
    text        the same from one given text
    static      queries and keys from the embeddings of the tokens

`deconstructed` is the operator of the second and third, which need no more than query, key and value; `deconstruct`
puts any of the six into all or some layers of a decoder like Llama's or Qwen's. "odd" layers, from 1, are the paper's
hybrids: the first layer is a simple one.

Our readings: queries and keys are rotated as in the model, also in "running", where both are of one place and it makes
no difference but through silu; the fixed texts run through the model as a second stream that gradients flow through,
random embeddings with the model's own deviation at the start, 0.02. Deviation: the Taylor form is computed from its
map, which is cheaper than the recurrent form up to about dim^2 / 2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _decoder
from ._layers import projections, replace
from ._mechanism import Cost, by_head, mechanism, pairs, recomputed, scale_of, visible
from .aaren import prefixes
from .memory_efficient import fold, unfold

FORMS = ("taylor", "running")
FIXED = ("random", "text", "static")
VARIANTS = ("no-mixing", *FORMS, *FIXED)
_STRIP = 2**22  # weights made at once


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    key = by_head(key, query.shape[1])
    seen, scale = visible(query, key, causal=causal, mask=mask), scale_of(query, scale)
    if knobs.get("form", "taylor") == "taylor":
        return _normalised(query @ key.mT * scale, seen)
    assert seen is not None
    top = (F.silu(query) * key).sum(-1)[:, :, None] * scale
    return (
        top.expand(-1, -1, query.shape[2], -1)
        .masked_fill(~seen, torch.finfo(top.dtype).min)
        .softmax(-1)
        .where(seen, 0.0)
    )


def _normalised(scores: Tensor, seen: Tensor | None) -> Tensor:
    """1 + s + s^2 / 2 is at least 1/2, so a row that sees anything has a sum."""
    each = 1 + scores + scores.square() / 2
    each = each if seen is None else each.where(seen, 0.0)
    total = each.sum(-1, keepdim=True)
    return each / total.where(total > 0, 1.0)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = True, form: str = "taylor") -> Cost:
    if form == "running":
        return Cost(4 * dim * n_key, 4 * dim * n_key)
    return Cost(4 * dim * pairs(n_query, n_key, causal), 2 * dim * (n_query + n_key))


@mechanism("causal", mask="keys", weights=_weights, cost=_cost)
def deconstructed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    form: str = "taylor",
) -> Tensor:
    """A mean of past values by another formula than softmax of scores. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. Weights are 0 or more and sum to 1. form:
    "taylor", softmax's exponential to second order, at square cost; or "running", whose scores are each key's own, in
    linear time: it needs the query of every key, so there are as many. mask: which keys there are, [batch, 1, 1, key].
    Raises ValueError for another form.

        >>> x = torch.randn(1, 2, 9, 8)
        >>> deconstructed(x, x, x).shape, deconstructed(x, x, x, form="running").shape
        (torch.Size([1, 2, 9, 8]), torch.Size([1, 2, 9, 8]))
    """
    if form not in FORMS:
        raise ValueError(f"deconstructed: form is one of {FORMS}; got {form!r}")
    scale, exact = scale_of(query, scale), torch.promote_types(query.dtype, torch.float32)
    if form == "running":
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"deconstructed: a running mean needs the query of every key; got {query.shape[2]} queries and "
                f"{key.shape[2]} keys. Run the whole sequence, without a cache"
            )
        top = (F.silu(query.to(exact)) * by_head(key, query.shape[1]).to(exact)).sum(-1) * scale
        top = top if mask is None else top.masked_fill(~mask[:, :, 0], float("-inf"))
        mixed = by_head(value, query.shape[1]).to(exact)
        return prefixes(top, mixed).to(value.dtype)
    step = max(1, _STRIP // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = []
    for start in range(0, query.shape[2], step):
        rows = slice(start, min(start + step, query.shape[2]))
        parts.append(recomputed(_strip, query, key, value, mask, scale, rows))
    return torch.cat(parts, 2).to(value.dtype)


def _strip(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, rows: slice) -> Tensor:
    exact, heads, kv_heads = torch.promote_types(query.dtype, torch.float32), query.shape[1], key.shape[1]
    n_query, n_key = query.shape[2], key.shape[2]
    last = torch.arange(rows.start, rows.stop, device=query.device) + n_key - n_query
    seen = (torch.arange(n_key, device=query.device) <= last[:, None])[None, None]
    seen = seen if mask is None else seen & mask
    scores = unfold(fold(query[:, :, rows].to(exact), kv_heads) @ key.to(exact).mT, heads) * scale
    return unfold(fold(_normalised(scores, seen), kv_heads) @ value.to(exact), heads)


class NoMixing(nn.Module):
    """A gated MLP in the place of attention, with as many weights: [batch, token, dim] to the same."""

    def __init__(self, dim: int, weights: int, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        hidden = max(1, round(weights / (3 * dim)))
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:  # by which models count the tokens that were
            one = hidden_states[:, None, :, :1].detach()
            past_key_values.update(one, one, self.layer_idx)
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states)), None


class _Stream:
    """What the layers of one model share: the second stream, or the tokens' embeddings."""

    def __init__(self, source: str, text: Tensor | None) -> None:
        self.source, self.text = source, text
        self.running = False  # whether the second stream runs
        self.embeddings: Tensor | None = None
        self.past = 0


class SimplerAttention(nn.Module):
    """A decoder's attention with another formula, which `regard.record` does not see."""

    is_causal = True

    def __init__(self, attention: Any, variant: str, stream: _Stream | None) -> None:
        super().__init__()
        self.variant, self.stream = variant, [stream]
        self.layer_idx, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.config, self.dropout = attention.config, float(getattr(attention, "attention_dropout", 0.0))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections(attention, "deconstruct")
        self.q_norm, self.k_norm = (getattr(attention, f"{name}_norm", None) for name in "qk")
        self.fixed: tuple[Tensor, Tensor] | None = None

    def _query_key(self, hidden: Tensor, angles: _decoder.Angles) -> tuple[Tensor, Tensor]:
        query, key = (_decoder.rotated(_decoder.heads(self, n, hidden, self.head_dim), angles) for n in ("q", "k"))
        return query, key

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: _decoder.Angles,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if self.training and self.dropout:
            raise ValueError("deconstruct: has no dropout of weights; set the model's attention_dropout to 0")
        stream, n = self.stream[0], hidden_states.shape[1]
        value = _decoder.heads(self, "v", hidden_states, self.head_dim)
        fixed = stream is not None and stream.source != "static" and not stream.running
        if fixed:
            if self.fixed is None or stream is None:
                raise ValueError("deconstruct: the fixed text has not run; call the model that was given, not a layer")
            query, key = (t.expand(len(hidden_states), -1, -1, -1) for t in self.fixed)
            query, key = query[:, :, stream.past : stream.past + n], key[:, :, stream.past : stream.past + n]
        else:
            static = stream is not None and stream.source == "static"
            source = stream.embeddings if static and stream is not None else hidden_states
            assert source is not None
            query, key = self._query_key(source, position_embeddings)
            if stream is not None and stream.running:
                self.fixed = query, key
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask = _decoder.seen(attention_mask, "deconstruct")
        output = self._mixed(query, key, value, mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return deconstructed(query, key, value, mask=self._keys(mask), scale=self.scaling, form=self.variant)

    @staticmethod
    def _keys(mask: Tensor | None) -> Tensor | None:
        """Which keys there are, by what the last query sees."""
        if mask is None:
            return None
        keys, (n_query, n_key) = mask[:, :1, -1:], mask.shape[2:]
        past = torch.ones(n_query, n_key, dtype=torch.bool, device=mask.device).tril(n_key - n_query)
        if not torch.equal((past & keys).expand_as(mask), mask):
            raise ValueError(
                "deconstruct: can only be told which keys there are, not which pairs are visible (packed sequences and "
                "static caches need that)"
            )
        return keys


class BorrowingAttention(SimplerAttention):
    """Softmax attention whose queries and keys come from elsewhere.

    `regard.record` sees it; what a fixed text gives in the layers is a run of its own, before that of the input.
    """

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self._scaled_dot_product_attention(query, key, value, mask)

    def _scaled_dot_product_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _decoder.attend(query, key, value, mask, self.scaling)


def deconstruct(
    model: nn.Module,
    variant: str,
    *,
    layers: str | Sequence[int] = "all",
    text: Tensor | None = None,
    length: int = 2048,
    seed: int = 0,
) -> Callable[[], None]:
    """Give layers of a decoder a simpler attention, to be trained; gives the function that undoes it.

    variant: one of `VARIANTS`. layers: "all", "odd" (the paper's hybrids; counted from 1, so the first is one), "even",
    or their indices from 0. text: ids [token], for "text"; length, seed: tokens of the random text, and what it is
    drawn by. A fixed text limits how long inputs may be. "running" takes no cache; the fixed ones take no padding on
    the left. New weights, of "no-mixing", are drawn as PyTorch does. Raises ValueError for other models, variants and
    layers.

        undo = deconstruct(model, "static", layers="odd")
        undo()
    """
    if variant not in VARIANTS:
        raise ValueError(f"deconstruct: variant is one of {VARIANTS}; got {variant!r}")
    if (variant == "text") != (text is not None):
        raise ValueError(f"deconstruct: text=ids goes with variant 'text', and is needed there; got {variant!r}")
    if any(isinstance(module, (SimplerAttention, NoMixing)) for module in model.modules()):
        raise ValueError(f"deconstruct: {type(model).__name__} is deconstructed already; undo that first")
    holder, found = _decoder.decoders(model, "deconstruct")
    every = range(len(found))
    named = {"all": every, "odd": every[::2], "even": every[1::2]}
    chosen = named.get(layers) if isinstance(layers, str) else sorted(set(layers))
    if not chosen or not set(chosen) <= set(every):
        raise ValueError(
            f"deconstruct: layers is {', '.join(map(repr, named))} or indices below {len(found)}; got {layers!r}"
        )
    stream = _stream(holder, variant, text, length, seed) if variant in FIXED else None
    made: dict[str, nn.Module] = {}
    for i, (name, attention) in enumerate(found.items()):
        if i not in chosen:
            continue
        parts = projections(attention, "deconstruct")
        weight = parts[0].weight
        made[name] = (
            NoMixing(parts[0].in_features, sum(part.weight.numel() for part in parts), i).to(
                weight.device, weight.dtype
            )
            if variant == "no-mixing"
            else (SimplerAttention if stream is None else BorrowingAttention)(attention, variant, stream)
        ).train(attention.training)
    undo, handles = replace(model, made), [] if stream is None else _hooked(holder, stream)

    def all_undone() -> None:
        for handle in handles:
            handle.remove()
        undo()

    return all_undone


convert = deconstruct


def _stream(holder: Any, variant: str, text: Tensor | None, length: int, seed: int) -> _Stream:
    if variant == "static":
        return _Stream(variant, None)
    embeddings = holder.get_input_embeddings().weight
    if text is None:
        drawn = torch.randn(1, length, embeddings.shape[1], generator=torch.Generator().manual_seed(seed))
        return _Stream(variant, float(getattr(holder.config, "initializer_range", 0.02)) * drawn.to(embeddings))
    if text.ndim != 1 or text.is_floating_point() or not len(text):
        raise ValueError(f"deconstruct: text is ids [token]; got {text.dtype} {list(text.shape)}")
    return _Stream(variant, text[None].to(embeddings.device))


def _hooked(holder: Any, stream: _Stream) -> list[Any]:
    """Before the layers of the model run, the second stream does, as long as is needed."""

    def embedded(_: nn.Module, __: Any, output: Tensor) -> None:
        stream.embeddings = output

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if stream.running:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if stream.source == "static":
            stream.embeddings = kwargs.get("inputs_embeds")
            return
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if isinstance(mask, Tensor) and (mask.ndim != 2 or not bool(mask[:, 0].all())):
            raise ValueError("deconstruct: a fixed text starts with the sequence, so there is no padding on the left")
        if not isinstance(given, Tensor) or stream.text is None:
            return  # the model says what it lacks
        stream.past = 0 if cache is None else int(cache.get_seq_length())
        needed = stream.past + given.shape[1]
        if needed > stream.text.shape[1]:
            raise ValueError(f"deconstruct: the fixed text has {stream.text.shape[1]} tokens, the sequence {needed}")
        text, stream.running, training = stream.text[:, :needed], True, holder.training
        try:
            holder.eval()  # without dropout
            holder(**{"input_ids" if text.ndim == 2 else "inputs_embeds": text}, use_cache=False)
        finally:
            holder.train(training)
            stream.running = False

    handles = [holder.register_forward_pre_hook(before, with_kwargs=True)]
    if stream.source == "static":
        handles.append(holder.get_input_embeddings().register_forward_hook(embedded))
    return handles
