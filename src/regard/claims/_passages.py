"""Prompts of several passages of random tokens, a part of one of which is to be told again."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PASSAGES, SIZE, CUE, TOLD = 10, 20, 4, 8


class Retold(NamedTuple):
    """Tokens [batch, token], and which of them are the passage that counts and which each tell the next token again."""

    ids: Tensor
    relevant: Tensor
    answer: Tensor


def retold(model: Any, bos: int, *, batch: int, seed: int) -> Retold:
    """Ten passages of 20 tokens, then four tokens of one of them again, and the eight that follow them."""
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(seed))
    passages = draw(2, model.config.vocab_size, (batch, PASSAGES, SIZE))
    which, start = draw(PASSAGES, (batch,)), draw(SIZE - CUE - TOLD + 1, (batch,))
    again = passages[torch.arange(batch), which].gather(1, start[:, None] + torch.arange(CUE + TOLD))
    ids = torch.cat([torch.full((batch, 1), bos), passages.flatten(1), again], dim=1)
    place = torch.arange(ids.shape[1])[None]
    relevant = ((place - 1) // SIZE == which[:, None]) & (place > 0) & (place <= PASSAGES * SIZE)
    answer = (place >= ids.shape[1] - TOLD - 1) & (place < ids.shape[1] - 1)
    return Retold(ids, relevant, answer.expand(batch, -1))


@torch.no_grad()
def told(model: nn.Module, prompt: Retold) -> Tensor:
    """Share of a prompt's tokens that are told rightly, each after the right ones before it, 0 to 1. [batch]"""
    right = model(prompt.ids).logits[:, :-1].argmax(-1) == prompt.ids[:, 1:]
    return (right & prompt.answer[:, :-1]).sum(1) / prompt.answer.sum(1)
