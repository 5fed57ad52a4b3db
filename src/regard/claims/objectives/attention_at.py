"""Kitada and Iyatomi (arXiv:2009.12064): training on perturbed attention makes it steadier and closer to gradients.

The paper's own architecture: word embeddings, a bidirectional LSTM, one additive attention over words, a linear layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import loading
from ...catalog import Finding
from ...data.sentences import FEELINGS
from ...objectives import collect
from ...objectives.attention_at import attention_at, perturbation
from ...seam import intervene
from .._sentences import Batch, batches, encoded

SCALES = "small", "large"
STEPS = {"small": 500, "large": 5000}
SIZE, RATE, DIM, EPSILON = 64, 2e-3, 64, 5.0
LENGTHS = (0.0, 1.0, 2.0, EPSILON, 2 * EPSILON)


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """The same model trained three ways, then its attention compared with gradients and perturbed."""
    expected = (
        f"with Attention AT, and with iAT, of length {EPSILON:g}: attention and the length of the loss's gradient by "
        "word correlate more (Pearson, a sentence each, the mean) than with plain training; accuracy is at most a "
        "point lower; and the worst perturbation of that length costs at most half the points that it costs after "
        "plain training (cannot tell where plain training names fewer than 90%)"
    )
    _, tokenizer = loading.load("namer")
    pool = encoded(tokenizer, 100 * SIZE, seed=seed, held=False)
    held = encoded(tokenizer, 1000, seed=seed, held=True)
    models = {way: _train(way, pool, len(tokenizer), STEPS[scale], seed) for way in ("plain", "AT", "iAT")}
    alike = {way: _correlation(model, held) for way, model in models.items()}
    right = {way: [_accuracy(model, held, length) for length in LENGTHS] for way, model in models.items()}
    lost = {way: shares[0] - shares[LENGTHS.index(EPSILON)] for way, shares in right.items()}

    def better(way: str) -> bool:
        steady = lost[way] <= lost["plain"] / 2
        return alike[way] > alike["plain"] and right[way][0] >= right["plain"][0] - 0.01 and steady

    holds = None if right["plain"][0] < 0.9 else better("AT") and better("iAT")
    parts = [
        f"{way}: correlation {alike[way]:.2f}, accuracy {right[way][0]:.1%}, perturbed {right[way][0] - lost[way]:.1%}"
        for way in models
    ]

    def draw(figure: Any) -> None:
        left, side = figure.subplots(1, 2)
        left.bar(list(alike), list(alike.values()))
        left.set(ylabel="mean Pearson correlation", title="Attention and gradients, by word")
        for way, shares in right.items():
            side.plot(LENGTHS, shares, "o-", label=way)
        side.axhline(1 / len(FEELINGS), color="grey", linestyle=":")
        side.set(ylim=(0, 1.02), xlabel="length of the worst perturbation of scores", ylabel="accuracy")
        side.set_title("1,000 sentences held out")
        side.legend()

    return Finding(holds, "; ".join(parts), expected, seed, draw=draw)


class _AdditiveAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(DIM, DIM // 2), nn.Tanh(), nn.Linear(DIM // 2, 1, bias=False))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(hidden).mT.masked_fill(~mask[:, None], float("-inf"))  # [batch, 1, token]
        return scores.softmax(-1) @ hidden


class _Model(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, DIM)
        self.encoder = nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True)
        self.attention, self.output = _AdditiveAttention(), nn.Linear(DIM, len(FEELINGS))

    def forward(self, batch: Batch) -> Tensor:
        return self.read(self.embedding(batch["input_ids"]), batch["attention_mask"].bool())

    def read(self, words: Tensor, mask: Tensor) -> Tensor:
        hidden, _ = self.encoder(words)
        return self.output(self.attention(hidden, mask))[:, 0]

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"], reduction=reduction)


def _train(way: str, pool: Batch, words: int, steps: int, seed: int) -> _Model:
    torch.manual_seed(seed)
    model = _Model(words)
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=1e-5, amsgrad=True)
    for batch in batches(pool, SIZE, steps):
        run = partial(model.loss, batch)
        loss = run() if way == "plain" else attention_at(model, run, epsilon=EPSILON, interpretable=way == "iAT")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _accuracy(model: _Model, held: Batch, length: float) -> float:
    """Share of feelings named, where each sentence's attention is moved to raise its own loss."""
    worst = perturbation(model, lambda: model.loss(held, "sum"), epsilon=length)
    with torch.no_grad(), intervene(model, worst):
        return float((model(held).argmax(-1) == held["labels"]).float().mean())


def _correlation(model: _Model, held: Batch) -> float:
    """Mean over sentences of the correlation between a word's attention and the length of the loss's gradient by it."""
    mask = held["attention_mask"].bool()
    words = model.embedding(held["input_ids"]).detach().requires_grad_()
    with collect(model, lambda call: call.weights.dense()) as seen:
        loss = F.cross_entropy(model.read(words, mask), held["labels"], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, words)
    pairs = torch.stack([seen[0].value[:, 0, 0].detach(), gradient.norm(dim=-1)])  # [2, sentence, token]
    found = [torch.corrcoef(pairs[:, i, mask[i]])[0, 1] for i in range(len(mask))]
    return float(torch.stack(found).nanmean())
