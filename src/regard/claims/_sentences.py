"""Sentences of `regard.data.sentences` as batches, for claims that train on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.sentences import FEELINGS
from ..zoo.recipes import namer

Batch = dict[str, Tensor]


def encoded(tokenizer: Any, n: int, *, seed: int, held: bool) -> Batch:
    """`n` sentences: ids, mask, label, and which tokens are the reason. [sentence, token]

    held: those that `namer` was not trained on, one in ten by their text; otherwise the rest.
    """
    batch = namer.encoded(tokenizer, list(islice(namer.drawn(seed, start=0, held=held), n)))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "reason")} | {"labels": batch["label"]}


def batches(pool: Batch, size: int, steps: int) -> Iterator[Batch]:
    """Random batches, each as long as its longest sentence."""
    for _ in range(steps):
        drawn = torch.randint(len(pool["labels"]), (size,))
        longest = int(pool["attention_mask"][drawn].sum(1).max())
        yield {name: rows[drawn] if rows.ndim == 1 else rows[drawn, :longest] for name, rows in pool.items()}


class AdditiveAttention(nn.Module):
    """Weights over words from one query, and the mean of their states by these."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim // 2), nn.Tanh(), nn.Linear(dim // 2, 1, bias=False))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(hidden).mT.masked_fill(~mask[:, None], float("-inf"))  # [batch, 1, token]
        return scores.softmax(-1) @ hidden


class Namer(nn.Module):
    """Word embeddings, a bidirectional LSTM, one additive attention over words, a linear layer that names a feeling."""

    def __init__(self, words: int, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, dim)
        self.encoder = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.attention, self.output = AdditiveAttention(dim), nn.Linear(dim, len(FEELINGS))

    def forward(self, batch: Batch) -> Tensor:
        return self.read(self.embedding(batch["input_ids"]), batch["attention_mask"].bool())

    def read(self, words: Tensor, mask: Tensor) -> Tensor:
        hidden, _ = self.encoder(words)
        return self.output(self.attention(hidden, mask))[:, 0]

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"], reduction=reduction)
