"""Labels of what comes from pictures: which cell, of which grid over which picture.

Labels are of as many axes as the tensor that they are of, with size 1 where all along an axis are alike, and on the
CPU. A cell's label is its number among those of all grids, counted picture by picture and row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NONE = -1  # not known
WORD = 1 << 40  # and above: one of `input_ids`, counted through the batch
STATE = 1 << 41  # and above: one of the `encoder_hidden_states` of diffusers' models
OWN = 1 << 42  # a parameter of the model: class, register, mask and detection tokens, learned queries
REGISTER = OWN + 1  # a token that an intervention has appended


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows and columns of the cells of some pictures, whose labels begin at `start`."""

    start: int
    source: int  # where the labels of the pictures' own pixels, or patches, begin
    first: int  # number of the first picture; each frame of a video counts as one
    images: int
    frames: int  # of a video
    rows: int
    columns: int
    video: bool

    @property
    def end(self) -> int:
        return self.start + self.images * self.frames * self.rows * self.columns


class Grids:
    """All grids over the pictures of a session."""

    def __init__(self) -> None:
        self.all: list[Grid] = []
        self.sizes: dict[tuple[int, int, int, int], Grid] = {}  # by pictures and size
        self.count = 0  # pictures of this pass

    def new(self, images: int, frames: int, rows: int, columns: int, video: bool) -> Grid:
        grid = self._add(None, self.count, images, frames, rows, columns, video)
        self.count += images * frames
        return grid

    def _add(self, source: int | None, first: int, images: int, frames: int, *size: Any) -> Grid:
        start = self.all[-1].end if self.all else 0
        grid = Grid(start, start if source is None else source, first, images, frames, *size)
        self.all.append(grid)
        self.sizes[grid.source, frames, grid.rows, grid.columns] = grid
        return grid

    def over(self, of: Grid, frames: int, rows: int, columns: int) -> Grid:
        """The grid of this size over the same pictures."""
        known = self.sizes.get((of.source, frames, rows, columns))
        return known or self._add(of.source, of.first, of.images, frames, rows, columns, of.video)

    @staticmethod
    def cells(grid: Grid) -> Tensor:
        return torch.arange(grid.start, grid.end, device="cpu")

    def places(self, labels: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Picture, row, column and frame [..., 4] of labels, -1 where there is none; rows and columns of each picture.

        Pictures that are there on several grids count once for each.
        """
        places = torch.full((*labels.shape, 4), -1)
        cells = (labels >= 0) & (labels < WORD)
        if not cells.any():
            return places, ()
        at = labels[cells]
        of, picture, row, column = self.taken_apart(at)
        used = [self.all[i] for i in of.unique().tolist()]
        taken = [n for g in used for n in range(g.first, g.first + g.images * g.frames)]
        several, sizes, offsets = len(set(taken)) < len(taken), [], {}
        for grid in used:
            offset = len(sizes) - grid.first if several else 0
            many = grid.first + offset + grid.images * grid.frames
            sizes += [(0, 0)] * (many - len(sizes))
            for i in range(grid.first + offset, many):
                sizes[i] = (grid.rows, grid.columns)
            offsets[grid.start] = grid.first + offset
        numbers = torch.tensor([offsets.get(g.start, 0) for g in self.all], device="cpu")
        frames = torch.tensor([g.frames if g.video else 0 for g in self.all], device="cpu")[of]
        frame = torch.where(frames > 0, picture % frames.clamp_min(1), -1)
        places[cells] = torch.stack([numbers[of] + picture, row, column, frame], dim=-1)
        return places, tuple(sizes)

    def taken_apart(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which grid, and picture, row and column on it."""
        numbers = torch.tensor([(g.start, g.rows, g.columns) for g in self.all], device="cpu")
        of = torch.searchsorted(numbers[:, 0].contiguous(), labels.contiguous(), right=True) - 1
        start, rows, columns = numbers[of].unbind(-1)
        at = labels - start
        return of, at // (rows * columns), at // columns % rows, at % columns

    def laid(self, labels: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """Labels [picture, 1, (frame,) row, column], which are a whole picture and padding, on a grid of this size."""
        cells = labels >= 0
        if len(size) < 2 or not cells.any() or bool((labels >= WORD).any()):
            return None
        at = [cells.movedim(d, 0).flatten(1).any(1).nonzero() for d in range(2, labels.ndim)]
        inner = labels[(slice(None), slice(None), *(slice(int(i[0]), int(i[-1]) + 1) for i in at))]
        first = inner.flatten(1)[:, :1]
        of, picture, row, column = self.taken_apart(first)
        grids = of.unique().tolist()
        if len(grids) != 1 or bool((first < 0).any()):
            return None
        grid, shape = self.all[grids[0]], inner.shape[2:]
        frames = shape[0] if len(shape) == 3 else 1
        whole = (
            shape[-2:] == (grid.rows, grid.columns) and frames in (1, grid.frames) and not bool((row + column).any())
        )
        if not whole or not torch.equal(inner.flatten(1), first + torch.arange(math.prod(shape), device="cpu")):
            return None
        video = len(size) == 3 and frames == grid.frames
        new = self.over(grid, size[0] if video else grid.frames, *size[-2:])
        if new.rows * new.columns == 1:  # the picture as a whole has no place in it
            return None
        one = size[-2] * size[-1]
        start = picture // grid.frames * new.frames if video else picture
        cells = new.start + start * one + torch.arange((size[0] if video else 1) * one, device="cpu")
        cells = cells.reshape(len(labels), 1, *((size[0] if video else 1,) if len(size) == 3 else ()), *size[-2:])
        return cells

    def squares(self, labels: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """Labels [..., row, column] of a part of a picture, merged to this many rows and columns."""
        (*leading, rows, columns), (high, wide) = labels.shape, size[-2:]
        if len(size) != 2 or rows % high or columns % wide:
            return None
        parts = labels.reshape(*leading, high, rows // high, wide, columns // wide).transpose(-3, -2)
        return self.hull(parts.flatten(-2), -1).squeeze(-1)

    def hull(self, labels: Tensor, dim: int) -> Tensor:
        """Of what is made of everything along an axis: the one place, or the rectangle of places as a larger cell."""
        if labels.shape[dim] == 1:
            return labels
        first = labels.narrow(dim, 0, 1)
        if bool((labels == first).all()):
            return first
        nothing = torch.full_like(first, NONE)
        cells = (labels >= 0) & (labels < WORD)
        if bool((labels >= WORD).any()) or not bool(cells.any()):
            same = (labels == first).all(dim, keepdim=True)
            return torch.where(same, first, NONE)
        of, picture, row, column = self.taken_apart(labels.clamp_min(0))
        frames = torch.tensor([g.frames for g in self.all], device="cpu")[of]
        parts = {"of": of, "image": picture // frames, "frame": picture % frames, "row": row, "column": column}
        low = {k: v.masked_fill(~cells, 1 << 40).amin(dim, keepdim=True) for k, v in parts.items()}
        high = {k: v.masked_fill(~cells, -1).amax(dim, keepdim=True) for k, v in parts.items()}
        there = cells.any(dim, keepdim=True)
        if any(bool((low[k] != high[k])[there].any()) for k in ("of", "image")):
            return nothing
        found = nothing.clone()
        for number in low["of"][there].unique().tolist():
            here, grid = there & (low["of"] == number), self.all[number]
            sides = {}
            for k in ("frame", "row", "column"):
                sides[k] = int((high[k] - low[k])[here].max()) + 1
                if bool((low[k] // sides[k] != high[k] // sides[k])[here].any()):
                    return nothing
            counts = [-(-n // s) for n, s in zip((grid.frames, grid.rows, grid.columns), sides.values())]
            if counts[1] * counts[2] == 1:  # the picture as a whole has no place in it
                continue
            new = self.over(grid, *counts)
            f, r, c = (low[k] // s for k, s in sides.items())
            label = new.start + ((low["image"] * new.frames + f) * new.rows + r) * new.columns + c
            found = torch.where(here, label, found)
        return found


def known(labels: Tensor) -> Tensor | None:
    return labels if bool((labels != NONE).any()) else None


def alike(labels: Tensor, dim: int) -> Tensor:
    """With one label along an axis: `NONE` where they differ."""
    if labels.shape[dim] == 1:
        return labels
    first = labels.narrow(dim, 0, 1)
    return torch.where((labels == first).all(dim, keepdim=True), first, NONE)


def over_heads(labels: Tensor, leading: torch.Size, batch: int, heads: int) -> Tensor | None:
    """Labels [batch, position] of [..., position], which all heads of `leading` share."""
    n = labels.shape[-1]
    for axis in range(len(leading) - 1, 0, -1):
        if leading[axis] == heads and labels.shape[axis] == 1:
            return labels.squeeze(axis).expand(*leading[:axis], *leading[axis + 1 :], n).reshape(batch, n)
    every = labels.expand(*leading, n).reshape(batch, heads, n)
    return every[:, 0] if bool((every == every[:, :1]).all()) else None


def alike_or_wide(mask: Tensor) -> Tensor:
    return mask[..., :1] if mask.shape[-1] > 1 and bool((mask == mask[..., :1]).all()) else mask


def both(a: Tensor, b: Tensor) -> Tensor:
    """Of what was made of two: what is known of one, unless the other says something else."""
    a_says, b_says = ((x != NONE) & (x != OWN) for x in (a, b))
    neither = torch.minimum(a, b)  # what is made of something else too is no longer the model's own
    either = torch.where(a_says, a, torch.where(b_says, b, neither))
    return torch.where(a_says & b_says & (a != b), NONE, either)


def narrow(labels: Tensor, views: bool = True) -> Tensor:
    """The same, of size 1 along axes where all are alike; `views`: the others were not expanded."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or (views and dim and bool((labels == first).all())):
                labels = first
    return labels


def reshaped(labels: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor | None:
    """Labels of a tensor of shape `old`, seen as of shape `new`: axes that go over into each other together."""
    shape: list[int] = []
    wide: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, i0, j0 = 1, 1, i, j
        while (i < len(old) and i == i0) or (j < len(new) and j == j0) or a != b:
            if a <= b and i < len(old) and (i == i0 or a < b):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            elif i < len(old):
                a, i = a * old[i], i + 1
            else:
                return None
        alike = all(n == 1 for n in labels.shape[i0:i])
        wide += [1] * (i - i0) if alike else list(old[i0:i])
        shape += [1] * (j - j0) if alike else list(new[j0:j])
    return labels.expand(wide).reshape(shape)
