"""Prompts as tensors of a language model, and how well it answers them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .prompt import Encoded, Prompt, encode


class Asked(NamedTuple):
    """Prompts as tensors, padded on the left. answers, distractors: [batch, vocabulary], true for those tokens.

    positions: of the last token of each telling word that all prompts have, by name [batch].
    """

    inputs: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    answers: Tensor
    distractors: Tensor
    positions: Mapping[str, Tensor] = {}

    def log_probabilities(self, model: nn.Module) -> Tensor:
        """Of what follows each prompt. [batch, vocabulary]"""
        return self._known(model(**self.inputs).logits[:, -1].float().log_softmax(-1))

    def _known(self, logits: Tensor) -> Tensor:
        """Those of tokens that the tokenizer has: a model may have more, to fill up its matrix."""
        return logits[..., : self.answers.shape[1]]

    def losses(self, model: nn.Module) -> Tensor:
        """Less the log probability of all answers together, nats. [batch]"""
        return -self.log_probabilities(model).where(self.answers, -torch.inf).logsumexp(-1)

    def difference(self, logits: Tensor) -> Tensor:
        """Mean logit of the answers less that of the distractors. [batch]"""
        last = self._known(logits[:, -1].float())
        means = ((last * mark).sum(-1) / mark.sum(-1) for mark in (self.answers, self.distractors))
        return next(means) - next(means)

    @torch.no_grad()
    def right(self, model: nn.Module) -> float:
        """Share of prompts whose answers beat all distractors together, 0 to 1."""
        found = self.log_probabilities(model).exp()
        return float(((found * self.answers).sum(-1) > (found * self.distractors).sum(-1)).float().mean())


def ask(prompts: Sequence[Prompt], tokenizer: Any) -> Asked:
    """Prompts in a tokenizer's tokens. Raises ValueError as `encode` does."""
    return stacked([encode(prompt, tokenizer) for prompt in prompts], tokenizer)


def stacked(encoded: Sequence[Encoded], tokenizer: Any) -> Asked:
    """Encoded prompts, padded on the left to one length."""
    if not encoded:
        raise ValueError("there are no prompts")
    if tokenizer.pad_token is None:
        tokenizer = _Padding(tokenizer)
    inputs, corrupted = (
        dict(tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt"))
        for ids in ([one.ids for one in encoded], [one.corrupted for one in encoded])
    )
    marks = torch.zeros(2, len(encoded), len(tokenizer), dtype=torch.bool)
    for row, one in enumerate(encoded):
        marks[0, row, one.answers] = marks[1, row, one.distractors] = True
    longest = inputs["input_ids"].shape[1]
    names = [name for name in encoded[0].positions if all(name in one.positions for one in encoded)]
    positions = {
        name: torch.tensor([longest - len(one.ids) + one.positions[name][-1] for one in encoded]) for name in names
    }
    return Asked(inputs, corrupted, marks[0], marks[1], positions)


class _Padding:
    """A tokenizer without a token for padding: what stands there is masked, so any will do."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.tokenizer)

    def pad(self, given: Mapping[str, Iterable[Sequence[int]]], **_: Any) -> dict[str, Tensor]:
        rows = [list(ids) for ids in given["input_ids"]]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]),
        }
