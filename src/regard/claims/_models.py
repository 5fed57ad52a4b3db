"""Where claims find real pretrained models, and what these give."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..loading import Loaded, load

HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "dinov2-small": "facebook/dinov2-small"}


def sentences(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a sentence transformer makes of each text: the mean over tokens, of length 1. [text, dim]"""
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1), dim=-1)


def pretrained(name: str) -> Loaded:
    """A model of `HUB` and its processor: from the folder that REGARD_MODELS names, if it holds it, else by hub id."""
    root = os.environ.get("REGARD_MODELS")
    here = root is not None and (Path(root) / name).is_dir()
    try:
        return load(Path(root) / name if here else HUB[name], dtype=torch.float32)
    except ValueError as error:
        what = "is not set" if root is None else f"is {root}"
        raise ValueError(
            f"this scale needs a real model, {HUB[name]}: REGARD_MODELS {what}; set it to a folder that holds {name}, "
            f"or let the hub be reached ({error})"
        ) from error
