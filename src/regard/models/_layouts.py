"""Layouts of boxes and walls as cameras see them: the surfaces behind each pixel, and points seen from elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._cameras import project, rays, rigid


class Boxes(NamedTuple):
    """A layout of one scene."""

    centres: Tensor  # [box, 3]
    sizes: Tensor  # full widths along the box's own axes [box, 3]
    turns: Tensor  # columns are the box's axes in the world [box, 3, 3]
    labels: Tensor  # what it is, from 0 [box]
    walls: Tensor  # boolean: nothing is seen behind it [box]


class Layers(NamedTuple):
    """The first surfaces of a layout behind each pixel; zeros where there are fewer, labels -1."""

    labels: Tensor  # [..., view, layer, row, column]
    depths: Tensor  # along the camera's axis
    extents: Tensor  # from where the ray enters the box to where it leaves; 0 of walls
    own: Tensor  # of the hit in its box, -1 to 1 [..., view, layer, row, column, 3]
    world: Tensor


def layout_layers(boxes: Boxes, poses: Tensor, intrinsics: Tensor, size: tuple[int, int], *, layers: int = 3) -> Layers:
    """What boxes of a layout each pixel's ray meets, nearest first, until a wall. For one scene

    poses [view, 4, 4] lead from camera to world, the camera looking along its third axis; intrinsics [view, 3, 3];
    size: rows and columns. A box that the camera stands in is met where the ray leaves it. In float32 at least; without
    boxes there is nothing. ValueError for cameras without intrinsics, poses and turns that are not rigid, boxes without
    size or place, walls that are not boolean, and labels below 0.

    >>> import torch
    >>> eye = torch.eye(3)
    >>> box = Boxes(torch.tensor([[0.0, 0, 3]]), torch.ones(1, 3), eye[None], torch.zeros(1), torch.tensor([False]))
    >>> layout_layers(box, torch.eye(4)[None], eye[None], (1, 1), layers=2).depths.flatten()
    tensor([2.5000, 0.0000])
    """
    if layers < 1 or intrinsics.shape != (len(poses), 3, 3):
        raise ValueError(
            f"mvroom: one layer or more, and intrinsics [3, 3] of each camera; got {layers}, {list(intrinsics.shape)} "
            f"for {list(poses.shape)}"
        )
    exact = torch.promote_types(poses.dtype, torch.float32)
    poses, intrinsics = poses.to(exact), intrinsics.to(exact)
    boxes = boxes._replace(centres=boxes.centres.to(exact), sizes=boxes.sizes.to(exact), turns=boxes.turns.to(exact))
    if not (boxes.sizes > 0).all() or not torch.cat([boxes.centres, boxes.sizes]).isfinite().all():
        raise ValueError("mvroom: boxes have sizes above 0, and centres and sizes are finite")
    if boxes.walls.dtype != torch.bool or (boxes.labels < 0).any():
        raise ValueError(
            f"mvroom: walls are boolean, and labels 0 or more, -1 being nothing; got {boxes.walls.dtype} and "
            f"{boxes.labels.tolist()}"
        )
    rigid(poses, "mvroom")
    if ((boxes.turns @ boxes.turns.mT - torch.eye(3).to(boxes.turns)).abs() > 1e-3).any():
        raise ValueError("mvroom: turns hold a box's axes as columns, of length 1 and at right angles")
    starts, ways = rays(size, poses, intrinsics)  # [view, pixel, 3]
    start = torch.einsum("bij,vpbi->vpbj", boxes.turns, starts[:, :, None] - boxes.centres)
    way = torch.einsum("bij,vpi->vpbj", boxes.turns, ways)
    way = torch.where(way.abs() < 1e-9, 1e-9, way)
    sides = torch.stack([-boxes.sizes / 2, boxes.sizes / 2])  # [2, box, 3]
    crossed = (sides[:, None, None] - start) / way
    enter, leave = crossed.amin(0).amax(-1), crossed.amax(0).amin(-1)  # [view, pixel, box]
    hit = torch.where(enter > 1e-6, enter, leave)
    hit = hit.masked_fill((leave < enter) | (leave <= 1e-6), torch.inf)
    count = min(layers, hit.shape[-1])
    depth, which = hit.topk(count, largest=False)
    wall = boxes.walls[which] & depth.isfinite()
    there = depth.isfinite() & (wall.cumsum(-1) - wall.long() == 0)
    extent = torch.where(wall | (enter.gather(-1, which) <= 1e-6), 0.0, leave.gather(-1, which) - depth)
    at = torch.where(there, depth, 0.0)
    own = start.gather(2, which[..., None].expand(*which.shape, 3)) + at[..., None] * way.gather(
        2, which[..., None].expand(*which.shape, 3)
    )
    world = starts[:, :, None] + at[..., None] * ways[:, :, None]

    def shaped(x: Tensor, fill: float) -> Tensor:
        mask = there.view(*there.shape, *[1] * (x.ndim - 3))
        x = torch.where(mask, x, torch.full_like(x, fill)).transpose(1, 2)
        x = torch.cat([x, x.new_full((len(x), layers - count, *x.shape[2:]), fill)], 1)
        return x.unflatten(2, size)

    return Layers(
        shaped(boxes.labels[which].long(), -1),
        shaped(depth.where(there, 0.0), 0),
        shaped(extent, 0),
        shaped(2 * own / boxes.sizes[which], 0),
        shaped(world, 0),
    )


def conditions(layers: Layers, classes: int, *, frequencies: int = 3, far: float = 4.0) -> Tensor:
    """Pictures of a layout: of each layer its class, and its depth and places in box and world by sines.

    Comes back as [..., view, channel, row, column]; far: depth and distance that are encoded as 1.
    """
    there = (layers.labels >= 0)[..., None]
    kinds = F.one_hot(layers.labels.clamp_min(0), classes) * there
    places = torch.cat([layers.own, layers.world / far, layers.depths[..., None] / far], -1)
    found = torch.cat([kinds.to(places), sines(places, frequencies) * there], -1)  # [..., layer, row, column, channel]
    return found.movedim(-1, -3).flatten(-4, -3)


def sines(x: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of pi, 2 pi, 4 pi, .. times each number. [..., n] -> [..., n * 2 * frequencies]"""
    angles = x[..., None] * torch.pi * 2.0 ** torch.arange(frequencies, device=x.device)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def warp(
    pictures: Tensor, depths: Tensor, poses: Tensor, intrinsics: Tensor, pose: Tensor, intrinsic: Tensor
) -> tuple[Tensor, Tensor]:
    """What a new camera sees of the points that views show, and where it sees one: the picture and its mask.

    pictures: [view, channel, row, column]; depths: along the axis [view, row, column], 0 for none; pose [4, 4] and
    intrinsic [3, 3] of the new camera. Of points in one pixel, the nearest is seen. -> [channel, row, column], boolean
    """
    rows, columns = pictures.shape[-2:]
    starts, ways = rays((rows, columns), poses, intrinsics)
    points = starts + depths.flatten(1)[..., None] * ways
    places, depth = project(points.flatten(0, 1), pose[None], intrinsic[None])
    (column, row), depth = places[:, 0].round().long().unbind(-1), depth[:, 0]
    seen = (depths.flatten() > 0) & (depth > 1e-6) & (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    points = seen.nonzero()[:, 0]
    index = (row * columns + column)[points]
    nearest = depth.new_full((rows * columns,), torch.inf).scatter_reduce(0, index, depth[points], "amin")
    front = points[depth[points] == nearest[index]]
    found = pictures.new_zeros(pictures.shape[1], rows * columns)
    found[:, (row * columns + column)[front]] = pictures.movedim(1, 0).flatten(1)[:, front]
    return found.view(-1, rows, columns), nearest.isfinite().view(rows, columns)
