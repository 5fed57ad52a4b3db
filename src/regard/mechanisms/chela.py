"""Short and long convolutions that become one, before linear attention taken in tiles.

Liu et al., Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences
(arXiv:2406.08128), section 3. x is the layer's input, x' its norm, gates are those of Mega:

    Z = SiLU((K_long + K_short) * x' + omega x')    query, key = SiLU(Z @ W) * gamma + beta    value = SiLU(x' @ W_v)
    output = x + u (SiLU(h + (norm(query (key^T value)) r) @ W_h) - x)

No code was published, and the text was not at hand when this was written: that the convolutions are summed (which is
what lets them become one), four taps of the short one, the long one made of pieces of doubling length with half the
weight each, of 16 numbers, at unit energy, the norm in place of a denominator, and the gates, are our reading. It has
no step: the long convolution needs all tokens. In place of another model's attention (`chela`), which stands after a
norm and before a residual, the layer has neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._convolution import convolved
from ._gates import Gated, refuse_gaps
from ._layers import exchanged
from ._mechanism import Cost
from ._modules import taking
from ._scan import Product, State, scan, tokens

_PIECE = 16  # numbers that each piece of a long kernel is made of


class ShortLongConvolution(nn.Module):
    """Two convolutions of each channel, its input, and SiLU. [batch, token, dim]

    short: taps of the short one; length: tokens that the long one reaches, the most there may be. Not causal, there are
    kernels for what comes later, too, and a token counts in both.

    >>> ShortLongConvolution(8, length=64)(torch.randn(2, 50, 8)).shape
    torch.Size([2, 50, 8])
    """

    def __init__(self, dim: int, *, short: int = 4, length: int = 1024, causal: bool = True) -> None:
        super().__init__()
        if not 1 <= short <= length:
            raise ValueError(
                f"chela: the short convolution has 1 tap or more, and fits the long one; got {short=}, {length=}"
            )
        self.length, self.causal = length, causal
        rows, pieces = dim * (1 if causal else 2), 1 + max(0, math.ceil(math.log2(length / _PIECE)))
        self.short = nn.Parameter(torch.randn(rows, short) / short**0.5)
        self.long = nn.Parameter(torch.randn(pieces, rows, _PIECE))
        self.omega, self.merged = nn.Parameter(torch.randn(dim)), None
        self.register_buffer("energy", torch.ones(rows, 1))
        with torch.no_grad():
            self.energy = self.reach().norm(dim=1, keepdim=True)

    def reach(self) -> Tensor:
        """The long kernel. [dim or 2 dim, lag]"""
        assert self.long is not None, "merged already"
        parts = []
        for i, piece in enumerate(self.long):
            size = _PIECE * 2 ** max(0, i - 1)
            parts.append(0.5**i * F.interpolate(piece[None], size, mode="linear", align_corners=False)[0])
        return torch.cat(parts, 1)[:, : self.length] / self.energy

    def kernel(self) -> Tensor:
        """Both in one. [dim or 2 dim, lag]"""
        if self.merged is not None:
            return self.merged
        assert self.short is not None
        return self.reach() + F.pad(self.short, (0, self.length - self.short.shape[1]))

    def merge(self) -> ShortLongConvolution:
        """Keep the sum of the kernels in their place, for use: the same outputs, from one convolution."""
        if self.merged is None:
            merged = nn.Parameter(self.kernel().detach())
            self.short, self.long, self.merged = None, None, merged  # type: ignore[assignment]
        return self

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: which tokens there are, boolean [batch, token]; the others add nothing."""
        n = hidden.shape[1]
        if n > self.length:
            raise ValueError(f"chela: the convolution is of {self.length} tokens, and there are {n}: give it a length")
        given = hidden if mask is None else hidden.where(mask[..., None], 0.0)
        past, *future = self.kernel()[:, :n].chunk(1 if self.causal else 2)
        found = convolved(given, past)
        if future:
            found = found + convolved(given.flip(1), future[0]).flip(1)
        return F.silu(found + hidden * self.omega)


def linear(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, chunk: int = 64) -> Tensor:
    """Attention without softmax or denominator: query_i . key_j for weights. [batch, head, token, dim]"""
    product = Product(None, chunk)
    nothing = query.new_zeros(*query.shape[:2], query.shape[3], value.shape[3])

    def past(state: State, *strip: Tensor) -> tuple[Tensor, State]:
        output, held = product(state[0], *strip)
        return output, (held,)

    if causal:
        return scan(past, (nothing,), (query, key, value), strip=tokens(value, chunk))[0]  # type: ignore[return-value]
    return query @ (key.mT @ value)


@taking("hidden")
class Chela(Gated):
    """The paper's layer: [batch, token, dim] to the same, its residual included.

    z, value: channels of queries and keys, and of values (2 dim). short, length: of the convolutions. chunk: tokens of
    a tile of causal attention; any gives the same. residual: without it there is no norm and no input added.

    >>> Chela(32, z=16, causal=True, length=64)(torch.randn(2, 50, 32)).shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        z: int,
        value: int | None = None,
        short: int = 4,
        length: int = 1024,
        chunk: int = 64,
        causal: bool = False,
        residual: bool = True,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chela: a tile holds 1 token or more; got {chunk=}")
        value = 2 * dim if value is None else value
        super().__init__(dim, z, value, residual)
        nn.init.ones_(self.gamma)  # there is no softmax for scores that start near 0
        self.chunk, self.causal = chunk, causal
        self.move = ShortLongConvolution(dim, short=short, length=length, causal=causal)
        self.after = nn.RMSNorm(value, eps=1e-5)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """mask: which tokens there are, boolean [batch, token]; the others stand at the end."""
        refuse_gaps(mask, "chela")
        normed = self.norm(hidden)
        value = F.silu(self.to_value(normed))
        value = value if mask is None else value.where(mask[..., None], 0.0)
        update, query, key, reset, given = self.parts(self.move(normed, mask=mask))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        query, key, value = (t[:, None].to(exact) for t in (query, key, value))
        mixed = linear(query, key, value, causal=self.causal, chunk=self.chunk)[:, 0]
        # Sums over all tokens are brought to size before they lose precision.
        mixed = (
            F.rms_norm(mixed, mixed.shape[-1:], self.after.weight.to(exact), self.after.eps).to(hidden.dtype) * reset
        )
        return self.gated(hidden if self.residual else normed, update, given, mixed)


def chela(
    model: nn.Module,
    *,
    z: int = 64,
    length: int = 1024,
    causal: bool | None = None,
    projection: str | None = None,
    **knobs: Any,
) -> Callable[[], None]:
    """Put a `Chela` with new weights in place of every attention of a model; gives the function that undoes it.

    causal: as each attention says of itself, unless given. length: the most tokens there may be; knobs: of `Chela`.
    projection: name of the output projection, where it is none of the usual ones. It has to be trained. Raises
    ValueError where no attention module is found.

        undo = chela(model, length=4096)
    """
    knobs |= {"z": z, "length": length, "residual": False}

    def made(attention: nn.Module, dim: int) -> nn.Module:
        return Chela(dim, causal=bool(getattr(attention, "is_causal", False)) if causal is None else causal, **knobs)

    return exchanged(model, made, projection, "chela")


convert = chela


def cost(n: int, dim: int, *, z: int = 64, value: int | None = None, chunk: int = 64, causal: bool = True) -> Cost:
    """Of one layer over `n` tokens: projections, the convolution by Fourier transforms, and attention in tiles."""
    value = 2 * dim if value is None else value
    projections = 2 * n * dim * (2 * dim + z + 2 * value) + 2 * n * value * dim
    moved = 15 * n * math.log2(2 * n) * dim * (1 if causal else 2)
    inside = 2 * (z + value) * n * (min(chunk, n) + 1) / 2 if causal else 0
    return Cost(projections + moved + inside + 4 * n * z * value, n * (8 * dim + 2 * z + 3 * value) + z * value)
