"""Attention to the keys whose values say that they count.

Shi et al., Trainable Dynamic Mask Sparse Attention (arXiv:2508.02124), section 3, and the authors' model Doge as in
transformers.

A number for each key and key head is made from the values of all key heads at that place, b = exp(A softplus(W v)).
Of the keys that a query may see it keeps the `window` ones with the largest number; the number is also added to their
scores, which is how W and A are trained, since the choice has no gradient. The number of a key is the same for every
query, so what was dropped once stays dropped: a block of queries meets the keys that were kept before it and its own.

Deviations: of equal numbers the newest keys are kept, where top-k says nothing. With `form="linear"` the number is
A softplus(W v), as in a later model of the authors. The option to keep blocks whole is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import native
from ..kernels.derivatives import transformed
from ._layers import own
from ._mechanism import Cost, by_head, mechanism, recomputed, scale_of, softmax, visible
from ._softmax import runs_native

FORMS = ("exp", "linear")
BLOCK = 64  # queries that are worked on together


def kept(bias: Tensor, n_query: int, *, causal: bool, mask: Tensor | None, window: int) -> Tensor:
    """Which keys each query keeps. [batch, kv_head, query, key], boolean; holds the map"""
    order = bias.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = bias.shape[-1] - 1 - order  # of equal ones the newest first
    seen = visible(bias.new_zeros(1, 1, n_query, 1), bias[..., None], causal=causal, mask=mask)
    shape = (*bias.shape[:2], n_query, bias.shape[-1])
    seen = torch.ones(shape, dtype=torch.bool, device=bias.device) if seen is None else seen.expand(shape)
    order = order[:, :, None].expand(shape)
    seen = seen.gather(-1, order)
    return torch.zeros_like(seen).scatter_(-1, order, seen & (seen.cumsum(-1) <= window))


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    bias, window, heads = _bias(knobs.get("bias"), key, None), knobs.get("window", 2048), query.shape[1]
    seen = by_head(kept(bias.detach(), query.shape[2], causal=causal, mask=mask, window=window), heads)
    return softmax(query @ by_head(key, heads).mT * scale_of(query, scale) + by_head(bias, heads)[:, :, None], seen)


def _bias(bias: Tensor | None, key: Tensor, name: str | None) -> Tensor:
    """Of each key, [batch, kv_head, key]; 1 of all where none is given."""
    shape = key.shape[:3]
    if bias is None:
        return key.new_ones(shape)
    if bias.ndim != 3 or any(b not in (1, n) for b, n in zip(bias.shape, shape)) or bias.shape[2] != shape[2]:
        raise ValueError(
            f"{name}: bias has a number for each key, [batch, kv_head, key] = {list(shape)}; got {list(bias.shape)}"
        )
    return bias.expand(shape)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = True, window: int = 2048, **_: Any) -> Cost:
    first = n_key - n_query
    short = max(0, min(window, n_key) - first)  # queries that keep all
    taken = (first + 1 + first + short) * short / 2 + (n_query - short) * window
    taken = taken if causal else n_query * min(window, n_key)
    return Cost(4 * dim * taken, 2 * dim * n_query + 2 * dim * n_key + 2 * dim * n_query / BLOCK * min(window, n_key))


@mechanism("causal", "full", "cross", mask="keys", weights=_weights, cost=_cost)
def dynamic_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    window: int = 2048,
) -> Tensor:
    """Softmax attention to the `window` visible keys with the largest bias, which is added. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]; of more keys than queries, the queries are
    the last. bias: of each key, [batch, kv_head, key], as `DynamicMask` makes it from values; 1 of all where it is
    None, as A = 0 has it, which keeps the newest. With `window` keys or fewer it is attention with that bias. mask:
    which keys there are, [batch, 1, 1, key]. Raises ValueError for a window below 1, and a bias of another shape.

        >>> x = torch.randn(1, 4, 3000, 64)
        >>> dynamic_mask(x, x, x, bias=x.mean(-1), window=256).shape
        torch.Size([1, 4, 3000, 64])
    """
    if window < 1:
        raise ValueError(f"dynamic_mask: a query keeps 1 key or more; got {window=}")
    bias, n_query, n_key = _bias(bias, key, "dynamic_mask"), query.shape[2], key.shape[2]
    scale, parts = scale_of(query, scale), []
    there = torch.ones(1, 1, n_key, dtype=torch.bool, device=key.device) if mask is None else mask[:, :, 0]
    there = there.expand(len(query), key.shape[1], -1)
    at = torch.arange(n_key, device=key.device).expand_as(there)
    if not causal:
        held = _best(at, bias, there, window)
        return _attend(query, key, value, bias, held, _there(there, held)[:, :, None], scale)
    first = n_key - n_query
    held = _best(at[..., :first], bias, there, window)
    for a in range(first, n_key, BLOCK):
        b = min(a + BLOCK, n_key)
        met = torch.cat([held, at[..., a:b]], -1)
        order = _order(met, bias)
        met = met.gather(-1, order)
        seen = (met[:, :, None] <= torch.arange(a, b, device=key.device)[:, None]) & _there(there, met)[:, :, None]
        seen = seen & (seen.cumsum(-1) <= window)
        rows = query[:, :, a - first : b - first]
        parts.append(recomputed(_attend, rows, key, value, bias, met, seen, scale))
        held = _best(met, bias, there, window)
    return torch.cat(parts, 2)


def _order(keys: Tensor, bias: Tensor) -> Tensor:
    """Of keys [batch, kv_head, slot]: places by bias, the largest first, of equal ones the newest."""
    newest = keys.argsort(dim=-1, descending=True)
    by_bias = bias.detach().gather(-1, keys.gather(-1, newest)).argsort(dim=-1, descending=True, stable=True)
    return newest.gather(-1, by_bias)


def _there(there: Tensor, keys: Tensor) -> Tensor:
    return there.gather(-1, keys)


def _best(keys: Tensor, bias: Tensor, there: Tensor, window: int) -> Tensor:
    """The `window` with the largest bias of those that are there, then others. [batch, kv_head, slot]"""
    order = keys.gather(-1, _order(keys, bias))
    return order.gather(-1, (~_there(there, order)).to(torch.uint8).argsort(dim=-1, stable=True)[..., :window])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keys: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """Attention to some keys [batch, kv_head, slot], of which a query sees `seen` [batch, kv_head, query|1, slot]."""
    key, value = (t.gather(2, keys[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (key, value))
    heads = query.shape[1]
    bias, seen = by_head(bias.gather(-1, keys), heads)[:, :, None], by_head(seen, heads)
    if runs_native(query) and not transformed(query, key, value, bias):
        # With a bias the kernel hides keys by a finite number, as transformers does: all alike where none is seen.
        return native.attention(query, key, value, scale=scale, mask=seen, bias=bias).where(seen.any(-1, True), 0.0)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ by_head(key, heads).to(exact).mT * scale + bias
    return (softmax(scores, seen) @ by_head(value, heads).to(exact)).to(value.dtype)


class DynamicMask(nn.Module):
    """The bias of each key from its values, and attention with it; takes query, key and value.

    dim: of a head. form: "exp" or "linear". As it begins, with A = 0, "exp" adds 1 to each score, which changes no
    weight, and keeps the newest keys.
    """

    def __init__(self, dim: int, kv_heads: int, *, window: int = 2048, form: str = "exp") -> None:
        if form not in FORMS:
            raise ValueError(f"DynamicMask: form is one of {FORMS}; got {form!r}")
        super().__init__()
        self.window, self.form = window, form
        self.A = nn.Parameter(torch.zeros(kv_heads))
        self.dt_proj = nn.Linear(kv_heads * dim, kv_heads, bias=False)

    def bias(self, value: Tensor) -> Tensor:
        """[batch, kv_head, key], of values [batch, kv_head, key, dim]."""
        z = self.A * F.softplus(self.dt_proj(value.transpose(1, 2).flatten(2)))
        return (z.exp() if self.form == "exp" else z).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        return dynamic_mask(query, key, value, bias=self.bias(value), window=self.window, **how)


def convert(model: nn.Module, *, window: int = 2048, form: str = "exp", std: float = 0.02) -> Callable[[], None]:
    """Give every attention of a model a dynamic mask with new weights to train; gives the function that undoes it.

    std: of the numbers A as they begin, as in the authors' models. Keys beyond `window` are lost to a model that was
    not trained so. Raises ValueError where the model is none of transformers'.

        undo = convert(model, window=256)
        ...
        undo()
    """

    def made(dim: int, heads: int, kv_heads: int) -> nn.Module:
        module = DynamicMask(dim, kv_heads, window=window, form=form)
        nn.init.normal_(module.A, std=std)
        nn.init.normal_(module.dt_proj.weight, std=1 / math.sqrt(kv_heads * dim))
        return module

    return own(model, dynamic_mask, made)
