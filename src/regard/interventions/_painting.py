"""What methods for models that paint have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import sites
from ..adapters import diffusers


def attention(model: nn.Module, method: str) -> dict[str, tuple[bool, int]]:
    """Of each attention module of a model that denoises, whether it is cross attention, and its heads.

    ValueError, which names the method, where the model is none of diffusers'.
    """
    found = {s.name: (s.cross, diffusers.heads(m)) for m, s in sites.find(model).items() if diffusers.attends(m)}
    if not found:
        raise ValueError(
            f"{method} is for models of diffusers that paint, such as PixArt or a U-Net; {type(model).__name__} has no "
            f"attention of theirs"
        )
    return found


def prompts(inputs: Mapping[str, Any], method: str) -> list[str]:
    """What a pipeline is told to paint; ValueError, which names the method, where it is told nothing."""
    given: Any = inputs.get("prompt")
    said: list[str] = [given] if isinstance(given, str) else list(given or ())
    if not said:
        raise ValueError(f"{method}: inputs are what the pipeline is called with, and have no prompt")
    return said


def painted(pipeline: Any, inputs: Mapping[str, Any], *, seed: int = 0, **options: Any) -> NDArray[np.float32]:
    """A picture for each prompt, 0 to 1, all from the same noise. [picture, row, column, 3]"""
    said = prompts(inputs, "painting")
    pipeline.set_progress_bar_config(disable=True)
    chance = [torch.Generator().manual_seed(seed) for _ in said]
    return pipeline(**{**inputs, "prompt": said}, generator=chance, output_type="np", **options).images


def after_steps(things: Iterable[Any]) -> dict[str, Any]:
    """What a pipeline is to be called with, so that those which act between the steps of painting do, in order."""
    act = [thing.on_step_end for thing in things if hasattr(thing, "on_step_end")]

    def after(pipe: Any, step: int, when: Any, kept: dict[str, Any]) -> dict[str, Any]:
        for one in act:
            kept = one(pipe, step, when, kept)
        return kept

    return {"callback_on_step_end": after} if act else {}
