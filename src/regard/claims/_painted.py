"""Captions that the zoo's painter is given, and what the viewer says of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.scenes import Scene
from ..loading import load
from ..zoo.recipes import painter, viewer


def scenes(n: int, seed: int, objects: int = 2) -> list[Scene]:
    """Fresh scenes of so many objects."""
    dials = replace(painter.DIALS, objects=(objects, objects))
    return [painter.draw(viewer.HELD_OUT + seed, i, dials) for i in range(n)]


@torch.inference_mode()
def logits(pictures: NDArray[np.float32]) -> Tensor:
    """What the viewer makes of pictures [picture, row, column, 3], 0 to 1. [picture, pair]"""
    model, processor = load("viewer")
    images = [Image.fromarray((255 * picture).round().astype(np.uint8)) for picture in pictures]
    found: Any = model(**processor(images=images, return_tensors="pt"))
    return found.logits


def named(pictures: NDArray[np.float32], of: Sequence[Scene]) -> Tensor:
    """Mean log-probability of the pairs of colour and shape that a picture is to show. [picture]"""
    found = torch.nn.functional.logsigmoid(logits(pictures))
    return torch.stack([row[viewer.pairs(scene)].mean() for row, scene in zip(found, of, strict=True)])
