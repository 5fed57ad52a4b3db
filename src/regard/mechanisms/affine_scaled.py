"""Softmax weights times a factor that each query and head computes from the layer's input, plus the same for every key.

Bae et al., Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention (arXiv:2602.23057). With X the
layer's input: alpha = phi(X W), one number a query and head, phi(x) = x / 10 + 1/2 cut at 0 and 1; its running mean
starts at 0 and moves by a tenth towards each training batch's mean; beta = (mean - alpha) / N;

    output = (alpha softmax(query . key) + beta) value        over the visible keys

which is computed as alpha times attention plus beta times the sum of visible values. Weights may be negative, and a
row sums to alpha + visible / N (mean - alpha).

What the paper does not say, and our readings: only visible keys get beta (anything else would show the future); the
running mean is of each head, over batch and queries, padding among them; it is brought up to date before it is used,
and no gradient goes through it. N is the number of keys of the call, in the paper's words; counted by what is visible
instead (`count="visible"`), every row would sum to the mean, and the paper's sums that spread over queries could not
be. Padding is no key. With "keys", decoding token by token does not repeat a full pass, since N grows: give the length
of training as a number instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..functions import bound
from . import _decoder
from ._layers import attentions, projections, replace
from ._mechanism import Cost, anywhere, by_head, kept, pairs, scale_of, softmax, visible
from ._modules import converted, module
from ._softmax import attend as softmax_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda x: (0.1 * x + 0.5).clamp(0, 1),
    "sigmoid": torch.sigmoid,
}
Count = int | Literal["keys", "visible"]


def shift(alpha: Tensor, mean: Tensor, n_key: int, seen: Tensor | None, causal: bool, count: Count) -> Tensor:
    """beta, [batch, head, query, 1], of alpha [batch, head, query] and mean [head]."""
    apart = (mean[:, None] - alpha)[..., None]
    if count == "keys" and seen is not None:  # of those that are there at all
        return apart / anywhere(seen.expand(-1, -1, -1, n_key)).sum(-1, keepdim=True).clamp_min(1)
    if count != "visible":
        return apart / (n_key if count == "keys" else count)
    if seen is not None:
        return apart / seen.sum(-1, keepdim=True).clamp_min(1)
    n_query = alpha.shape[2]
    rows = torch.arange(n_key - n_query + 1, n_key + 1, device=alpha.device) if causal else alpha.new_full((1,), n_key)
    return apart / rows[:, None]


def visible_sum(value: Tensor, n_query: int, seen: Tensor | None, causal: bool) -> Tensor:
    """The sum of the values that each query sees. [batch, kv_head or head, query or 1, dim]"""
    exact = value.to(torch.promote_types(value.dtype, torch.float32))
    if seen is not None:
        return seen.to(exact.dtype) @ (exact if seen.shape[1] == 1 else by_head(exact, seen.shape[1]))
    return exact.cumsum(2)[:, :, -n_query:] if causal else exact.sum(2, keepdim=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    mean: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    count: Count = "keys",
) -> Tensor:
    """(alpha softmax + beta) value. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; alpha: [batch, head, query]; mean: of
    alpha, [head]. mask: boolean, broadcasts to [batch, head, query, key]. count: N, a number or what is counted.

        >>> x = torch.randn(1, 2, 9, 8)
        >>> attend(x, x, x, torch.rand(1, 2, 9), torch.full((2,), 0.5)).shape
        torch.Size([1, 2, 9, 8])
    """
    _check(count)
    if alpha.shape != query.shape[:3] or mean.shape != query.shape[1:2]:
        raise ValueError(
            f"affine_scaled: alpha is {list(query.shape[:3])} and its mean {list(query.shape[1:2])}; got "
            f"{list(alpha.shape)} and {list(mean.shape)}"
        )
    if mask is not None:
        key, value = (kept(t, anywhere(mask).mT) for t in (key, value))
    output = softmax_attention(query, key, value, causal=causal, mask=mask, scale=scale_of(query, scale))
    seen = None if mask is None else visible(query, key, causal=causal, mask=mask)
    return _joined(output, value, alpha, mean, seen, causal, count)


def _joined(
    output: Tensor, value: Tensor, alpha: Tensor, mean: Tensor, seen: Tensor | None, causal: bool, count: Count
) -> Tensor:
    beta = shift(alpha, mean, value.shape[2], seen, causal, count)
    total = by_head(visible_sum(value, output.shape[2], seen, causal), output.shape[1])
    return (alpha[..., None] * output + beta * total).to(output.dtype)


def weights(
    query: Tensor,
    key: Tensor,
    alpha: Tensor,
    mean: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    count: Count = "keys",
) -> Tensor:
    """What it amounts to: dense [batch, head, query, key], which may be negative and need not sum to 1."""
    seen = visible(query, key, causal=causal, mask=mask)
    whole = torch.ones(*query.shape[2:3], key.shape[2], dtype=torch.bool, device=query.device)
    there = whole if seen is None else seen
    shares = softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen)
    return alpha[..., None] * shares + shift(alpha, mean, key.shape[2], seen, causal, count) * there


def _check(count: Any) -> None:
    if count not in ("keys", "visible") and not (isinstance(count, int) and count > 0):
        raise ValueError(f"affine_scaled: count is 'keys', 'visible' or a number of keys; got {count!r}")


@module("causal", "full", build=lambda dim, heads, causal: converted(affine_scaled, dim, heads, causal=causal))
class AffineScaled(nn.Module):
    """An attention module whose weights are scaled and shifted; takes and gives what that module does.

    `regard.record` sees the softmax part of the weights; `alpha` holds the factors of the last forward pass [batch,
    head, query].
    """

    def __init__(
        self,
        attention: nn.Module,
        projection: str,
        dim: int,
        heads: int,
        momentum: float,
        activation: str,
        count: Count,
    ) -> None:
        super().__init__()
        like = next(attention.parameters())
        self.attention, self.projection = attention, projection
        self.momentum, self.activation = momentum, activation
        self.count: Count = count
        self.factor = nn.Linear(dim, heads, bias=False, device=like.device, dtype=like.dtype)
        self.register_buffer("mean", torch.zeros(heads, device=like.device, dtype=like.dtype))
        self.alpha: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = bound(self.attention, (hidden_states, *args), kwargs)
        if given.get("encoder_hidden_states") is not None or given.get("key_value_states") is not None:
            raise ValueError("affine_scaled: takes self-attention, not another sequence's states")
        alpha = ACTIVATIONS[self.activation](self.factor(hidden_states)).mT
        self.alpha, mean = alpha, cast(Tensor, self.mean)
        if self.training:
            mean.mul_(self.momentum).add_((1 - self.momentum) * alpha.detach().mean((0, 2)))
            mean = mean.clone()  # the next batch writes into it
        causal = bool(getattr(self.attention, "is_causal", getattr(self.attention, "causal", False)))
        mask, cache = _decoder.seen(given.get("attention_mask"), "affine_scaled"), given.get("past_key_values")
        layer: Any = getattr(self.attention, "layer_idx", None)
        past = 0 if cache is None else int(cache.get_seq_length(layer))
        values: list[Tensor] = []

        def scaled(_: nn.Module, mixed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads = mixed[0].unflatten(-1, (alpha.shape[1], -1)).transpose(1, 2)
            value = values[0].unflatten(-1, (-1, heads.shape[-1])).transpose(1, 2)
            value = cache.layers[layer].values if cache is not None and past else value
            n_key = past + heads.shape[2] if mask is None else mask.shape[-1]
            if value.shape[2] != n_key:
                raise ValueError(
                    f"affine_scaled: has to sum the values of {n_key} keys, but the cache holds {value.shape[2]}; use "
                    f"the default cache, and no sliding window with it"
                )
            output = _joined(heads, value, alpha, mean, mask, causal and mask is None, self.count)
            return (output.transpose(1, 2).flatten(2), *mixed[1:])

        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            values.append(output)

        value, output = (projections(self.attention, "affine_scaled")[i] for i in (2, 3))
        handles = [value.register_forward_hook(see), output.register_forward_pre_hook(scaled)]
        try:
            return self.attention(hidden_states, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def affine_scaled(
    model: nn.Module, *, momentum: float = 0.9, activation: str = "clip", count: Count = "keys"
) -> Callable[[], None]:
    """Scale and shift every attention of a model, with new weights to be trained; gives the function that undoes it.

    momentum: how much of the running mean stays at each step of training; activation: "clip", or "sigmoid", the paper's
    ablation. count: what beta is divided by: "keys", "visible" ones, or a number. The factors start near 1/2. The paper
    trains such models from the start; a trained model is about halved, and needs training. Raises ValueError where
    no attention module with separate projections is found.

        undo = affine_scaled(model, count=2048)
        undo()
    """
    _check(count)
    if activation not in ACTIVATIONS or not 0 <= momentum < 1:
        raise ValueError(
            f"affine_scaled: activation is one of {tuple(ACTIVATIONS)}, momentum 0 or more and below 1; got "
            f"{activation!r} and {momentum}"
        )
    if already := [name for name, module in model.named_modules() if isinstance(module, AffineScaled)]:
        raise ValueError(f"affine_scaled: {already[0]} is scaled already; undo that first")
    made = {}
    for name, (attention, output) in attentions(model, None, "affine_scaled").items():
        if isinstance(attention, nn.MultiheadAttention):
            continue  # models pool with it
        last, width = projections(attention, "affine_scaled")[3], getattr(attention, "head_dim", None)
        if width is None:
            raise ValueError(f"affine_scaled: {name} does not say its head_dim")
        dim, heads = last.out_features, last.in_features // width
        made[name] = AffineScaled(attention, output, dim, heads, momentum, activation, count).train(attention.training)
    return replace(model, made)


convert = affine_scaled


def cost(n_query: int, n_key: int, dim: int, *, channels: int, causal: bool = True) -> Cost:
    """Of one head: attention, the factors of `channels` channels of the layer's input, and the sums of values."""
    own = 2 * channels * n_query + dim * n_key + 3 * dim * n_query
    return Cost(4 * dim * pairs(n_query, n_key, causal) + own, 2 * dim * (n_query + n_key) + channels * n_query)
