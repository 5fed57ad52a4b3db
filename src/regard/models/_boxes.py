"""Parts of small detectors. Boxes are left, top, right, bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Shared over joined area of every pair, 0 to 1. [..., n, 4], [..., m, 4] -> [..., n, m]"""
    a, b = one.unsqueeze(-2), other.unsqueeze(-3)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    shared = sides.prod(-1)
    joined = area(one).unsqueeze(-1) + area(other).unsqueeze(-2) - shared
    return shared / joined.clamp_min(1e-9)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]"""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than `threshold`, best first. [n, 4], [n] -> [kept]"""
    order = scores.argsort(descending=True)
    above = (iou(boxes[order], boxes[order]) > threshold).triu(1)
    kept = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for i in range(len(order)):
        if kept[i]:
            kept &= ~above[i]
    return order[kept]


def centres(rows: int, columns: int, stride: float) -> Tensor:
    """x and y of the centres of cells, in pixels. [row, column, 2]"""
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    return torch.stack([x, y], -1) * stride


class Truths(NamedTuple):
    """True objects of several pictures, filled up; one more place than any picture needs, so that there is one."""

    boxes: Tensor  # [batch, object, 4]
    classes: Tensor  # [batch, object]
    there: Tensor  # boolean [batch, object]


def truths(boxes: Sequence[Tensor], classes: Sequence[Tensor], device: torch.device) -> Truths:
    """boxes of each picture [object, 4], classes [object]"""
    filled = nn.utils.rnn.pad_sequence
    at = filled([F.pad(box.float(), (0, 0, 0, 1)) for box in boxes], batch_first=True).to(device)
    of = filled([F.pad(kind, (0, 1)) for kind in classes], batch_first=True).to(device)
    counts = torch.tensor([[len(box)] for box in boxes], device=device)
    return Truths(at, of, torch.arange(at.shape[1], device=device) < counts)


def anchor_losses(logits: Tensor, boxes: Tensor, anchors: Tensor, truth: Truths) -> tuple[Tensor, Tensor]:
    """Focal loss of classes for each object, and mean distance of sides of boxes that stand for one.

    logits [batch, anchor, class], boxes [batch, anchor, 4], anchors [anchor, 4]. Anchors that share half or more of a
    true box, and the best of each, stand for it; those that share 0.4 to 0.5 are asked nothing.
    """
    overlap = iou(anchors, truth.boxes).masked_fill(~truth.there[:, None], -1.0)  # [batch, anchor, object]
    picture, number = truth.there.nonzero(as_tuple=True)
    shared, of = overlap.max(-1)
    positive, best = shared >= 0.5, overlap.argmax(1)[picture, number]
    positive[picture, best], of[picture, best] = True, number
    asked = positive | (shared < 0.4)
    (row, anchor), which = positive.nonzero(as_tuple=True), of[positive]
    wanted = torch.zeros_like(logits)
    wanted[row, anchor, truth.classes[row, which]] = 1
    focal = focal_loss(logits, wanted)[asked].sum() / max(len(picture), 1)
    apart = (boxes[row, anchor] - truth.boxes[row, which]).abs().mean(-1).sum() / max(len(row), 1)
    return focal, apart


def point_losses(logits: Tensor, offsets: Tensor, places: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian focal loss, and smooth L1 of offsets at the true cells, for each object.

    logits [batch, kind, row, column], offsets [batch, kind, 2, row, column], places: x and y in cells
    [batch, kind, object, 2], there [batch, object].
    """
    rows, columns = logits.shape[-2:]
    count = max(int(there.sum()), 1)
    cells = torch.minimum(places.floor().clamp_min(0), places.new_tensor([columns - 1, rows - 1]))
    away = (centres(rows, columns, 1).to(places) - 0.5 - cells[:, :, :, None, None]).square().sum(-1)
    near = (-away / (2 * 0.7**2)).exp() * there[:, None, :, None, None]
    column, row = cells.long().unbind(-1)
    index = torch.arange(len(logits))[:, None, None], torch.arange(logits.shape[1])[:, None]
    off = offsets.movedim(2, -1)[(*index, row, column)] - (places - cells - 0.5)
    moved = F.smooth_l1_loss(off, torch.zeros_like(off), reduction="none").sum(-1) * there[:, None]
    return gaussian_focal_loss(logits, near.amax(2)) / count, moved.sum() / count


def normed(channels: int, out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(min(8, out), out), nn.ReLU()


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss with exponent 2 and a weight of 0.25 for what is there."""
    miss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = (-miss).exp()
    return (0.25 * wanted + 0.75 * (1 - wanted)) * (1 - right).square() * miss


def gaussian_focal_loss(logits: Tensor, near: Tensor) -> Tensor:
    """CornerNet's: cells beside a point count the less the nearer they are. Summed"""
    likely = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    there = near == 1
    hit = -(1 - likely).square() * likely.log() * there
    miss = -((1 - near) ** 4) * likely.square() * (1 - likely).log() * ~there
    return (hit + miss).sum()
