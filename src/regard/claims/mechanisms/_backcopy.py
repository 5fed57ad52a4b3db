"""A task that makes sinks, and a model of one layer to learn it.

Tokens follow a Markov chain, but after a trigger the token before it comes again (Guo et al., Active-Dormant Attention
Heads, arXiv:2410.13835). A head that looks back after triggers has nothing to look for elsewhere: its sink is the
weight on the first token of queries that follow no trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, TRIGGERS = 33, 3  # token 0 begins every sequence


class Model(nn.Module):
    """One layer around `attention`, which is made where its weights are drawn in turn."""

    def __init__(self, attention: type[nn.Module], length: int, dim: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, dim), nn.Embedding(length, dim)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.attention = attention()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.output = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.token(tokens) + self.place.weight
        hidden = hidden + self.attention(self.norms[0](hidden))
        return self.output(self.norms[2](hidden + self.mlp(self.norms[1](hidden))))


def chain(seed: int) -> Tensor:
    """Probability of each token after each: mostly a few. Nothing leads to token 0."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(VOCABULARY, VOCABULARY, generator=generator) ** 8
    likely[:, 0] = 0
    return likely / likely.sum(-1, keepdim=True)


def sequences(count: int, length: int, likely: Tensor, generator: torch.Generator) -> Tensor:
    tokens = torch.zeros(count, length + 1, dtype=torch.long)
    for i in range(length):
        drawn = torch.multinomial(likely[tokens[:, i]], 1, generator=generator)[:, 0]
        # tokens 1 to TRIGGERS are triggers; before one that stands second there is only the beginning
        back = (tokens[:, i] > 0) & (tokens[:, i] <= TRIGGERS) & (i > 1)
        tokens[:, i + 1] = torch.where(back, tokens[:, max(i - 1, 0)], drawn)
    return tokens


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, rate: float, batches: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step, tokens in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
