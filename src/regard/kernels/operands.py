"""What a kernel is given: the operands of one attention call, and the reductions wanted of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .derivatives import transformed

Edit = Callable[[Tensor, range], Tensor]  # dense weights [batch, head, rows, key] of a range of queries -> what counts


@dataclass(frozen=True, eq=False)
class Operands:
    """Plain tensors and numbers, without a site and without tokens.

    Weights are softmax(cap(scale * query @ key) + bias, masked), with one more column a row where there are sinks.
    """

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
    edits: tuple[Edit, ...] = ()  # of the weights, in this order
    dropout: float = 0.0  # of the weights, where the output is made

    @property
    def wants_gradient(self) -> bool:
        """Whether what is made of these is to be differentiated, in whichever way."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors):
            return True
        return self._transformed

    @cached_property
    def notes(self) -> dict[str, Any]:
        """What a path found out about these already."""
        return {}

    @cached_property
    def _transformed(self) -> bool:
        return transformed(*self.tensors)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.query, self.key, self.value, self.bias, self.mask, self.sinks)


class Reduction(NamedTuple):
    """One number (or k) a row or column; reductions asked together are computed in one pass."""

    name: str
    knob: Any = None  # hashable; a set of positions is a `Chosen`


class Chosen:
    """A boolean (or index) tensor as a knob. Compared by identity, so that it is never mistaken for another call's."""

    def __init__(self, where: Tensor) -> None:
        self.where = where
