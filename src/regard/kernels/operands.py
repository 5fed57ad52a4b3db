"""What a kernel is given: the operands of one attention call, and the reductions wanted of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .derivatives import transformed

Edit = Callable[[Tensor, range], Tensor]  # dense weights [batch, head, rows, key] of a range of queries -> what counts


class Factor(NamedTuple):
    """Each weight is times exp(rows * keys), and rows sum to one again. Finite.

    More or less attention to chosen keys, by the row. It costs a number more of each query and key, where a bias that
    says the same would be a map.
    """

    rows: Tensor  # [batch|1, head|1, query]
    keys: Tensor  # [batch|1, head|1, key]

    def bias(self, a: int, b: int, n: int) -> Tensor:
        """What the scores of queries a to b and of the first n keys get. [batch|1, head|1, b-a, n]"""
        return self.rows[:, :, a:b, None] * self.keys[:, :, None, :n]


@dataclass(frozen=True, eq=False)
class Operands:
    """Plain tensors and numbers, without a site and without tokens.

    Weights are softmax(cap(scale * query @ key) + bias + factors, masked), with one more column a row where there are
    sinks.
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
    factors: tuple[Factor, ...] = ()  # of the weights, all before the edits
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
        factors = (tensor for factor in self.factors for tensor in factor)
        return (self.query, self.key, self.value, self.bias, self.mask, self.sinks, *factors)

    @property
    def absorbed(self) -> Operands:
        """The same without factors, which are more numbers of query and key. Not under a softcap: it would cap them."""
        return self._absorbed if self.factors and self.softcap is None else self

    @cached_property
    def _absorbed(self) -> Operands:
        exact = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        (batch, heads, _, _), kv_heads = self.query.shape, self.key.shape[1]
        group = heads // kv_heads
        own = torch.eye(group, dtype=exact, device=self.query.device).repeat(
            kv_heads, 1
        )  # [head, its place in a group]
        query, key = [self.query.to(exact)], [self.key.to(exact).expand(batch, -1, -1, -1)]
        for rows, keys in self.factors:
            rows = rows.to(exact).expand(batch, heads, -1)[..., None] / self.scale
            if keys.shape[1] == 1:
                keys = keys.to(exact).expand(batch, kv_heads, -1)[..., None]
            else:  # heads that share a key have a number of it each
                rows = rows * own[:, None]
                keys = keys.to(exact).expand(batch, -1, -1).unflatten(1, (kv_heads, group)).mT
            query.append(rows)
            key.append(keys)
        both = {"query": torch.cat(query, dim=-1), "key": torch.cat(key, dim=-1), "value": self.value.to(exact)}
        return replace(self, **both, factors=())


class Reduction(NamedTuple):
    """One number (or k) a row or column; reductions asked together are computed in one pass."""

    name: str
    knob: Any = None  # hashable; a set of positions is a `Chosen`


class Chosen:
    """A boolean (or index) tensor as a knob. Compared by identity, so that it is never mistaken for another call's."""

    def __init__(self, where: Tensor) -> None:
        self.where = where
