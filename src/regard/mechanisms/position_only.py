"""Attention whose weights are learned numbers of positions alone, without queries, keys or softmax.

Rende and Viteritti, Are queries and keys always relevant? A case study on Transformer wave functions
(arXiv:2405.18874), section II; layer and wave function as in NetKet's tutorial by the same authors. Of each head,
with alpha learned,

    output = W [heads: sum over j of alpha_ij (V x_j)]

where alpha is a number for each pair of tokens, or on a periodic grid one for each shift, alpha_(j - i), so that the
layer commutes with shifts. Weights have any sign and sum to anything. The number of tokens is fixed. Deviation: a
causal attention's future weights are left out, with no other change; the paper has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layers import exchanged
from ._mechanism import Cost, pairs


class PositionOnly(nn.Module):
    """The layer: [batch, token, dim] to the same.

    tokens: how many there are, always; grid: their rows and columns, of a periodic grid, whose shifts share a weight.

    >>> PositionOnly(32, heads=4, tokens=16, grid=(4, 4))(torch.randn(2, 16, 32)).shape
    torch.Size([2, 16, 32])
    """

    def __init__(
        self, dim: int, *, heads: int, tokens: int, grid: Sequence[int] | None = None, causal: bool = False
    ) -> None:
        super().__init__()
        if dim % heads or (grid is not None and (math.prod(grid) != tokens or causal)):
            raise ValueError(
                f"position_only: heads share channels evenly, and a grid holds the tokens and is not causal; got "
                f"{dim=}, {heads=}, {tokens=}, {grid=}, {causal=}"
            )
        self.heads, self.tokens, self.causal = heads, tokens, causal
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.alpha = nn.Parameter(torch.empty(heads, tokens, *([] if grid else [tokens])))
        nn.init.xavier_uniform_(self.alpha)
        self.register_buffer("shifts", None if grid is None else shifts(grid), persistent=False)

    def weights(self) -> Tensor:
        """[head, query, key]"""
        if self.shifts is not None:
            return self.alpha[:, self.shifts]
        return self.alpha.tril() if self.causal else self.alpha

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[1] != self.tokens:
            raise ValueError(
                f"position_only: has weights for {self.tokens} tokens, [batch, {self.tokens}, dim]; got "
                f"{list(hidden.shape)}"
            )
        value = self.value(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.output((self.weights() @ value).transpose(1, 2).flatten(2))


def shifts(grid: Sequence[int]) -> Tensor:
    """Which shift leads from a query to a key of a periodic grid, rows first. [query, key]"""
    sides = torch.tensor(list(grid))
    at = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid))
    apart = (at - at[:, None]) % sides
    found = torch.zeros(apart.shape[:2], dtype=torch.long)
    for axis, side in enumerate(grid):
        found = found * side + apart[..., axis]
    return found


class WaveFunction(nn.Module):
    """log psi of spins, +1 or -1, [batch, row, ..., column], a complex number each: [batch].

    mixing: makes the layer that mixes patches, [batch, token, dim] to the same; patch: sides of the patches that are
    tokens. Without `mixing` all layers are `PositionOnly` on the periodic grid, and log psi does not change as spins
    are shifted by whole patches.

    >>> WaveFunction((4, 4), (2, 2), dim=12, heads=3, layers=2)(torch.ones(5, 4, 4)).dtype
    torch.complex64
    """

    def __init__(
        self,
        sites: Sequence[int],
        patch: Sequence[int],
        *,
        dim: int = 60,
        heads: int = 10,
        layers: int = 4,
        mixing: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if len(sites) != len(patch) or any(n % p for n, p in zip(sites, patch)):
            raise ValueError(f"position_only: patches fill the lattice; got {sites=}, {patch=}")
        self.sites, self.patch = tuple(sites), tuple(patch)
        grid = [n // p for n, p in zip(sites, patch)]
        made = mixing or (lambda: PositionOnly(dim, heads=heads, tokens=math.prod(grid), grid=grid))
        self.embed = nn.Linear(math.prod(patch), dim)
        self.blocks = nn.ModuleList(Block(dim, made()) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.ends = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))

    def forward(self, spins: Tensor) -> Tensor:
        if spins.shape[1:] != self.sites:
            raise ValueError(f"position_only: takes spins [batch, {self.sites}]; got {list(spins.shape)}")
        for axis, size in enumerate(self.patch):
            spins = spins.unflatten(1 + 2 * axis, (-1, size))
        order = [*range(1, spins.ndim, 2), *range(2, spins.ndim, 2)]
        tokens = spins.permute(0, *order).flatten(1, len(self.patch)).flatten(2)
        hidden = self.embed(tokens.to(self.embed.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden.sum(1))
        real, imaginary = (norm(end(hidden)) for norm, end in zip(self.norms, self.ends))
        return log_cosh(torch.complex(real, imaginary)).sum(-1)


class Block(nn.Module):
    """A layer of the wave function: norms before, mixing, and two linear layers."""

    def __init__(self, dim: int, mixing: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.mixing, self.up, self.down = mixing, nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixing(self.norms[0](hidden))
        return hidden + self.down(F.gelu(self.up(self.norms[1](hidden)), approximate="tanh"))


def log_cosh(z: Tensor) -> Tensor:
    """Of complex numbers, however large."""
    z = torch.where(z.real < 0, -z, z)
    return z + torch.log1p(torch.exp(-2 * z)) - math.log(2)


def position_only(
    model: nn.Module, *, tokens: int, heads: int | None = None, projection: str | None = None
) -> Callable[[], None]:
    """Put `PositionOnly` with new weights in place of every attention of a model; gives the function that undoes it.

    tokens: how many the model has, always; heads: as many as each attention has, unless given. It has to be trained.
    projection: name of the output projection, where it is none of the usual ones. Raises ValueError where no attention
    module is found, or one does not say its heads.

        undo = position_only(model, tokens=197)
    """

    def made(attention: nn.Module, dim: int) -> nn.Module:
        width = getattr(attention, "head_dim", None)
        if heads is None and width is None:
            raise ValueError(f"position_only: {type(attention).__name__} does not say its head_dim; give heads=...")
        causal = bool(getattr(attention, "is_causal", False))
        return PositionOnly(dim, heads=heads or dim // int(width or 1), tokens=tokens, causal=causal)

    return exchanged(model, made, projection, "position_only")


def cost(n: int, dim: int, *, causal: bool = False) -> Cost:
    """Of one head over `n` tokens: half of what softmax attention takes."""
    return Cost(2 * dim * pairs(n, n, causal), 2 * dim * n + n * n)
