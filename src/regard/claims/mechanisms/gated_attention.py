"""Qiu et al. (arXiv:2505.06708): gated heads need no sink at the first token, and stand larger learning rates.

The task is one that makes sinks in one layer (Guo et al., Active-Dormant Attention Heads, arXiv:2410.13835): tokens
follow a Markov chain, but after a trigger the token before it comes again. A head that looks back after triggers has
nothing to look for elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...catalog import Finding
from ...mechanisms.gated_attention import gated_attention
from ...mechanisms.memory_efficient import memory_efficient

SCALES = "small", "large"
VOCABULARY, TRIGGERS, LENGTH, DIM, HEADS = 33, 3, 48, 64, 2  # token 0 begins every sequence
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
STEPS = {"small": 300, "large": 3000}


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The same model with and without gates, trained at five learning rates."""
    expected = (
        "trained at the lowest learning rate, mean weight on the first token at most half of that without gates, which "
        "is 0.2 or more (otherwise this scale cannot tell); the largest rate that ends within 0.1 nats of a model's "
        "best loss is larger with gates than without (cannot tell where it is the same)"
    )
    chain, generator = _chain(seed), torch.Generator().manual_seed(seed)
    batches = [_sequences(32, chain, generator) for _ in range(STEPS[scale])]
    held_out = _sequences(256, chain, generator)
    runs = {gated: [_train(gated, rate, batches, held_out, seed) for rate in RATES] for gated in (False, True)}
    sinks = {gated: found[0][1] for gated, found in runs.items()}
    losses = {gated: [loss for loss, _ in found] for gated, found in runs.items()}
    stood = {g: max(r for r, loss in zip(RATES, of, strict=True) if loss <= min(of) + 0.1) for g, of in losses.items()}
    sink = sinks[True] <= sinks[False] / 2 if sinks[False] >= 0.2 else None
    larger = None if stood[True] == stood[False] else stood[True] > stood[False]
    holds = False if False in (sink, larger) else None if None in (sink, larger) else True
    names = {False: "without gates", True: "with gates"}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.bar(list(names.values()), [sinks[gated] for gated in names])
        left.set(ylim=(0, 1), ylabel="mean weight on the first token", title=f"Trained at a rate of {RATES[0]:g}")
        for gated, name in names.items():
            right.semilogx(RATES, losses[gated], "o-", label=name)
        right.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        right.minorticks_off()
        right.set(xlabel="learning rate", ylabel="loss at the end, nats")
        right.legend()

    measured = (
        f"weight on the first token {sinks[False]:.2f} without gates, {sinks[True]:.2f} with; largest rate stood "
        f"{stood[False]:g} without, {stood[True]:g} with; losses {_list(losses[False])} without, "
        f"{_list(losses[True])} with"
    )
    return Finding(holds, measured, expected, seed, draw=draw)


def _list(numbers: list[float]) -> str:
    return "/".join(f"{n:.2f}" for n in numbers)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.o_proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        self.query, self.key, value = self.parts(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(self.query, self.key, value, is_causal=True)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def weights(self) -> Tensor:
        """Those of the last forward pass. [batch, head, query, key]"""
        return memory_efficient.spec.weights(self.query, self.key, causal=True, mask=None, scale=None)  # type: ignore[attr-defined]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(3))
        self.attention = _Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.output = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.token(tokens) + self.place.weight
        hidden = hidden + self.attention(self.norms[0](hidden))
        return self.output(self.norms[2](hidden + self.mlp(self.norms[1](hidden))))


def _chain(seed: int) -> Tensor:
    """Probability of each token after each: mostly a few. Nothing leads to token 0."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(VOCABULARY, VOCABULARY, generator=generator) ** 8
    likely[:, 0] = 0
    return likely / likely.sum(-1, keepdim=True)


def _sequences(count: int, chain: Tensor, generator: torch.Generator) -> Tensor:
    tokens = torch.zeros(count, LENGTH + 1, dtype=torch.long)
    for i in range(LENGTH):
        drawn = torch.multinomial(chain[tokens[:, i]], 1, generator=generator)[:, 0]
        # tokens 1 to TRIGGERS are triggers; before one that stands second there is only the beginning
        back = (tokens[:, i] > 0) & (tokens[:, i] <= TRIGGERS) & (i > 1)
        tokens[:, i + 1] = torch.where(back, tokens[:, max(i - 1, 0)], drawn)
    return tokens


def _train(gated: bool, rate: float, batches: list[Tensor], held_out: Tensor, seed: int) -> tuple[float, float]:
    """Loss at the end, nats a token, and the mean weight on the first token of queries from the ninth on."""
    torch.manual_seed(seed)
    model = _Model()
    if gated:
        gated_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step, tokens in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        optimizer.step()
    with torch.no_grad():
        loss = _loss(model, held_out)
    attention = next(m for m in model.modules() if isinstance(m, _Attention))
    return float(loss), float(attention.weights()[:, :, 8:, 0].mean())


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
