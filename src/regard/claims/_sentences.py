"""Sentences of `regard.data.sentences` as batches, for claims that train on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

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
