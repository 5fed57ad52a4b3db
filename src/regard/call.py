"""One attention call, as the seam sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .kernels import Edit, Factor, Operands
from .tokens import Tokens
from .weights import Weights


class UnreachableAttention(TypeError):
    """The model attends in a way that the seam cannot see, or cannot give exactly."""


class Unreadable(UnreachableAttention):
    """One module does so: where other stacks can be recorded, its own is left out."""


@dataclass(frozen=True)
class Site:
    """One attention module inside a model; `heads`, `kv_heads` and `causal` are known from its first call."""

    name: str  # dotted path of the module
    stack: str  # "language_model", "vision_tower", "decoder_cross", ...
    layer: int
    cross: bool = False  # keys come from another sequence
    causal: bool = False
    heads: int = 0
    kv_heads: int = 0
    also: tuple[int, ...] = ()  # further layers that the same module is, by its other names

    def __str__(self) -> str:
        return f"{self.stack} layer {self.layer} ({self.name})"


@dataclass(frozen=True, eq=False)
class Call:
    """Inputs of one attention call; its weights and its output are computed when asked for.

    Weights are softmax(cap(scale * query @ key) + bias + factors, masked), with one more column a row where there are
    sinks.
    """

    site: Site
    query: Tensor  # [batch, head, query, dim]
    key: Tensor  # [batch, kv_head, key, dim]
    value: Tensor  # [batch, kv_head, key, dim]
    scale: float
    mask: Tensor | None = None  # broadcasts to [batch, head, query, key]; boolean (True: visible) or additive
    causal: bool = False  # key j is visible to query i where j <= i, both counted from the first of this call
    bias: Tensor | None = None  # additive, broadcasts to [batch, head, query, key]
    softcap: float | None = None
    sinks: Tensor | None = None  # [head] or [batch, head, query, 1]: a logit that takes weight and gives no value
    query_start: int = 0  # position of the first query in the whole sequence
    key_start: int = 0
    appended: int | None = None  # after a text that it may pad, a model adds so many tokens of its own
    again: bool = False  # the module asks once more over the same positions: another map of the same layer
    positions: Tensor | None = None  # [batch, key] of keys in the whole sequence, where tokens have left before
    tokens: Tokens | None = None  # what each key is; index 0 is position `key_start`
    query_tokens: Tokens | None = None
    earlier: Tokens | None = None  # what stood before `key_start`, and has left a sliding cache
    factors: tuple[Factor, ...] = ()  # of the weights, see `scaled`
    edits: tuple[Edit, ...] = ()  # what interventions make of the weights, in this order
    dropout: float = 0.0  # of the weights, where the output is made here
    own_output: Tensor | None = None  # [batch, head, query, dim], where the model computed it

    @cached_property
    def operands(self) -> Operands:
        """What the kernels are given: all but the site and the tokens."""
        return Operands(*_operands(self))

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.operands, self.tokens, self.query_tokens, self.site)

    @cached_property
    def output(self) -> Tensor:
        """[batch, head, query, dim]"""
        return self.weights.output() if self.own_output is None else self.own_output

    @property
    def query_positions(self) -> range:
        return range(self.query_start, self.query_start + self.query.shape[2])

    @property
    def key_positions(self) -> range:
        return range(self.key_start, self.key_start + self.key.shape[2])

    def of_queries(self, n: int) -> Call:
        """The same of the first `n` queries alone."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.ndim < 2 or tensor.shape[-2] == 1 else tensor[..., :n, :]

        cuts = {name: cut(getattr(self, name)) for name in ("query", "mask", "bias", "sinks", "own_output")}
        tokens = None if self.query_tokens is None else self.query_tokens[:n]
        factors = tuple(Factor(rows[:, :, :n], keys) for rows, keys in self.factors)
        return self.but(**cuts, query_tokens=tokens, factors=factors)

    def scaled(self, *factors: Factor) -> Call:
        """The same with each weight times exp(rows * keys) of all `factors`, and rows that sum to one again.

        What a sink logit takes counts in the sum. No map is made; where weights were edited before, blocks of rows are.
        """
        if not self.edits:
            return self.but(factors=(*self.factors, *factors))
        return self.but(edits=(*self.edits, partial(_scaled, factors)))

    def but(self, **new: Any) -> Call:
        """A copy with `new` fields, which forgets the weights and the output of this one."""
        kept = {name: self.__dict__[name] for name in _FIELDS}
        call = Call(**{**kept, "own_output": None, **new})
        # Of the same operands: what the kernels know of them already is kept.
        if "operands" in self.__dict__ and all(kept[name] is new[name] for name in new.keys() & _OPERANDS):
            call.__dict__["operands"] = self.operands
        return call


def _scaled(factors: Sequence[Factor], weights: Tensor, rows: range) -> Tensor:
    bias = sum(factor.bias(rows.start, rows.stop, weights.shape[-1]) for factor in factors)
    elsewhere = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    weights = weights * torch.as_tensor(bias).exp().to(weights)
    return weights / (weights.sum(-1, keepdim=True) + elsewhere).clamp(min=torch.finfo(weights.dtype).tiny)


_FIELDS = [field.name for field in fields(Call)]
_OPERANDS = {field.name: None for field in fields(Operands)}
_operands = attrgetter(*_OPERANDS)
