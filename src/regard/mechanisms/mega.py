"""A moving average of each channel feeds single-head gated attention, which may then be cut into chunks.

Ma et al., Mega: Moving Average Equipped Gated Attention (arXiv:2209.10655), sections 3.1 to 3.4, with the names and
initial weights of facebookresearch/mega. x is the layer's input, x' its norm:

    moved = SiLU(omega x' + sum over s <= t of sum_n p b g (1 - p a)^(t - s) x'_s / sqrt(order))
    [u, z, r, h] = moved @ W          u = sigmoid(u); z, r = SiLU of theirs; query, key = z * gamma + beta
    output = x + u * (SiLU(h + (attention(query, key, SiLU(x' @ W_v)) * r) @ W_h) - x)

with p and a sigmoids of delta and alpha (the paper's letters are the other way round). Chunks attend to themselves
only; what crosses their borders is the average. Both ways, each token counts in the past and in the future.

Deviations: in place of another model's attention (`mega`), which stands after a norm and before a residual, the layer
gives u * (SiLU(...) - x') and has no norm of its own. Dropout of features in training is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._convolution import convolved
from ._gates import Gated, refuse_gaps
from ._layers import exchanged
from ._mechanism import Cost, pairs, softmax
from ._modules import module

ATTENTIONS, BIASES = ("softmax", "laplace", "relu2"), ("simple", "rotary")


class MovingAverage(nn.Module):
    """A damped exponential moving average of each channel, with its input added, and SiLU. [batch, token, dim]

    order: averages that a channel sums; bidirectional: also of what comes later; truncation: tokens it reaches back.

    >>> MovingAverage(8)(torch.randn(2, 30, 8)).shape
    torch.Size([2, 30, 8])
    """

    def __init__(
        self, dim: int, *, order: int = 16, bidirectional: bool = False, truncation: int | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or order < 1 or (truncation is not None and truncation < 1):
            raise ValueError(f"MovingAverage: takes 1 or more of each; got {dim=}, {order=}, {truncation=}")
        self.bidirectional, self.truncation = bidirectional, truncation
        rows = dim * (1 + bidirectional)
        signs = torch.tensor([(-1.0) ** i for i in range(order)])[:, None]
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(rows, order, 1)) for _ in range(2))
        self.beta = nn.Parameter(0.02 * torch.randn(rows, order, 1) + signs)
        self.gamma, self.omega = nn.Parameter(torch.randn(rows, order)), nn.Parameter(torch.randn(dim))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of each average, what it adds of a token, and what it keeps to the next one. [dim or 2 dim, order]"""
        taken = self.delta.sigmoid()
        added = (taken * self.beta)[..., 0] * self.gamma / math.sqrt(self.gamma.shape[1])
        return added, (1 - taken * self.alpha.sigmoid())[..., 0]

    def kernel(self, n: int) -> Tensor:
        """What a token gives the one `lag` after it; both ways, first of the past. [dim or 2 dim, lag]"""
        n = n if self.truncation is None else min(n, self.truncation)
        added, kept = self.factors()
        powers = torch.exp(torch.arange(n, device=kept.device) * kept.log()[..., None])
        return torch.einsum("cn,cnt->ct", added, powers)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: which tokens there are, boolean [batch, token]; the others add nothing."""
        given = hidden if mask is None else hidden.where(mask[..., None], 0.0)
        past, *future = self.kernel(hidden.shape[1]).chunk(1 + self.bidirectional)
        found = convolved(given, past)
        if future:
            found = found + convolved(given.flip(1), future[0]).flip(1)
        return F.silu(found + hidden * self.omega)

    def step(self, state: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One token [batch, 1, dim] more: the output, and the state [batch, dim, order]."""
        if self.bidirectional or self.truncation is not None:
            raise ValueError("MovingAverage: goes on token by token neither with bidirectional nor with truncation")
        added, kept = self.factors()
        last = hidden[:, 0, :, None]
        state = last.expand(-1, -1, kept.shape[1]) if state is None else state * kept + last
        return F.silu((state * added).sum(-1)[:, None] + hidden * self.omega), state


class State(NamedTuple):
    """What `Mega.step` needs of the tokens before."""

    moved: Tensor  # the moving averages
    key: Tensor  # of the chunk, or of all tokens where there are no chunks; [batch, token, z]
    value: Tensor
    taken: int  # tokens before


@module(
    "causal",
    "full",
    build=lambda dim, causal, tokens: Mega(
        dim, z=dim // 8 * 2, value=dim // 2, order=4, causal=causal, positions=tokens, residual=False
    ),
)
class Mega(Gated):
    """The paper's layer: [batch, token, dim] to the same, its residual included.

    z, value: channels of queries and keys, and of values (2 dim). order, truncation: of the moving average. attention:
    "softmax", "laplace" or "relu2", whose weights do not sum to 1. chunk: tokens that attend to each other; None: all.
    bias: "simple", a number for each distance, or "rotary". positions: the most tokens, or the chunk. residual: without
    it there is no norm and no input added, for a place that has both.

    >>> layer = Mega(32, z=16, causal=True, positions=64)
    >>> layer(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        z: int,
        value: int | None = None,
        order: int = 16,
        truncation: int | None = None,
        attention: str = "softmax",
        chunk: int | None = None,
        causal: bool = False,
        bidirectional: bool | None = None,
        bias: str = "simple",
        positions: int = 1024,
        residual: bool = True,
    ) -> None:
        value, bidirectional = (
            2 * dim if value is None else value,
            not causal if bidirectional is None else bidirectional,
        )
        if (
            attention not in ATTENTIONS
            or bias not in BIASES
            or (causal and bidirectional)
            or (bias == "rotary" and z % 2)
        ):
            raise ValueError(
                f"Mega: attention is one of {ATTENTIONS}, bias one of {BIASES}, rotary of an even z, and a causal "
                f"layer is not bidirectional; got {attention=}, {bias=}, {z=}, {causal=}, {bidirectional=}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"Mega: a chunk holds 1 token or more; got {chunk=}")
        super().__init__(dim, z, value, residual)
        self.attention, self.chunk, self.causal = attention, chunk, causal
        self.positions = positions if chunk is None else chunk
        self.move = MovingAverage(dim, order=order, bidirectional=bidirectional, truncation=truncation)
        self.bias = Distances(self.positions) if bias == "simple" else Rotary(z)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: which tokens there are, boolean [batch, token]; the others stand at the end."""
        return self._mixed(hidden, mask)[0]

    def weights(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Of attention inside each chunk. [batch, chunk, query, key]"""
        return self._mixed(hidden, mask)[1]

    def _mixed(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        refuse_gaps(mask, "Mega")
        n = hidden.shape[1]
        chunk = n if self.chunk is None or n < self.chunk else self.chunk
        self._check(n, chunk)
        normed = self.norm(hidden)
        value = F.silu(self.to_value(normed))
        update, query, key, reset, given = self.parts(self.move(normed, mask=mask))
        query, key, value = (t.unflatten(1, (-1, chunk)) for t in (query, key, value))
        seen = None if mask is None else mask.unflatten(1, (-1, chunk))[:, :, None]
        if self.causal:
            past = torch.ones(chunk, chunk, dtype=torch.bool, device=hidden.device).tril()
            seen = past[None, None] if seen is None else past & seen
        weights = self._weights(query, key, self.bias(chunk), seen)
        output = self.gated(hidden if self.residual else normed, update, given, (weights @ value).flatten(1, 2) * reset)
        return output, weights

    def step(self, state: State | None, hidden: Tensor) -> tuple[Tensor, State]:
        """One token [batch, 1, dim] more: the output, and the state, which a chunk bounds."""
        if not self.causal:
            raise ValueError("Mega: only a causal layer goes on token by token")
        normed = self.norm(hidden)
        moved, average = self.move.step(state.moved if state else None, normed)
        update, query, key, reset, given = self.parts(moved)
        value, taken = F.silu(self.to_value(normed)), state.taken if state else 0
        if state is not None and (self.chunk is None or taken % self.chunk):
            key, value = torch.cat([state.key, key], 1), torch.cat([state.value, value], 1)
        n = key.shape[1]
        if n > self.positions:
            raise ValueError(
                f"Mega: there are {self.positions} positions, and this is token {n}: give it more, or chunks"
            )
        weights = self._weights(query[:, None], key[:, None], self.bias(n)[-1:], None)
        output = self.gated(
            hidden if self.residual else normed, update, given, (weights @ value[:, None])[:, 0] * reset
        )
        return output, State(average, key, value, taken + 1)

    def _weights(self, query: Tensor, key: Tensor, bias: Tensor, seen: Tensor | None) -> Tensor:
        if self.attention == "softmax":
            return softmax(query @ key.mT * self.z**-0.5 + bias, seen)
        count = key.shape[2] if seen is None else seen.sum(-1, keepdim=True).clamp_min(1)
        scores = query @ key.mT / count + bias
        if self.attention == "laplace":
            weights = 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (0.282095 * math.sqrt(2))))
        else:
            weights = F.relu(scores).square()
        return weights if seen is None else weights.where(seen, 0.0)

    def _check(self, n: int, chunk: int) -> None:
        if n % chunk or chunk > self.positions:
            raise ValueError(
                f"Mega: takes whole chunks of {self.chunk} tokens, or fewer tokens than one, and up to "
                f"{self.positions} positions; got {n} tokens: pad them, and give a mask"
            )


class Distances(nn.Module):
    """A bias for each distance. Called with a length: [query, key]"""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(2 * positions - 1))

    def forward(self, n: int) -> Tensor:
        at = torch.arange(n, device=self.table.device)
        return self.table[len(self.table) // 2 + at - at[:, None]]


class Rotary(nn.Module):
    """The product of two learned vectors, turned by their positions. Called with a length: [query, key]"""

    def __init__(self, z: int) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(0.02 * torch.randn(1, z)) for _ in range(2))

    def forward(self, n: int) -> Tensor:
        return self._turned(self.alpha, n) @ self._turned(self.beta, n).mT

    @staticmethod
    def _turned(vector: Tensor, n: int) -> Tensor:
        half = vector.shape[1] // 2
        rate = torch.exp(torch.arange(half, device=vector.device) * -(math.log(10000) / half))
        angle = torch.arange(n, device=vector.device)[:, None] * rate
        first, second = vector[:, :half], vector[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        ).to(vector.dtype)


def mega(
    model: nn.Module,
    *,
    z: int = 64,
    chunk: int | None = None,
    causal: bool | None = None,
    positions: int = 1024,
    projection: str | None = None,
    **knobs: Any,
) -> Callable[[], None]:
    """Put a `Mega` with new weights in place of every attention of a model; gives the function that undoes it.

    causal: as each attention says of itself, unless given. knobs: of `Mega`. projection: name of the output projection,
    where it is none of the usual ones. It has to be trained. Raises ValueError where no attention module is found.

        undo = mega(model, chunk=128)
    """
    knobs |= {"z": z, "chunk": chunk, "positions": positions, "residual": False}

    def made(attention: nn.Module, dim: int) -> nn.Module:
        return Mega(dim, causal=bool(getattr(attention, "is_causal", False)) if causal is None else causal, **knobs)

    return exchanged(model, made, projection, "mega")


convert = mega


def cost(n: int, dim: int, *, z: int = 64, value: int | None = None, chunk: int | None = None, causal: bool = False):
    """Of one layer over `n` tokens: projections, the average by Fourier transforms, and attention."""
    value, width = 2 * dim if value is None else value, min(n, chunk or n)
    projections = 2 * n * dim * (2 * dim + z + 2 * value) + 2 * n * value * dim
    average = 15 * n * math.log2(2 * n) * dim * (1 if causal else 2)
    attention = 2 * (z + value) * pairs(width, width, causal) * n / width
    return Cost(projections + average + attention, n * (8 * dim + 2 * z + 3 * value))
