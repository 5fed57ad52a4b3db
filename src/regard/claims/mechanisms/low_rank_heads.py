"""Mehta et al. (arXiv:1912.00835): heads of low rank do what self-attention does over recurrent states, at less weight.

Sentences that tell how somebody feels, read by a recurrent network of 24 channels in each direction, are pooled in
three ways and classified. The control is the mean, which has no weights to learn. Two sizes of the training set were
tried, on seed 1: at both self-attention was ahead by more than the claim allows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import zoo
from ...catalog import Finding, Premise
from ...mechanisms.low_rank_heads import LowRankHeads
from .._measure import mean
from .._sentences import Batch, batches, encoded

WAYS = "low rank", "self-attention", "mean"
DIM, HEADS, TRAINED, TESTED, STEPS, RUNS = 48, 8, 1000, 1000, 300, 2
FEELINGS = 4


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Accuracy of the three poolers, their weights, and how much of the low-rank one's weight is on the reason."""
    expected = (
        f"low rank at most 1 point below self-attention with a fifth of its attention parameters or fewer, and above "
        f"the mean, both by two standard errors over sentences and {RUNS} trainings"
    )
    _, tokenizer = zoo.load("namer")
    tested = encoded(tokenizer, TESTED, seed=1000 + seed, held=True)
    right: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    sizes, shares = dict.fromkeys(WAYS, 0), []
    for run in range(RUNS):
        at = RUNS * seed + run
        trained = encoded(tokenizer, TRAINED, seed=at, held=False)
        for way in WAYS:
            torch.manual_seed(at)
            model = _Model(way, len(tokenizer))
            _train(model, trained)
            with torch.no_grad():
                right[way].append((model(tested).argmax(-1) == tested["labels"]).double())
            sizes[way] = sum(p.numel() for p in model.pool.parameters())
            if way == "low rank":
                shares.append(_on_reason(model, tested))
    rates = {way: float(torch.stack(of).mean()) for way, of in right.items()}
    # sentences are the same for all ways, and trainings too: differences are of pairs, averaged over trainings
    beside = mean((torch.stack(right["low rank"]) - torch.stack(right["self-attention"])).mean(0))
    over = mean((torch.stack(right["low rank"]) - torch.stack(right["mean"])).mean(0))
    few = sizes["low rank"] <= 0.2 * sizes["self-attention"]
    holds = beside.above(-0.01) and over.above() and few
    premises = [
        Premise("the mean leaves something to do", "below 97%", f"{rates['mean']:.1%}", rates["mean"] < 0.97),
        Premise("the task is learned", "80% or more", f"{max(rates.values()):.1%}", max(rates.values()) >= 0.8),
    ]
    measured = (
        f"{', '.join(f'{way} {rates[way]:.1%} with {sizes[way]:,} parameters' for way in WAYS)}; low rank less "
        f"self-attention {beside:+.3f}, less the mean {over:+.3f}; on the reason {mean(shares):.2f} times its even "
        f"share (no more than {torch.e**2:.1f} times is possible)"
    )
    return Finding(holds, measured, expected, seed, premises=premises, draw=partial(_draw, rates=rates, sizes=sizes))


def _draw(figure: Any, *, rates: dict[str, float], sizes: dict[str, int]) -> None:
    axes = figure.subplots()
    for way in WAYS:
        axes.plot(sizes[way], 100 * rates[way], "o", label=way)
    axes.set_xscale("symlog", linthresh=100)
    axes.set(xlabel="parameters of the pooler", ylabel="right, %")
    axes.legend()


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.output = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.parts(hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        return _mean(self.output(mixed.transpose(1, 2).flatten(2)), mask)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class _Model(nn.Module):
    def __init__(self, way: str, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, DIM)
        self.gru = nn.GRU(DIM, DIM // 2, batch_first=True, bidirectional=True)
        pools = {"low rank": lambda: LowRankHeads(DIM, HEADS), "self-attention": _SelfAttention, "mean": nn.Identity}
        self.pool = pools[way]()
        self.output = nn.Linear(DIM * (HEADS if way == "low rank" else 1), FEELINGS)

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.gru(self.words(batch["input_ids"]))[0], batch["attention_mask"].bool()

    def forward(self, batch: Batch) -> Tensor:
        hidden, mask = self.hidden(batch)
        if isinstance(self.pool, nn.Identity):
            return self.output(_mean(hidden, mask))
        pooled = self.pool(hidden, mask)
        return self.output(pooled[0].flatten(1) if isinstance(pooled, tuple) else pooled)


def _train(model: _Model, trained: Batch) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch in batches(trained, 32, STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), batch["labels"]).backward()
        optimizer.step()


@torch.no_grad()
def _on_reason(model: _Model, tested: Batch) -> float:
    """Weight on the words that are the reason, over what even weights would give them; of all heads, the mean."""
    hidden, mask = model.hidden(tested)
    weights, reason = model.pool(hidden, mask)[1].mean(1), tested["reason"].bool() & mask
    return float((weights * reason).sum(1).mean() / (reason.sum(1) / mask.sum(1)).mean())
