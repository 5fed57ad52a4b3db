"""The zoo's reader, trained on with prose, for claims about models that are converted.

The text is the first file of the reader's recipe, in the folder that REGARD_DATA names; models are judged by its part
that the reader never saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import zoo
from ...zoo.recipes import reader
from .._data import folder

PHASE, HELD_OUT = reader.Phase(1, 128, 16, 0.0, 0.0), reader.Phase(1, 128, 256, 0.0, 0.0)
RATE = 1e-3


def prose(steps: int, *, seed: int) -> tuple[Any, Tensor, list[Tensor]]:
    """The reader, texts that it never saw, and as many batches of others."""
    model, tokenizer = zoo.load("reader")
    known, unknown = reader.split(reader.texts(folder("text_books").parent)[:1], tokenizer)
    of_tokenizer = len(tokenizer), seed
    held_out = reader.batch(unknown, HELD_OUT, *of_tokenizer, 0, tokenizer.bos_token_id)
    return (
        model,
        held_out,
        [reader.batch(known, PHASE, *of_tokenizer, i + 1, tokenizer.bos_token_id) for i in range(steps)],
    )


@torch.no_grad()
def losses_of(model: Any, texts: Tensor) -> Tensor:
    """Nats a token. [text]"""
    found = []
    for part in texts.split(64):
        logits = model(part).logits[:, :-1]
        found.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def train(model: Any, batches: list[Tensor], extra: Callable[[], Tensor] | None = None) -> None:
    """extra: what is added to the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    for step, texts in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 10, (len(batches) - step) / len(batches) * 2)
        loss = model(texts, labels=texts).loss
        optimizer.zero_grad()
        (loss if extra is None else loss + extra()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
