"""A task of several claims: name the symbol after a marker, somewhere in a sequence.

Chance is one in as many symbols as there are. Nothing but the place next to the marker says which symbol it is, so that
layers without any sense of place cannot learn it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS, TOKENS, WIDTH = 12, 64, 32
MARKER = SYMBOLS


class Model(nn.Module):
    """Two layers that take and give [batch, token, dim], with residuals. pooled: or the last token answers."""

    def __init__(self, made: Callable[[], nn.Module], pooled: bool) -> None:
        super().__init__()
        self.embed, self.pooled = nn.Embedding(SYMBOLS + 1, WIDTH), pooled
        self.mixing = nn.ModuleList(made() for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.norm, self.answer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for mixing, mlp in zip(self.mixing, self.mlps):
            hidden = mixing(hidden)
            hidden = hidden + mlp(hidden)
        hidden = self.norm(hidden)
        return self.answer(hidden.amax(1) if self.pooled else hidden[:, -1])


def sequences(count: int, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [count, TOKENS], a marker at these places or anywhere, and the symbols after it."""
    tokens = torch.randint(0, SYMBOLS, (count, TOKENS))
    at = torch.randint(0, TOKENS - 1, (count,)) if at is None else at
    rows = torch.arange(count)
    tokens[rows, at] = MARKER
    return tokens, tokens[rows, at + 1]


def trained(made: Callable[[], nn.Module], *, pooled: bool, steps: int, seed: int, batch: int = 32) -> Model:
    torch.manual_seed(seed)
    model = Model(made, pooled)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        tokens, symbol = sequences(batch)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), symbol).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, at: Tensor, seed: int) -> float:
    """Share of new sequences with the marker at one of these places whose symbol is named."""
    torch.manual_seed(seed + 10_000)
    tokens, symbol = sequences(1000, at[torch.randint(0, len(at), (1000,))])
    return float((model(tokens).argmax(-1) == symbol).float().mean())
