"""Prompts with something taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._picture import chat


def cut(inputs: Mapping[str, Any], gone: Tensor) -> dict[str, Any]:
    """The prompts without some of their tokens, padded on the left; as wide as before.

    gone: [batch, token] boolean. What is not of the shape of the ids stays as it is.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    kept = mask.bool() & ~gone
    order = kept.long().argsort(dim=1, stable=True)  # what is kept stands last, in its order
    there = kept.gather(1, order)
    found = dict(inputs) | {"attention_mask": there.to(mask)}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "attention_mask":
            fill = value[kept][-1:] if name == "input_ids" else 0  # the end of a prompt is no image token
            found[name] = torch.where(there, value.gather(1, order), fill)
    return found


def narrowed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the columns that are padding in every row."""
    ids, n = inputs["input_ids"], int(inputs["attention_mask"].sum(1).max())
    same = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    return {name: value[:, -n:] if name in same else value for name, value in inputs.items()}


def instruction(inputs: Mapping[str, Any], image: Tensor, processor: Any, method: str, tail: int | None) -> Tensor:
    """Which tokens of each prompt say what is asked: those between the picture [batch, token] and the prompt's tail.

    tail: how many tokens follow on the instruction; None asks the processor's chat template. [batch, token] boolean

    ValueError, which names the method, where that is not known, or there is none.
    """
    ids, lead = inputs["input_ids"], 0
    if tail is None:
        if processor is None:
            raise ValueError(f"{method}: where the instruction ends is not known; give the model's processor, or tail=")
        lead, end = _around(processor, int(ids[image][0]))
        tail = len(end)
        if tail and bool((ids[:, -tail:] != ids.new_tensor(end)).any()):
            raise ValueError(
                f"{method}: a prompt does not end as the processor's chat template does, so that its instruction is "
                f"not known; give tail=, the number of tokens that follow on it"
            )
    at = torch.arange(ids.shape[1], device=ids.device)
    last = (image * at).amax(1, keepdim=True) + lead
    found = (at > last) & (at < ids.shape[1] - tail)
    if not bool(found.any(1).all()):
        raise ValueError(f"{method}: a row has no instruction between its picture and the last {tail} tokens")
    return found


def _around(processor: Any, image: int) -> tuple[int, list[int]]:
    """What the processor's chat template puts around what is asked: how many tokens between it and the picture, whose
    id is given, and the ids behind it.
    """
    one, other = (
        processor.tokenizer(chat(processor, text), add_special_tokens=False)["input_ids"] for text in ("", "?")
    )
    n = next((n for n, (a, b) in enumerate(zip(reversed(one), reversed(other))) if a != b), 0)
    after = one[len(one) - one[::-1].index(image) :] if image in one else one[len(one) - n :]
    return max(0, len(after) - n), one[len(one) - n :]
