"""Where claims find real pretrained models."""

from __future__ import annotations

import os
from pathlib import Path

from ..loading import Loaded, load

HUB = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "dinov2-small": "facebook/dinov2-small"}


def pretrained(name: str) -> Loaded:
    """A model of `HUB` and its processor: from the folder that REGARD_MODELS names, if it holds it, else by hub id."""
    import torch

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
