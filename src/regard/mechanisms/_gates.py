"""What Mega and what follows it have around attention: a reset gate on its output, and one towards what came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gated(nn.Module):
    """Weights of a layer whose queries, keys and gates come from a convolution, and its values from the input."""

    def __init__(self, dim: int, z: int, value: int, residual: bool) -> None:
        super().__init__()
        self.dim, self.z, self.residual = dim, z, residual
        self.norm = nn.LayerNorm(dim) if residual else nn.Identity()
        self.to_value, self.to_output = nn.Linear(dim, value), nn.Linear(value, dim)
        self.to_parts = nn.Linear(dim, 2 * dim + z + value)
        for layer in (self.to_value, self.to_output, self.to_parts):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.gamma, self.beta = nn.Parameter(0.02 * torch.randn(2, z)), nn.Parameter(torch.zeros(2, z))

    def parts(self, moved: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Update gate, query, key, reset gate, and what goes past attention."""
        value = self.to_value.out_features
        update, mixed, given = self.to_parts(moved).split([self.dim, self.z + value, self.dim], -1)
        z, reset = F.silu(mixed).split([self.z, value], -1)
        query, key = (z * self.gamma[i] + self.beta[i] for i in range(2))
        return update.sigmoid(), query, key, reset, given

    def gated(self, before: Tensor, update: Tensor, given: Tensor, mixed: Tensor) -> Tensor:
        moved = update * (F.silu(given + self.to_output(mixed)) - before)
        return before + moved if self.residual else moved


def refuse_gaps(mask: Tensor | None, asked_by: str) -> None:
    """Tokens that are not there stand at the end. mask: [batch, token]"""
    if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            f"{asked_by}: tokens that are not there stand at the end, since averages run on over gaps; got a mask with "
            f"some before or between others: pad on the right"
        )
