"""Stretches of time, each a start and an end."""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of stretches, 0 to 1. [a, 2], [b, 2] -> [a, b]"""
    shared = torch.minimum(one[:, None, 1], other[:, 1]) - torch.maximum(one[:, None, 0], other[:, 0])
    both = (one[:, 1] - one[:, 0])[:, None] + (other[:, 1] - other[:, 0])
    return shared.clamp_min(0) / (both - shared.clamp_min(0))


def soft_suppressed(stretches: Tensor, scores: Tensor, *, sigma: float = 0.4) -> tuple[Tensor, Tensor]:
    """Stretches [proposal, 2] and their scores, which fall where a better one overlaps; best first.

    >>> import torch
    >>> from regard.models._stretches import soft_suppressed
    >>> soft_suppressed(torch.tensor([[0.0, 4], [0, 4], [5, 8]]), torch.tensor([0.9, 0.8, 0.5]))[1]
    tensor([0.9000, 0.5000, 0.0657])
    """
    left, order, kept = scores.clone(), [], []
    shared = overlap(stretches, stretches)
    for _ in range(len(scores)):
        best = int(left.argmax())
        order.append(best)
        kept.append(float(left[best]))
        left = left * (-shared[best].square() / sigma).exp()
        left[order] = -1.0
    return stretches[order], scores.new_tensor(kept)
