"""What maps of parts are trained to be, and pictures turned, shifted and scaled to hold them to it.

As Aniraj et al. have it (arXiv:2506.08915, see `faithful_maps`). maps: of each patch over parts, the background last,
[batch, part + 1, row, column], 0 to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _smooth(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, 3, stride=1)


def presence(maps: Tensor) -> Tensor:
    """1 minus how much of each part there is at its best place of the batch, a mean of 3 x 3 patches. Scalar"""
    return 1 - _smooth(maps[:, :-1]).amax((0, 2, 3)).mean()


def background(maps: Tensor) -> Tensor:
    """Cross entropy of there being background, the more the farther from the centre. Scalar"""
    there = _smooth(maps[:, -1:])
    rows, columns = (torch.linspace(-1, 1, size, device=maps.device, dtype=maps.dtype) for size in there.shape[-2:])
    far = rows[:, None].square() + columns.square()
    best = (there * far / far.max().clamp_min(1e-12)).amax((1, 2, 3)).clamp(0, 1)
    return F.binary_cross_entropy(best, torch.ones_like(best))


def total_variation(maps: Tensor) -> Tensor:
    """Sum of differences between neighbours, per patch. Scalar"""
    batch, _, rows, columns = maps.shape
    return (maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()) / (batch * rows * columns)


def entropy(maps: Tensor) -> Tensor:
    """Of each patch's parts, in nats, the mean. Scalar"""
    return -torch.special.xlogy(maps, maps).sum(1).mean()


def orthogonality(features: Tensor) -> Tensor:
    """The mean squared cosine of parts, the background among them, a part with itself counting 0. Scalar

    features: [batch, dim, part + 1].
    """
    unit = F.normalize(features, dim=1)
    cosines = unit.mT @ unit
    return (cosines - torch.eye(cosines.shape[-1]).to(cosines)).square().mean()


def turns(count: int, *, most: float) -> Tensor:
    """Random turns, shifts and scales, as torch's seed says: what maps a place of the result to one of the picture."""
    angle, scale = (2 * torch.rand(count) - 1) * most * math.pi, 1 + (2 * torch.rand(count) - 1) * most
    shift = (2 * torch.rand(count, 2) - 1) * most
    first = torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1)
    return torch.stack([first, second], 1)  # [batch, 2, 3]


def inverse(turn: Tensor) -> Tensor:
    matrix = turn[:, :, :2].float().inverse()  # which half precision has not
    return torch.cat([matrix, -matrix @ turn[:, :, 2:].float()], -1).to(turn)


def moved(pictures: Tensor, turn: Tensor) -> Tensor:
    """Pictures, or maps, after `turns`; what comes from outside is 0."""
    grid = F.affine_grid(turn, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)
