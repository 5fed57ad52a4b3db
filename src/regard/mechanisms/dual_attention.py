"""Heads that fetch how tokens relate, beside heads that fetch what they are.

Altabaa and Lafferty, Disentangling and Integrating Relational and Sensory Information in Transformer Architectures
(arXiv:2405.16727), sections 2.1 to 2.3. Sensory heads are ordinary attention. A relational head looks by softmax of its
queries and keys, but what it fetches of token j is a vector of relations between looker and looked-at, inner products
of other projections that all relational heads share, and a symbol, which says which token it was and nothing of it:

    out_i = sum_j a_ij (W_r r_ij + W_s s_j),  r_ij^l = <W_q^l x_i, W_k^l x_j> / sqrt(relation dim)

Symbols are looked up in a learned library by attention, go by position, go by the distance of two tokens, or are given.
As in the authors' code, both kinds have an output projection of their own, and nothing mixes them afterwards.

Relations are linear in what is looked at, so that sum_j a_ij r_ij^l = <W_q^l x_i, sum_j a_ij W_k^l x_j>: one attention
whose values are relation keys and symbols, without a tensor a pair. `regard.record` finds a site in each kind of head
and in the look-up of symbols. With an activation of relations, or symbols by distance, there is no such form: then all
pairs are laid out, and recording is refused. Rotary positions and tied projections of the two kinds are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._maps import shared_out
from ._mechanism import Cost, by_head, pairs, softmax, visible
from ._modules import module

SYMBOLS = ("symbolic", "positional", "relative", "given")


class SensoryAttention(nn.Module):
    """Ordinary attention of these heads: [batch, token, dim] to [batch, token, heads * head dim]."""

    def __init__(self, dim: int, heads: int, width: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(dim, heads * width, bias=False)
        self.key, self.value = (nn.Linear(dim, kv_heads * width, bias=False) for _ in range(2))
        self.output = nn.Linear(heads * width, heads * width, bias=False)

    def weights(self, hidden: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Where each head looks, all pairs laid out. [batch, head, query, key]"""
        return _weights(self, hidden, causal, mask)

    def forward(self, hidden: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        query, key = _looking(self, hidden)
        value = by_head(_by_head(self.value(hidden), self.kv_heads), self.num_heads)
        seen = visible(query, key, causal=causal, mask=mask)
        return self.output(F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2))


class RelationalAttention(nn.Module):
    """Attention that fetches relations and symbols: [batch, token, dim] to [batch, token, heads * head dim].

    relations: how many there are, shared by all heads; symmetric: queries and keys of relations are one projection;
    activation: of relations, none as in the paper.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        kv_heads: int,
        relations: int | None = None,
        *,
        symmetric: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.activation = heads, kv_heads, activation
        self.relations = heads if relations is None else relations
        shared_out("RelationalAttention", heads * width, self.relations, "relations")
        self.query, self.relation_query = (nn.Linear(dim, heads * width, bias=False) for _ in range(2))
        self.key, self.symbol = (nn.Linear(dim, kv_heads * width, bias=False) for _ in range(2))
        self.relation_key = self.relation_query if symmetric else nn.Linear(dim, heads * width, bias=False)
        self.mix = nn.Parameter(torch.empty(heads, width, self.relations))
        nn.init.kaiming_uniform_(self.mix, a=5**0.5)
        self.output = nn.Linear(heads * width, heads * width, bias=False)

    def related(self, hidden: Tensor) -> Tensor:
        """The relations of all pairs. [batch, query, key, relation]"""
        found = (self._relation_query(hidden) @ self._relation_key(hidden).mT).movedim(1, -1)
        return found if self.activation is None else self.activation(found)

    def weights(self, hidden: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Where each head looks, all pairs laid out. [batch, head, query, key]"""
        return _weights(self, hidden, causal, mask)

    def forward(self, hidden: Tensor, symbols: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        query, key = _looking(self, hidden)
        seen = visible(query, key, causal=causal, mask=mask)
        # [batch, head, (query,) key, dim]
        symbol = by_head(self.symbol(symbols).unflatten(-1, (self.kv_heads, -1)).movedim(-2, 1), self.num_heads)
        if self.activation is None and symbols.ndim == 3:
            beside = self._relation_key(hidden).transpose(1, 2).flatten(2)[:, None].expand(-1, self.num_heads, -1, -1)
            value = torch.cat([beside, symbol.expand(*beside.shape[:-1], -1)], -1)
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            looked_at, told = found.tensor_split([beside.shape[-1]], -1)
            looked_at = looked_at.unflatten(-1, (self.relations, -1))  # [batch, head, query, relation, dim]
            fetched = (self._relation_query(hidden).transpose(1, 2)[:, None] * looked_at).sum(-1)
        else:
            weights = self.weights(hidden, causal=causal, mask=mask)
            fetched = torch.einsum("bhqk,bqkr->bhqr", weights, self.related(hidden))
            told = weights @ symbol if symbols.ndim == 3 else (weights.unsqueeze(-2) @ symbol).squeeze(-2)
        output = torch.einsum("hdr,bhqr->bhqd", self.mix, fetched) + told
        return self.output(output.transpose(1, 2).flatten(2))

    def _relation_query(self, hidden: Tensor) -> Tensor:
        query = _by_head(self.relation_query(hidden), self.relations)
        return query * query.shape[-1] ** -0.5

    def _relation_key(self, hidden: Tensor) -> Tensor:
        return _by_head(self.relation_key(hidden), self.relations)


class SymbolicAttention(nn.Module):
    """The symbol of each token, looked up in a learned library: [batch, token, dim] to the same."""

    is_cross_attention = True

    def __init__(self, dim: int, heads: int, symbols: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query = nn.Linear(dim, dim)
        self.templates, self.library = (nn.Parameter(torch.randn(symbols, dim)) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        query = _by_head(self.query(hidden), self.num_heads)
        key, value = (
            _by_head(of[None], self.num_heads).expand(len(hidden), -1, -1, -1) for of in (self.templates, self.library)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@module("causal", "full", build=lambda dim, heads: DualAttention(dim, heads // 2, heads // 2), mask="pairs")
class DualAttention(nn.Module):
    """Self-attention of sensory and relational heads, beside each other: [batch, token, dim] to the same.

    sensory, relational: how many heads of each kind; relations: how many there are, as many as relational heads unless
    given; symbols: "symbolic", "positional", "relative", or "given" with each call; library: symbols to look up;
    length: positions or distances that have symbols. kv_heads: key heads of both kinds together. ValueError where
    channels, heads and relations do not fit.

    >>> DualAttention(64, 4, 4)(torch.randn(2, 50, 64), causal=True).shape
    torch.Size([2, 50, 64])
    """

    def __init__(
        self,
        dim: int,
        sensory: int,
        relational: int,
        *,
        relations: int | None = None,
        symbols: str = "symbolic",
        symmetric: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        kv_heads: tuple[int, int] | None = None,
        library: int = 128,
        library_heads: int = 4,
        length: int = 512,
    ) -> None:
        super().__init__()
        if symbols not in SYMBOLS:
            raise ValueError(f"DualAttention: symbols is one of {SYMBOLS}; got {symbols!r}")
        if min(sensory, relational) < 0:
            raise ValueError(f"DualAttention: there are 0 or more heads of each kind; got {sensory=}, {relational=}")
        width = shared_out("DualAttention", dim, sensory + relational, "sensory + relational")
        self.dim, self.symbols, self.length = dim, symbols, length
        keys = kv_heads or (sensory, relational)
        for heads, kv in zip((sensory, relational), keys, strict=True):
            if heads and (kv < 1 or heads % kv):
                raise ValueError(f"DualAttention: {heads} heads do not divide evenly by kv_heads={kv}")
        self.sensory = SensoryAttention(dim, sensory, width, keys[0]) if sensory else None
        self.relational, self.retrieve = None, None
        if relational:
            self.relational = RelationalAttention(
                dim, relational, width, keys[1], relations, symmetric=symmetric, activation=activation
            )
            if symbols == "symbolic":
                shared_out("DualAttention", dim, library_heads, "library_heads")
                self.retrieve = SymbolicAttention(dim, library_heads, library)
            elif symbols != "given":
                self.retrieve = nn.Embedding(length if symbols == "positional" else 2 * length + 1, dim)

    def symbols_of(self, hidden: Tensor) -> Tensor:
        """[batch, token, dim], or where they go by distance [1, query, key, dim]."""
        n = hidden.shape[1]
        if self.retrieve is None:
            raise ValueError("DualAttention: symbols are given with each call: forward(hidden, symbols=...)")
        if self.symbols == "symbolic":
            return self.retrieve(hidden)
        at = torch.arange(n, device=hidden.device)
        if self.symbols == "relative":
            return self.retrieve((at - at[:, None]).clamp(-self.length, self.length) + self.length)[None]
        if n > self.length:
            raise ValueError(f"DualAttention: {n} tokens, but symbols for length={self.length} positions")
        return self.retrieve(at).expand(len(hidden), -1, -1)

    def forward(
        self, hidden: Tensor, *, causal: bool = False, mask: Tensor | None = None, symbols: Tensor | None = None
    ) -> Tensor:
        """hidden [batch, token, dim]; mask: which pairs are visible, boolean, broadcasts to [batch, 1, query, key].

        symbols: [batch, token, dim], or of pairs [batch, query, key, dim], instead of those of the module.
        """
        found = [] if self.sensory is None else [self.sensory(hidden, causal=causal, mask=mask)]
        if self.relational is not None:
            given = self.symbols_of(hidden) if symbols is None else self._checked(symbols, hidden)
            found.append(self.relational(hidden, given, causal=causal, mask=mask))
        return torch.cat(found, -1)

    def _checked(self, symbols: Tensor, hidden: Tensor) -> Tensor:
        batch, n, dim = hidden.shape
        if list(symbols.shape[1:]) not in ([n, dim], [n, n, dim]) or len(symbols) not in (1, batch):
            raise ValueError(
                f"DualAttention: symbols are [batch, token, dim] or, of pairs, [batch, query, key, dim], for hidden "
                f"states {list(hidden.shape)}; got {list(symbols.shape)}"
            )
        return symbols


def _looking(attention: SensoryAttention | RelationalAttention, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys. [batch, head, token, dim]"""
    query = _by_head(attention.query(hidden), attention.num_heads)
    return query, by_head(_by_head(attention.key(hidden), attention.kv_heads), attention.num_heads)


def _weights(attention: Any, hidden: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    query, key = _looking(attention, hidden)
    seen = visible(query, key, causal=causal, mask=mask)
    return softmax(query @ key.mT * query.shape[-1] ** -0.5, seen)


def _by_head(parts: Tensor, heads: int) -> Tensor:
    return parts.unflatten(-1, (heads, -1)).transpose(1, 2)


def cost(n: int, dim: int, *, sensory: int, relational: int, causal: bool = False) -> Cost:
    """Of one sequence, forward, projections apart; relations as many as relational heads."""
    width, seen = dim // (sensory + relational), pairs(n, n, causal)
    relations = 2 * relational * width + 2 * relational * relational
    operations = seen * (4 * sensory * width + 4 * relational * width + relations)
    return Cost(operations, n * (4 * sensory * width + 5 * relational * width))
