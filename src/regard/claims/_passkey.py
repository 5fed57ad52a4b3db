"""A task that several claims learn: name the one digit that stands in a sequence of noise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, NOISE, DIGITS = 64, 16, 10

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> output, all [batch, head, token, dim]


class Layer(nn.Module):
    def __init__(self, attention: Attention, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.parts, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.parts(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        hidden = hidden + self.output(self.attention(*parts).transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norms[1](hidden))


def trained(
    attention: Attention,
    *,
    layers: int,
    before: int,
    steps: int,
    seed: int,
    anywhere: float = 0.0,
    dim: int = 32,
    heads: int = 2,
    symbols: int = 0,
    prompts: Callable[[int, int], tuple[Tensor, Tensor]] | None = None,
) -> nn.Sequential:
    """A model with this attention, trained to name a digit that stands before position `before`, at the last token.

    attention: where it is a module, each layer has its own copy of it. symbols: how many more there are.
    anywhere: share of the steps, the first ones, in which the digit stands before any position but the last.
    """
    torch.manual_seed(seed)
    body = [Layer(copy.deepcopy(attention), dim, heads) for _ in range(layers)]
    model = nn.Sequential(nn.Embedding(NOISE + DIGITS + symbols, dim), *body, nn.LayerNorm(dim), nn.Linear(dim, DIGITS))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        tokens, digit = (prompts or noise)(64, TOKENS - 1 if step < anywhere * steps else before)
        loss = F.cross_entropy(model(tokens)[:, -1], digit)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def judged(model: nn.Module, *, before: int, seed: int) -> tuple[Tensor, Tensor]:
    """Loss of each of a thousand new sequences, nats, and whether its digit is named: the same ones for each model."""
    torch.manual_seed(seed + 10_000)
    tokens, digit = noise(1000, before)
    answers = model(tokens)[:, -1]
    return F.cross_entropy(answers, digit, reduction="none"), (answers.argmax(-1) == digit).float()


def noise(count: int, before: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Sequences [count, TOKENS] of noise with one digit each, and the digits."""
    tokens = torch.randint(0, NOISE, (count, TOKENS), generator=generator)
    digit = torch.randint(0, DIGITS, (count,), generator=generator)
    tokens[torch.arange(count), torch.randint(0, before, (count,), generator=generator)] = NOISE + digit
    return tokens, digit
