"""Attention of the tokens of a picture to those that a cheap guess of the map connects them to.

Wei, Duke, Jiang, Aarabi, Taylor and Shkurti, Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient
Vision Transformers (arXiv:2303.13755), section 3, and the authors' code.

Queries and keys are narrowed, and keys mixed over the tokens of the picture, whose number is fixed, into a few; the
softmax of their products, a row of coefficients for each query, weighs as many learned rows of connections, of which
the magnitudes above a threshold count. The largest entries of a row of this score are what the query attends to; the
class token attends to all. The choice has no gradient: the guess is trained to resemble the full map, of a teacher or
its own, while attention is dense and connections keep their sign, or beside sparse attention.

As in the code, not the paper, coefficients are scaled by the root of the number of heads. Pairs are chosen one by one,
which saves operations; here they run as dense attention with a mask, which does not save time. Deviation: the class
token's row is the first one of a model that has it, and with cls=False there is none. Left out: the pruning of tokens;
tokens that a mask hides are treated as its pruned ones are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import distilled, own
from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from ._modules import module
from ._softmax import attend, runs_native
from .memory_efficient import memory_efficient


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    seen = _seen(query, key, knobs.get("seen"), mask)
    return softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen)


def _seen(query: Tensor, key: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if seen is None:
        return mask
    shape = *query.shape[:3], key.shape[2]
    if seen.dtype != torch.bool or seen.ndim != 4 or any(s not in (1, n) for s, n in zip(seen.shape, shape)):
        raise ValueError(
            f"sparsifiner: seen is boolean and broadcasts to [batch, head, query, key] = {list(shape)}; got "
            f"{seen.dtype} {list(seen.shape)}: Connectivity.choose makes it of a score"
        )
    return seen if mask is None else seen & mask


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, seen: Tensor | None = None) -> Cost:
    """seen: of one head. What the guess costs is `Connectivity.cost`."""
    pairs = n_query * n_key if seen is None else float(seen.sum())
    return Cost(4 * dim * pairs, 2 * dim * (n_query + n_key))


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def sparsifiner(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Softmax attention of connected pairs only. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim]. seen: which pairs are connected, boolean,
    broadcasts to [batch, head, query, key], as `Connectivity` makes it; None: all, which is full attention. A query
    without a pair gives zeros. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError for causal attention,
    and where `seen` does not fit.

        >>> x = torch.randn(1, 4, 197, 64)
        >>> sparsifiner(x, x, x, seen=torch.rand(1, 4, 197, 197) < 0.25).shape
        torch.Size([1, 4, 197, 64])
    """
    dense = attend if runs_native(query) else memory_efficient
    return dense(query, key, value, causal=False, mask=_seen(query, key, seen, mask), scale=scale_of(query, scale))


class Connectivity(nn.Module):
    """The guess: a score of each pair, from queries and keys, and the pairs that it chooses.

    dim: of a head; tokens: how many a picture has, with the class token where there is one (cls). keep: share of the
    keys that each query is connected to; above: those of a larger score in its place. tokens_per_basis, channels_per:
    by which tokens and channels are narrowed. top: how many coefficients of each query count; None: those above
    `least`. threshold: magnitudes of connections that count lie above it. shared: keys are mixed by the rows of
    connections.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        *,
        keep: float = 0.25,
        above: float | None = None,
        tokens_per_basis: int = 8,
        channels_per: int = 2,
        top: int | None = None,
        least: float = 0.0,
        threshold: float = 0.0,
        shared: bool = False,
        cls: bool = True,
    ) -> None:
        basis, width = tokens // max(tokens_per_basis, 1), dim // max(channels_per, 1)
        if not 0 < keep <= 1 or min(basis, width, tokens_per_basis, channels_per) < 1 or threshold < 0:
            raise ValueError(
                f"sparsifiner: keep is above 0, up to 1; tokens and channels are narrowed to 1 or more, and threshold "
                f"is 0 or more; got {keep=}, {tokens=}, {tokens_per_basis=}, {dim=}, {channels_per=}, {threshold=}"
            )
        if top is not None and not 1 <= top <= basis:
            raise ValueError(f"sparsifiner: 1 to {basis} coefficients can count; got {top=}")
        super().__init__()
        self.heads, self.tokens, self.keep, self.above, self.cls = heads, tokens, keep, above, cls
        self.top, self.least, self.threshold = top, least, threshold
        self.query, self.key = nn.Linear(dim, width), nn.Linear(dim, width)
        self.mix = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, basis), std=0.02))
        self.back = self.mix if shared else nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, basis), std=0.02))

    def coefficients(self, query: Tensor, key: Tensor, *, mask: Tensor | None = None, raw: bool = False) -> Tensor:
        """What each row of connections counts for each query. [batch, head, query, basis]

        query: [batch, head, token, dim]; key: [batch, kv_head, token, dim]; the class token has no row. raw: all count.
        """
        if query.shape[2] != self.tokens or key.shape[2] != self.tokens:
            raise ValueError(
                f"sparsifiner: was made for {self.tokens} tokens, which it mixes; got {query.shape[2]} queries and "
                f"{key.shape[2]} keys: make another with tokens={key.shape[2]}"
            )
        narrow, keys = self.query(query[:, :, int(self.cls) :]), by_head(self.key(key), query.shape[1])
        if mask is not None:
            narrow, keys = narrow * mask.mT[:, :, int(self.cls) :], keys * mask.mT
        found = (narrow @ (keys.mT @ self.mix) * self.heads**-0.5).softmax(-1)
        if raw:
            return found
        if self.top is None:
            return found.where(found > self.least, 0.0) if self.least > 0 else found
        best = found.topk(self.top, dim=-1).indices
        return torch.zeros_like(found).scatter(-1, best, found.gather(-1, best))

    def forward(self, query: Tensor, key: Tensor, *, mask: Tensor | None = None, raw: bool = False) -> Tensor:
        """Score of each pair, without the class token's row. [batch, head, query, key]

        raw: as while it learns from dense attention, with signs and all coefficients.
        """
        basis = self.back.mT
        if not raw:
            size = basis.abs()
            basis = size.where(size > self.threshold, 0.0)
        return self.coefficients(query, key, mask=mask, raw=raw) @ basis

    @torch.no_grad()
    def choose(self, score: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The pairs of the largest scores, and all of the class token. [batch, head, token, token], boolean"""
        score = score if mask is None else score.masked_fill(~mask, float("-inf"))
        if self.above is None:
            best = score.topk(math.ceil(self.keep * self.tokens), dim=-1).indices
            seen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        else:
            seen = score > self.above
        seen = F.pad(seen, (0, 0, int(self.cls), 0), value=True)
        return seen if mask is None else seen & mask

    @property
    def cost(self) -> float:
        """Operations of the guess, of one head of a picture, connections of all magnitudes counted."""
        (n, basis), (width, dim) = self.mix.shape, self.query.weight.shape
        rows = n - int(self.cls)
        return 2 * ((rows + n) * dim * width + (rows + n) * basis * width + rows * (self.top or basis) * n)


def connectivity_loss(score: Tensor, weights: Tensor) -> Tensor:
    """Squared distance of scores to weights, summed over all pairs, heads and pictures, as the authors have it. []

    weights: [batch, head, token, token]; where there is one row more than scores, the class token's, it is left out.
    The authors weigh it by 0.01 with a teacher's map while attention is dense, and by 0.05 with the own one afterwards.
    """
    return F.mse_loss(score, weights[:, :, weights.shape[2] - score.shape[2] :], reduction="sum")


@module(
    "full",
    takes="heads",
    build=lambda head_dim, heads, tokens: Sparsifiner(head_dim, heads, tokens, cls=False),
    loss=lambda layer: 0.05 * layer.loss / max(layer.pictures, 1),
)
class Sparsifiner(nn.Module):
    """A guess and attention to the pairs that it chooses; takes query, key and value.

    of_guess: as `Connectivity` takes it. While `learning`, attention is full. `seen` are the pairs, and, in training or
    while learning, `loss` the distance of the guess to the full map, of the last forward pass over so many `pictures`.
    """

    def __init__(self, dim: int, heads: int, tokens: int, **of_guess: Any) -> None:
        super().__init__()
        self.guess = Connectivity(dim, heads, tokens, **of_guess)
        self.learning, self.pictures = False, 0
        self.seen: Tensor | None = None
        self.loss: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, **how: Any) -> Tensor:
        score = self.guess(query, key, mask=mask, raw=self.learning)
        self.pictures, self.loss = len(query), None
        if self.training or self.learning:
            # a teacher's map stays as it is; beside sparse attention both learn, as the authors have it
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.learning):
                right = _weights(query, key, causal=False, mask=mask, scale=how.get("scale"))
            self.loss = connectivity_loss(score, right)
        self.seen = None if self.learning else self.guess.choose(score.detach(), mask=mask)
        return sparsifiner(query, key, value, mask=mask, seen=self.seen, **how)


def convert(model: nn.Module, *, tokens: int, **of_guess: Any) -> Callable[[], None]:
    """Give every attention of a vision transformer a guess, with new weights to train; gives what undoes it.

    tokens: how many a picture has, the class token among them; a model without one takes cls=False. of_guess: as
    `Connectivity` takes it. Raises ValueError where the model is none of transformers'.

        undo = convert(model, tokens=197)
        distil(model, batches)
        undo()
    """

    def made(dim: int, heads: int, kv_heads: int) -> nn.Module:
        return Sparsifiner(dim, heads, tokens, **of_guess)

    return own(model, sparsifiner, made)


def distil(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, rate: float = 1e-2) -> list[float]:
    """Train the guesses of a converted model on its own full maps; the loss of each step, of a picture and layer.

    batches: inputs of the model. Nothing else of it is trained.
    """
    modules = [m for m in model.modules() if isinstance(m, Sparsifiner)]
    if not modules:
        raise ValueError("sparsifiner.distil: the model has no guesses; call convert(model, tokens=...)")
    guesses = (p for m in modules for p in m.guess.parameters())
    return distilled(model, modules, guesses, batches, rate, lambda m: m.loss / m.pictures)
