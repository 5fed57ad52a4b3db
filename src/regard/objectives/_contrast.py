"""Contrast of pairs in a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def both_ways(scores: Tensor) -> Tensor:
    """InfoNCE of each row's own column among all, and of each column's own row; their mean, in nats, from 0. A scalar

    scores: [batch, batch], over the temperature.

    >>> import torch
    >>> from regard.objectives._contrast import both_ways
    >>> both_ways(torch.zeros(2, 2))
    tensor(0.6931)
    """
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2
