"""The attention functions of transformers: what each does with its arguments, as a `Call`, and a check that it does.

The seam stands in for such a function; `Asked` is what it was called with.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..call import Call, Site, Unreadable
from ..functions import arguments
from . import fused
from .parallel import Share

# How far the output may be from weights @ value, as a share of the largest value, before a call counts as misread.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Kinds of calls whose output was compared with weights @ value.
_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


def readable(implementation: str) -> bool:
    """Whether `read` knows what this implementation does with its arguments."""
    return implementation in ("eager", "sdpa", "flex_attention") or fused.is_flash(implementation)


@dataclass(frozen=True, eq=False)
class Asked:
    """An attention function as transformers calls it, or as an adapter does for a module of its own ("own")."""

    implementation: str
    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keywords: dict[str, Any]
    share: Share | None = None  # of its heads, where this process has only some

    def whole(self, output: Tensor) -> Tensor:
        """An output of this process's heads with that of all others."""
        return output if self.share is None else self.share.joined(output)

    def mine(self, tensor: Tensor, of: Tensor) -> Tensor:
        """Of all heads of a tensor, those that this process has of `of`."""
        return tensor if self.share is None else self.share.mine(tensor, of.shape[1])

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own function: output [batch, query, head, dim], and weights where it gives them."""
        return self.function(self.module, query, key, value, self.mask, **self.keywords)

    @property
    def dropout(self) -> float:
        applies = self.implementation not in ("eager", "own") or self.module.training
        return self.keywords.get("dropout", 0.0) if applies else 0.0

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls that the model's own function treats alike."""
        inner = self.function
        if hasattr(inner, "__wrapped__"):
            inner = inspect.unwrap(inner)  # what stays the same where a function is made anew for every call
        return getattr(inner, "__code__", inner), self.query.shape[2] == 1, self.mask is None

    @property
    def new(self) -> bool:
        """Whether no call of this kind was compared with the model's own output. With dropout none can be."""
        if self.keywords.get("checked"):  # by the adapter
            return False
        return not self.dropout and self.kind not in _checked.get(self.module, ())


def read(asked: Asked, site: Site) -> Call:
    """The call in terms of what this implementation does with its arguments."""
    implementation, kwargs = asked.implementation, asked.keywords
    query, key, value, mask = asked.query, asked.key, asked.value, asked.mask
    if len(query) != len(key):  # one row of queries, as learned ones are, for all rows of keys
        batch = max(len(query), len(key))
        query, key, value = (tensor.expand(batch, *tensor.shape[1:]) for tensor in (query, key, value))
    if implementation == "own":  # an adapter's: the module made its weights itself
        weights = kwargs["weights"]
        mask = None if weights.dtype == torch.float16 else weights != 0
        edits = (partial(_own_rows, weights),)
        call = Call(site, query, key, value, 1.0, mask, _is_causal(weights), edits=edits)
        return replace(call, appended=kwargs.get("appended"), again=kwargs.get("again", False))
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if implementation == "flex_attention":
        return replace(Call(site, query, key, value, scale), **fused.flex(asked))
    if fused.is_flash(implementation):
        return replace(Call(site, query, key, value, scale), **fused.flash(asked))
    if not readable(implementation) or not (mask is None or isinstance(mask, Tensor)):
        raise Unreadable(f"{site.name} runs with {implementation!r}, which Regard cannot read exactly")
    bias, softcap, sinks, causal = kwargs.get("position_bias"), None, None, False
    if implementation == "sdpa":
        causal = kwargs.get("is_causal")
        causal = getattr(asked.module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and mask is None and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:  # prefill into a longer static cache
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            bias = None if bias is None else bias[..., : query.shape[2]]
    else:
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)  # eager functions add it, also where a model hands them a boolean one
        code = inspect.unwrap(asked.function)
        honoured = arguments(code)
        bias = bias if "position_bias" in honoured else None
        softcap = kwargs.get("softcap") if "softcap" in honoured else None
        sinks = kwargs.get("sinks") if "sinks" in honoured else None
        if sinks is None and "sinks" in getattr(code, "__code__", code).co_names:
            sinks = cast(Tensor, asked.module.sinks)
    return Call(site, query, key, value, scale, mask, causal, bias, softcap, sinks)


def _own_rows(own: Tensor, weights: Tensor, rows: range) -> Tensor:
    return own[:, :, rows.start : rows.stop].to(weights.dtype)


def _is_causal(weights: Tensor) -> bool:
    n, n_key = weights.shape[-2:]
    return n == n_key > 1 and not bool(weights.triu(1).any()) and bool(weights.tril(-1).any())


@torch.no_grad()
def check(asked: Asked, call: Call) -> None:
    """Raise where the model's own output does not follow from the weights as read: nothing inexact is recorded."""
    assert call.own_output is not None
    n_query, value = call.query.shape[2], call.value
    group = call.query.shape[1] // value.shape[1]
    for at in sorted({0, n_query // 2, n_query - 1}):
        weights = call.weights.rows(at, at + 1)
        grouped = weights.unflatten(1, (value.shape[1], group)).flatten(2, 3)
        ours = (grouped @ value.to(weights.dtype)).unflatten(2, (group, 1)).flatten(1, 2)
        theirs = call.own_output[:, :, at : at + 1].to(ours.dtype)
        if fused.is_flash(asked.implementation):  # of queries that are padding it computes nothing
            theirs = theirs.masked_fill(weights.sum(-1, keepdim=True) == 0, 0.0)
        rounding = max(TOLERANCE[call.query.dtype], TOLERANCE[call.own_output.dtype])  # flash attention may give less
        limit = rounding * float(value.abs().amax().nan_to_num(1.0)) + 1e-30
        by_float32 = asked.implementation == "eager" and call.query.dtype == torch.float64
        if by_float32 and theirs.isnan().any() and not (ours.isnan().any() or value.isnan().any()):
            raise Unreadable(
                f"{call.site}: the model's own output of attention is NaN where its query, key, value and mask are "
                f"not, and so is what follows from it. In float64, transformers' eager functions take the softmax in "
                f"float32, where a masked score is -inf, and a query that sees no key (padding) has none: run the "
                f"model in float32, or with set_attn_implementation('sdpa')"
            )
        if not torch.allclose(ours, theirs, rtol=0.0, atol=limit, equal_nan=True):
            off = float((ours - theirs).abs().max())
            raise Unreadable(
                f"{call.site}: the output of its attention does not follow from the query, key, value and mask seen at "
                f"the seam (off by {off:.2g}), so its weights would be wrong; this model needs an adapter"
            )
    _checked.setdefault(asked.module, set()).add(asked.kind)
