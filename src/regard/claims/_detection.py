"""Average precision of boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models._boxes import iou

Boxes = tuple[Tensor, Tensor, Tensor]  # boxes [object, 4], scores [object], classes [object], best first


def average_precision(
    found: Sequence[Boxes], boxes: Sequence[Tensor], classes: Sequence[Tensor], threshold: float
) -> float:
    """Area under precision over recall, the mean over classes that occur, 0 to 1.

    A box is right where it shares `threshold` or more of a true box of its class that no better one has taken. As in
    PASCAL VOC since 2010, precision is made to fall with recall.
    """
    areas = []
    for kind in torch.cat(list(classes)).unique().tolist():
        scores, hits = [], []
        for (at, score, of), truth, is_of in zip(found, boxes, classes, strict=True):
            shared = iou(at[of == kind], truth[is_of == kind])
            free = torch.ones(shared.shape[1], dtype=torch.bool)
            for row in shared:
                row = row.where(free, 0.0)
                best = int(row.argmax()) if len(row) else 0
                right = bool(len(row)) and float(row[best]) >= threshold
                if right:
                    free[best] = False
                hits.append(right)
            scores.append(score[of == kind])
        total = int((torch.cat(list(classes)) == kind).sum())
        if not hits:
            areas.append(0.0)
            continue
        right = torch.tensor(hits, dtype=torch.float64)[torch.cat(scores).argsort(descending=True)]
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        falling = precision.flip(0).cummax(0).values.flip(0)
        areas.append(float((falling * right).sum() / total))
    return sum(areas) / len(areas)
