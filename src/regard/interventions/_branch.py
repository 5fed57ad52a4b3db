"""A second run of a model beside its own generation, for methods that contrast or merge next-token logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.generation import own_positions
from ._method import Method


class Branch:
    """What a model would say next after the tokens that it is generating, if it ran under other conditions.

    It goes along with one `generate` of the model on `inputs`, a step at a time, with a cache and positions of its own,
    and starts anew with each. What it costs is one more run of the model.

    under: opens the conditions, for the time of each step. prompt: what is read instead of `inputs`, in as many rows:
    with another picture, another text, or fewer tokens, cut or masked. What is generated follows on it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        under: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        prompt: Mapping[str, Any] | None = None,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
            raise ValueError(
                f"{type(model).__name__} is no decoder-only model that generates, so it has no such branch"
            )
        if "input_ids" not in inputs:
            raise ValueError(
                f"a branch follows token ids, so inputs must hold input_ids; they hold {', '.join(inputs)}"
            )
        self.model, self.inputs, self.under = model, dict(inputs), under
        self.prompt = self.inputs if prompt is None else dict(prompt)
        if len(self.prompt["input_ids"]) != len(self.inputs["input_ids"]):
            raise ValueError(
                f"a branch reads a prompt for each row: {len(self.prompt['input_ids'])} for "
                f"{len(self.inputs['input_ids'])} rows"
            )
        self.ids: Tensor | None = None  # of the last step
        self.cache: Any = None
        self.positions: dict[nn.Module, Any] = {}

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Next-token logits after `input_ids` [batch, token]: those of `inputs`, or one more than at the last call.

        [batch, vocabulary]
        """
        n = self.inputs["input_ids"].shape[1]
        if torch.equal(input_ids, self.inputs["input_ids"]):
            given = self.prompt
            self.positions.clear()
        elif self.ids is not None and torch.equal(input_ids[:, :-1], self.ids):
            made = input_ids[:, n:]
            given = {
                "input_ids": torch.cat([self.prompt["input_ids"], made], dim=1),
                "past_key_values": self.cache,
            }
            if (mask := self.prompt.get("attention_mask")) is not None:
                given["attention_mask"] = torch.cat([mask, mask.new_ones(made.shape)], dim=1)
        else:
            raise ValueError(
                f"the tokens being generated {list(input_ids.shape)} do not go on from the inputs "
                f"{list(self.inputs['input_ids'].shape)} that this method was made with: make it anew for other "
                f"inputs, and generate with num_beams=1 and one sequence for each row of the inputs"
            )
        with self.under(), own_positions(self.model, self.positions):
            found = self.model.generate(  # type: ignore[operator]
                **given,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        self.ids, self.cache = input_ids, found.past_key_values
        return found.logits[0]


def plausible(scores: Tensor, beta: float) -> Tensor:
    """Which tokens are at least `beta` times as likely as the likeliest. [batch, vocabulary] boolean"""
    return scores >= scores.amax(-1, keepdim=True) + torch.tensor(beta).log().to(scores)


class Contrasted(Method):
    """A logits processor: (1 + alpha) times the model's logits, less alpha times those of a branch.

    Tokens that the model alone finds less likely than `beta` times the likeliest are left out.
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0, "beta": 0.0}

    alpha: float
    beta: float
    branch: Branch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        both = self.joined(scores, self.branch.logits(input_ids).to(scores))
        return both.masked_fill(~plausible(scores, self.beta), -torch.inf)

    def joined(self, own: Tensor, other: Tensor) -> Tensor:
        return (1 + self.alpha) * own - self.alpha * other
