"""Pinhole cameras, for models of several views: poses lead from camera to world, and the third axis looks ahead."""

from __future__ import annotations

import torch
from torch import Tensor


def rigid(poses: Tensor, asked_by: str) -> None:
    """ValueError where a pose [view, 4, 4] is not a rotation and a shift."""
    turn = poses[:, :3, :3]
    last, one = poses.new_tensor([0.0, 0, 0, 1]), torch.eye(3, dtype=poses.dtype, device=poses.device)
    right = (turn @ turn.mT - one).abs().amax((1, 2)) < 1e-3
    right &= (torch.linalg.det(turn) > 0) & ((poses[:, 3] - last).abs().amax(1) < 1e-6)
    if not right.all():
        wrong = int((~right).nonzero()[0])
        raise ValueError(
            f"{asked_by}: pose {wrong} is no rotation and shift [4, 4] from camera to world:\n{poses[wrong]}"
        )


def project(points: Tensor, poses: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of points in each view [..., point, view, 2], and depth along its axis [..., point, view].

    points: [..., point, 3]; poses: [..., view, 4, 4]; intrinsics: [..., view, 3, 3]
    """
    local = torch.einsum("...vji,...pvj->...pvi", poses[..., :3, :3], points[..., None, :] - poses[..., None, :, :3, 3])
    seen = torch.einsum("...vij,...pvj->...pvi", intrinsics, local)
    return seen[..., :2] / seen[..., 2:].clamp_min(1e-6), local[..., 2]


def rays(size: tuple[int, int], poses: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel's ray starts and where it leads, both [..., view, pixel, 3]; pixels row by row.

    Directions are as long as makes a step of 1 one of depth along the camera's axis. size: rows and columns.
    """
    y, x = torch.meshgrid(*(torch.arange(n, device=poses.device, dtype=poses.dtype) for n in size), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
    local = pixels @ torch.linalg.inv(intrinsics).mT
    ways = local @ poses[..., :3, :3].mT
    return poses[..., None, :3, 3].expand_as(ways), ways
