"""Changes that a person points at: these heads, these tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .. import sites
from ..call import Call, Site
from ..kernels import Factor
from ._method import STACK, known, log_factor


class scale_heads:
    """Multiply what heads give, before the layer's output projection: 0 mutes a head, 2 doubles it.

    factors: by layer and head. stack: in which they are. ValueError where the model has no such layer or head, or
    where every factor is 1.

    >>> import regard
    >>> from regard.interventions import scale_heads
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("The king spoke to the queen", return_tensors="pt")
    >>> with regard.intervene(model, scale_heads({(3, 5): 0.0})):
    ...     ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    """

    def __init__(self, factors: Mapping[tuple[int, int], float], *, stack: str = STACK) -> None:
        if not factors or all(factor == 1 for factor in factors.values()):
            raise ValueError(
                f"scale_heads: factors={dict(factors)} change nothing; name heads, and a factor that is not 1"
            )
        self.factors, self.stack = dict(factors), stack

    def begin(self, model: nn.Module) -> None:
        _there(model, "scale_heads", self.stack, {layer for layer, _ in self.factors})

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack != self.stack:
            return output
        mine = {head: factor for (layer, head), factor in self.factors.items() if layer == call.site.layer}
        if not mine:
            return output
        known(call, mine, "scale_heads")
        factors = torch.ones(output.shape[1], dtype=output.dtype, device=output.device)
        factors[list(mine)] = torch.tensor(list(mine.values()), dtype=output.dtype, device=output.device)
        return output * factors[:, None, None]


class scale_attention:
    """Multiply the weights of some queries on some keys; each row sums to one again. 0 cuts what flows between.

    keys, queries: positions in the text, from 0; None for queries means all. layers, heads: where; None for all. A
    query that sees no other key keeps its weights. ValueError where the model has no such stack or layer, where
    `factor` is negative or 1, or where no key is named.
    """

    def __init__(
        self,
        keys: Collection[int],
        factor: float = 0.0,
        *,
        queries: Collection[int] | None = None,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        stack: str = STACK,
    ) -> None:
        if not len(keys) or (queries is not None and not len(queries)):
            raise ValueError("scale_attention: name the keys, and queries or None for all")
        if factor < 0 or factor == 1:
            raise ValueError(f"scale_attention: factor={factor:g}; 0 cuts, more than 1 raises, 1 would change nothing")
        self.keys, self.factor, self.queries, self.stack = sorted(keys), factor, queries, stack
        self.layers, self.heads = layers, heads

    def begin(self, model: nn.Module) -> None:
        _there(model, "scale_attention", self.stack, set(self.layers or ()))

    def inputs(self, call: Call) -> Call:
        if not self._here(call.site):
            return call
        if call.positions is not None:
            raise ValueError(f"scale_attention: tokens have left before {call.site}, and positions do not hold there")
        like = call.query
        n_query, n_key = like.shape[2], call.key.shape[2]
        rows = _marks(self.queries, call.query_start, n_query, like)
        keys = _marks(self.keys, call.key_start, n_key, like)
        if not rows.any() or not keys.any():
            return call
        factor = log_factor(torch.tensor(self.factor)).to(like.device)
        heads = torch.ones(like.shape[1], device=like.device)
        if self.heads is not None:
            known(call, self.heads, "scale_attention")
            heads = torch.zeros_like(heads).index_fill(0, torch.tensor(list(self.heads), device=like.device), 1.0)
        return call.scaled(Factor((heads[:, None] * rows)[None], (factor * keys)[None, None]))

    def _here(self, site: Site) -> bool:
        return site.stack == self.stack and (self.layers is None or site.layer in self.layers)


def _marks(positions: Collection[int] | None, start: int, n: int, like: Tensor) -> Tensor:
    """1 at those of `n` positions from `start` that are named, 0 elsewhere."""
    if positions is None:
        return torch.ones(n, device=like.device)
    here = [at - start for at in positions if 0 <= at - start < n]
    marks = torch.zeros(n, device=like.device)
    marks[here] = 1.0
    return marks


def _there(model: nn.Module, method: str, stack: str, layers: Collection[int]) -> None:
    """ValueError, which names the method, where the model lacks the stack or one of these layers."""
    found: dict[str, set[int]] = {}
    for site in sites.find(model).values():
        found.setdefault(site.stack, set()).add(site.layer)
    if stack not in found:
        raise ValueError(f"{method}: {type(model).__name__} has no stack {stack!r}; it has {', '.join(found)}")
    if missing := sorted(set(layers) - found[stack]):
        raise ValueError(f"{method}: {stack} has layers 0 to {max(found[stack])}, and no layer {missing[0]}")
