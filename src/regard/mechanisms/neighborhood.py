"""Attention of each token to its nearest neighbours on a line, in a picture or in a video.

Hassani et al., Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level
(arXiv:2403.04690), section 3; borders, dilation and causal axes as in the authors' library, NATTEN.

Along each axis a token sees `window` tokens, itself in the middle; at a border the window is shifted inside, not cut,
so that every token has as many neighbours. With dilation, neighbours are that far apart, and windows are shifted among
the tokens of the same remainder. Along a causal axis a token sees the window that ends with it, cut at the border.

The paper's fused kernel is ours in this: neighbouring queries are worked on together, with all keys that any of them
sees, and scores are never stored whole. Window and dilation are 7 and 1, those of the authors' vision models; the paper
has no default. Deviations: an axis shorter than its window is seen whole, where NATTEN refuses; where a mask says which
keys there are, the axes that are not causal end with the outermost keys, so that padding changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import native
from ._mechanism import Cost, by_head, mechanism, recomputed, scale_of, softmax
from ._softmax import attend, runs_native

TILES = {
    1: (48,),
    2: (6, 8),
    3: (3, 4, 4),
}  # queries of each axis that are worked on together: 48, as many as the kernel
SPACE = 2**22  # numbers of keys and values that are laid out at once

Axes = int | Sequence[int]


class _Axis(NamedTuple):
    length: int
    window: int
    dilation: int
    causal: bool
    first: int  # position of the first query
    low: int = 0  # the keys that there are: low <= key < high
    high: int = 0

    def neighbours(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The first position that each position sees, and how many, `dilation` apart."""
        if self.causal:
            return at - (self.window - 1) * self.dilation, torch.full_like(at, self.window)
        start = self.low + (at - self.low) % self.dilation  # the first of the same remainder
        held = (-(-(self.high - start) // self.dilation)).clamp_min(0)
        count = held.clamp_max(self.window)
        left = ((at - start) // self.dilation - self.window // 2).clamp_min(0)
        return start + torch.minimum(left, held - count) * self.dilation, count

    def seen(self) -> Tensor:
        """Which key positions each query position sees. [query, key]"""
        at, keys = torch.arange(self.first, self.length), torch.arange(self.length)
        first, count = (t[:, None] for t in self.neighbours(at))
        return (keys >= first) & (keys < first + count * self.dilation) & ((keys - first) % self.dilation == 0)

    def tiles(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries taken together [tile, query], all keys they see [tile, key], and who sees which [tile, query, key].

        A tile's queries have one remainder. Where it has fewer than others, its last one stands again.
        """
        size = min(size, -(-(self.length - self.first) // self.dilation))
        parts = [torch.arange(r, self.length, self.dilation) for r in range(self.first, self.length)[: self.dilation]]
        at = torch.cat([torch.cat([p, p[-1:].expand(-len(p) % size)]).unflatten(0, (-1, size)) for p in parts])
        first, count = self.neighbours(at)
        stop = first + count * self.dilation
        width = int((stop.amax(1) - first[:, 0]).max()) // self.dilation
        keys = first[:, :1] + self.dilation * torch.arange(width)
        seen = (keys[:, None] >= first[..., None]) & (keys[:, None] < stop[..., None])
        return at, keys.clamp(0, self.length - 1), seen & (keys >= 0)[:, None] & (keys < self.length)[:, None]


def _axes(
    n_query: int, n_key: int, causal: bool | Sequence[bool], shape: Sequence[int] | None, window: Axes, dilation: Axes
) -> list[_Axis]:
    shape = (n_key,) if shape is None else tuple(shape)
    of_axes = {"window": window, "dilation": dilation, "causal": causal}
    given = {k: (v,) * len(shape) if isinstance(v, int) else tuple(v) for k, v in of_axes.items()}
    if not 1 <= len(shape) <= 3 or any(len(v) != len(shape) for v in given.values()):
        raise ValueError(
            f"neighborhood: shape has 1 to 3 axes, and window, dilation and causal one value or as many; got {shape=}, "
            f"{window=}, {dilation=}, {causal=}"
        )
    if min(*given["window"], *given["dilation"]) < 1:
        raise ValueError(f"neighborhood: window and dilation are 1 or more; got {window=}, {dilation=}")
    if math.prod(shape) != n_key:
        raise ValueError(
            f"neighborhood: shape {shape} has {math.prod(shape)} positions, but there are {n_key} keys; tokens that "
            f"stand outside the grid, such as a class token, belong elsewhere"
        )
    rest = math.prod(shape[1:])
    if n_query != n_key and (not given["causal"][0] or n_query % rest):
        raise ValueError(
            f"neighborhood: fewer queries than keys are the last of a causal first axis, in whole steps of {rest}; got "
            f"{n_query} queries and {n_key} keys, {causal=}"
        )
    firsts = [(n_key - n_query) // rest, *[0] * (len(shape) - 1)]
    return [
        _Axis(n, w, d, bool(c), first, 0, n)
        for n, w, d, c, first in zip(shape, given["window"], given["dilation"], given["causal"], firsts, strict=True)
    ]


def _boxed(axes: list[_Axis], mask: Tensor | None) -> list[tuple[Tensor | None, list[_Axis]]]:
    """Rows of the batch whose keys end at the same places (None: all), and the axes with these ends."""
    if mask is None or all(axis.causal for axis in axes):
        return [(None, axes)]
    there = mask.flatten(1).unflatten(1, [a.length for a in axes])
    ends = []
    for i, axis in enumerate(axes):
        along = there.transpose(1, i + 1)[..., None].flatten(2).any(-1).int()  # [batch, position]
        high = (axis.length - along.flip(1).argmax(1)) * along.amax(1)
        ends.append(torch.stack([along.argmax(1), high], 1))
    boxes, of = torch.stack(ends, 1).unique(dim=0, return_inverse=True)
    found = [[a._replace(low=low, high=high) for a, (low, high) in zip(axes, box)] for box in boxes.tolist()]
    return [(of == i if len(found) > 1 else None, axes) for i, axes in enumerate(found)]


def _weights(query: Tensor, key: Tensor, *, causal: Any, mask: Tensor | None, scale: float | None, **knobs: Any):
    knobs = {"shape": None, "window": 7, "dilation": 1, **knobs}
    axes = _axes(query.shape[2], key.shape[2], causal, **knobs)
    seen = torch.zeros(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool)
    for rows, boxed in _boxed(axes, mask):
        pairs = torch.ones(1, 1, dtype=torch.bool)
        for axis in boxed:
            pairs = torch.kron(pairs, axis.seen())
        seen[slice(None) if rows is None else rows] = pairs
    seen = seen.to(query.device) if mask is None else seen.to(query.device) & mask
    return softmax(query @ by_head(key, query.shape[1]).mT * scale_of(query, scale), seen)


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool | Sequence[bool] = False,
    shape: Sequence[int] | None = None,
    window: Axes = 7,
    dilation: Axes = 1,
) -> Cost:
    pairs, taken = 1.0, 1.0
    axes = _axes(n_query, n_key, causal, shape, window, dilation)
    for axis, size in zip(axes, TILES[len(axes)], strict=True):
        first, count = axis.neighbours(torch.arange(axis.first, axis.length))
        pairs *= float((count + (first // axis.dilation).clamp(-axis.window, 0)).sum())
        taken *= -(-(axis.length - axis.first) // size) * (size + axis.window - 1)
    return Cost(4 * dim * pairs, 2 * dim * (n_query + taken))


def _sized(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"window": tuple(min(7, n // 4 * 2 - 1) if n > 4 else n for n in shape)}  # odd, at most half of an axis


@mechanism("causal", "full", mask="keys", weights=_weights, cost=_cost, sized=_sized)
def neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | Sequence[bool] = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    window: Axes = 7,
    dilation: Axes = 1,
) -> Tensor:
    """Softmax attention of each token to its neighbours on a grid of 1 to 3 axes. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the tokens of a grid of this `shape`, the
    last axis running fastest; without shape, a sequence. window: tokens seen along each axis; dilation: how far apart;
    causal: along which axes only what was before is seen. Each is one value, or one for each axis. With a causal first
    axis, fewer queries than keys are the last of it. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError
    where shape and tokens do not fit.

        >>> x = torch.randn(1, 4, 32 * 32, 64)
        >>> neighborhood(x, x, x, shape=(32, 32), window=7).shape
        torch.Size([1, 4, 1024, 64])
    """
    axes, scale = _axes(query.shape[2], key.shape[2], causal, shape, window, dilation), scale_of(query, scale)
    parts = _boxed(axes, mask)
    if len(parts) == 1:
        return _alike(query, key, value, parts[0][1], mask, scale)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    for rows, boxed in parts:
        inside = None if mask is None else mask[rows]
        output = output.index_put((rows,), _alike(query[rows], key[rows], value[rows], boxed, inside, scale))
    return output


def _alike(query: Tensor, key: Tensor, value: Tensor, axes: list[_Axis], mask: Tensor | None, scale: float) -> Tensor:
    """Attention of rows of the batch whose keys end at the same places."""
    line = axes[0]
    if len(axes) > 1 or line.dilation > 1 or line.low == line.high or not runs_native(query):
        return _over_tiles(query, key, value, axes, mask, scale)
    # The kernel knows windows that end with the query: around it, they are those of keys that run ahead.
    window = min(line.window, line.high - line.low)
    before = 0 if line.causal else window // 2
    begins, ends = line.low + before, line.high - (0 if line.causal else window - 1 - before)

    def part(rows: slice, low: int, high: int, **limits: Any) -> Tensor:
        seen = None if mask is None else mask[..., low:high]
        return native.attention(
            query[:, :, rows], key[:, :, low:high], value[:, :, low:high], mask=seen, scale=scale, **limits
        )

    middle = part(slice(begins, ends - line.first), line.low, line.high, causal=True, window=window)
    if line.causal:
        return middle
    first = part(slice(begins), line.low, line.low + window)
    return torch.cat([first, middle, part(slice(ends, None), line.high - window, line.high)], 2)


def _over_tiles(
    query: Tensor, key: Tensor, value: Tensor, axes: list[_Axis], mask: Tensor | None, scale: float
) -> Tensor:
    cut = [tuple(t.to(query.device) for t in a.tiles(size)) for a, size in zip(axes, TILES[len(axes)], strict=True)]
    counts = [len(at) for at, _, _ in cut]
    n_query, n_key = (math.prod(of[i].shape[1] for of in cut) for i in (0, 1))
    each = len(key) * key.shape[1] * n_key * (key.shape[-1] + value.shape[-1])
    numbers, parts, places = torch.arange(math.prod(counts), device=query.device), [], []
    for which in numbers.split(max(1, SPACE // each)):
        of = torch.unravel_index(which, counts)
        at = _joined([rows[i] for (rows, _, _), i in zip(cut, of, strict=True)], axes) - key.shape[2] + query.shape[2]
        keys = _joined([columns[i] for (_, columns, _), i in zip(cut, of, strict=True)], axes)
        seen = torch.ones(len(which), 1, 1, dtype=torch.bool, device=query.device)
        for (_, _, pairs), i in zip(cut, of, strict=True):
            seen = (seen[:, :, None, :, None] & pairs[i][:, None, :, None]).flatten(3, 4).flatten(1, 2)
        parts.append(recomputed(_tiles, query, key, value, at, keys, seen, mask, scale))
        places.append(at.flatten())
    place = torch.cat(places)
    of_query = torch.empty(query.shape[2], dtype=torch.long, device=query.device)
    of_query[place] = torch.arange(len(place), device=query.device)
    return torch.cat(parts, 2).index_select(2, of_query)


def _joined(positions: list[Tensor], axes: list[_Axis]) -> Tensor:
    """Positions [tile, ...] along each axis as tokens [tile, all of them]."""
    token = positions[0]
    for axis, position in zip(axes[1:], positions[1:], strict=True):
        token = (token[:, :, None] * axis.length + position[:, None]).flatten(1)
    return token


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, at: Tensor, keys: Tensor, seen: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Output of the queries `at` [tile, query], tile after tile. [batch, head, query, dim]"""
    batch = len(query)

    def laid_out(tensor: Tensor, which: Tensor) -> Tensor:  # [batch * tile, head, position, dim]
        return tensor.index_select(2, which.flatten()).unflatten(2, which.shape).transpose(1, 2).flatten(0, 1)

    pairs = seen[None] if mask is None else seen & mask[:, 0, 0, keys][:, :, None]  # [batch|1, tile, query, key]
    pairs = pairs.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    output = attend(
        laid_out(query, at), laid_out(key, keys), laid_out(value, keys), causal=False, mask=pairs, scale=scale
    )
    return output.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
