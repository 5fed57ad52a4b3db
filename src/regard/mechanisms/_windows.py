"""The engine of windows on grids: softmax attention of each token to an interval of keys along each axis.

In the kernel where that serves: no pair is computed that nobody asked for, but at borders (kernels/native/grid.h).
Otherwise in tiles: neighbouring queries together, with all keys that any of them sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import native
from ..kernels.derivatives import transformed
from ..kernels.native import Blocks, grid
from ._blocks import attend as attend_blocks
from ._blocks import listed
from ._mechanism import Cost, by_head, recomputed, softmax
from ._softmax import attend as attend_whole
from ._softmax import runs_native

TILES = {1: (48,), 2: (6, 8), 3: (3, 4, 4)}  # queries of each axis that are worked on together
SPACE = 2**22  # numbers of keys and values that are laid out at once

Axes = int | Sequence[int]


class Axis(NamedTuple):
    """Who sees whom along an axis: of each query position `at`, keys `first`, `first + dilation`, .., `number` of them.

    All within the `length` keys. Among queries of one remainder by `dilation`, neither first nor last key ever falls.
    """

    length: int
    at: Tensor
    first: Tensor
    number: Tensor
    dilation: int = 1

    def seen(self) -> Tensor:
        """Which keys each query sees. [query, key]"""
        keys, first = torch.arange(self.length), self.first[:, None]
        return (
            (keys >= first)
            & (keys < first + self.number[:, None] * self.dilation)
            & ((keys - first) % self.dilation == 0)
        )

    def parts(self) -> list[tuple[Tensor, slice, Axis]]:
        """Of each remainder: which queries, which keys, and their own axis without dilation."""
        found = []
        for r in range(min(self.dilation, self.length)):
            which = (self.at % self.dilation == r).nonzero().flatten()
            if len(which):
                held = len(range(r, self.length, self.dilation))
                first = ((self.first[which] - r) // self.dilation).clamp(0, held)
                own = Axis(held, self.at[which] // self.dilation, first, self.number[which].clamp_max(held))
                found.append((which, slice(r, None, self.dilation), own))
        return found

    def side(self) -> grid.Side:
        return grid.Side(self.first, self.first + self.number, self.length)

    def tiles(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries taken together [tile, query], all keys they see [tile, key], and who sees which [tile, query, key].

        Where the last tile has fewer queries than others, its last one stands again.
        """
        size = min(size, len(self.at))
        which = torch.arange(len(self.at))
        which = torch.cat([which, which[-1:].expand(-len(which) % size)]).unflatten(0, (-1, size))
        first, stop = self.first[which], (self.first + self.number)[which]
        keys = first[:, :1] + torch.arange(max(1, int((stop.amax(1) - first[:, 0]).max())))
        seen = (keys[:, None] >= first[..., None]) & (keys[:, None] < stop[..., None])
        return which, keys.clamp_max(self.length - 1), seen


class Window(NamedTuple):
    """A window along an axis, shifted inside at borders; `stride` neighbouring queries share one. Of NATTEN's rule.

    With dilation keys are that far apart, and all is counted among tokens of the same remainder. causal: the window
    ends with the query, or with the last of those that share it, and is cut.
    """

    length: int
    window: int
    dilation: int
    causal: bool
    first: int = 0  # position of the first query
    low: int = 0  # the keys that there are: low <= key < high; none given: all. Where causal, only their end counts
    high: int | None = None
    stride: int = 1

    def sees(self) -> Axis:
        at, step = torch.arange(self.first, self.length), self.dilation
        low, high = 0 if self.causal else self.low, self.length if self.high is None else self.high
        start = low + (at - low) % step  # the first of the same remainder
        held = (-(-(high - start) // step)).clamp_min(0)
        place, count = (at - start) // step, held.clamp_max(self.window)
        shared = place // self.stride * self.stride
        if self.causal:
            # The last queries share the window of the last one that there is; what is behind it has its own.
            leader = torch.minimum(shared + self.stride - 1, held - 1).maximum(place)
            left = (leader - self.window + 1).clamp_min(0)
            return Axis(self.length, at, start + left * step, place - left + 1, step)
        leader = torch.minimum(shared + self.stride // 2, held - 1)
        left = torch.minimum((leader - self.window // 2).clamp_min(0), held - count)
        return Axis(self.length, at, start + left * step, count, step)


def boxed(axes: list[Window], mask: Tensor | None) -> list[tuple[Tensor | None, list[Window]]]:
    """Rows of the batch whose keys end at the same places (None: all), and the axes with these ends."""
    if mask is None or all(axis.causal and axis.stride == 1 for axis in axes):
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


def weights(query: Tensor, key: Tensor, axes: list[Window], mask: Tensor | None, scale: float) -> Tensor:
    """Dense. [batch, head, query, key]"""
    seen = torch.zeros(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool)
    for rows, own in boxed(axes, mask):
        seen[slice(None) if rows is None else rows] = pairs(axis.sees() for axis in own)
    seen = seen.to(query.device) if mask is None else seen.to(query.device) & mask
    return softmax(query @ by_head(key, query.shape[1]).mT * scale, seen)


def windowed(
    query: Tensor, key: Tensor, value: Tensor, axes: list[Window], mask: Tensor | None, scale: float
) -> Tensor:
    """Attention within windows, at borders of the keys that there are. [batch, head, query, dim]"""
    # Queries that share all they see are as fast as dense attention.
    together = [axis.stride for axis in axes]
    tile = together if math.prod(together) >= 24 and not any(axis.causal for axis in axes) else None
    parts = boxed(axes, mask)
    if len(parts) == 1:
        return attend(query, key, value, [a.sees() for a in parts[0][1]], mask=mask, scale=scale, tile=tile)
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    for rows, own in parts:
        few, inside = (query[rows], key[rows], value[rows]), None if mask is None else mask[rows]
        found = attend(*few, [a.sees() for a in own], mask=inside, scale=scale, tile=tile)
        output = output.index_put((rows,), found)
    return output


def cost(axes: Sequence[Window], n_query: int, dim: int) -> Cost:
    """Of one head: of the pairs that see each other, and of keys and values as often as tiles of queries take them."""
    seen, taken = 1.0, 1.0
    for axis, size in zip(axes, TILES[len(axes)], strict=True):
        seen *= float(axis.sees().number.sum())
        taken *= -(-(axis.length - axis.first) // size) * (size + axis.window - 1)
    return Cost(4 * dim * seen, 2 * dim * (n_query + taken))


class Regions(NamedTuple):
    """A grid cut into boxes, so that the tokens of each lie together; the last ones may hold fewer."""

    shape: tuple[int, ...]  # tokens
    size: tuple[int, ...]  # tokens of a region

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(-(-n // s) for n, s in zip(self.shape, self.size, strict=True))

    def laid_out(self, x: Tensor) -> Tensor:
        """[batch, head, token, dim] to [batch, head, region, token, dim], zeros where a region has fewer."""
        x, axes = x.unflatten(2, self.shape), len(self.shape)
        over = [m * s - n for n, s, m in zip(self.shape, self.size, self.number, strict=True)]
        x = F.pad(x, (0, 0, *(p for extra in reversed(over) for p in (0, extra))))
        for i, (number, size) in enumerate(zip(self.number, self.size, strict=True)):
            x = x.unflatten(2 + 2 * i, (number, size))
        order = [0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 2 + 2 * axes]
        return x.permute(order).flatten(2 + axes, 1 + 2 * axes).flatten(2, 1 + axes)

    def back(self, x: Tensor) -> Tensor:
        axes = len(self.shape)
        x = x.unflatten(3, self.size).unflatten(2, self.number)
        x = x.permute(0, 1, *(i for a in range(axes) for i in (2 + a, 2 + axes + a)), 2 + 2 * axes)
        for i in range(axes):
            x = x.flatten(2 + i, 3 + i).narrow(2 + i, 0, self.shape[i])
        return x.flatten(2, 1 + axes)


def pairs(axes: Iterable[Axis]) -> Tensor:
    """Which keys of the grid each query of it sees. [query, key]"""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        seen = torch.kron(seen, axis.seen())
    return seen


def given(name: str, shape: Sequence[int], **of_axes: Any) -> list[tuple[Any, ...]]:
    """Each setting by axis, which is one value or one for each. Raises ValueError where there are more or fewer."""
    found = [(v,) * len(shape) if isinstance(v, int) else tuple(v) for v in of_axes.values()]
    if not 1 <= len(shape) <= 3 or any(len(v) != len(shape) for v in found):
        settings = ", ".join(f"{k}={v}" for k, v in of_axes.items())
        *others, last = of_axes
        raise ValueError(
            f"{name}: shape has 1 to 3 axes, and {', '.join(others)} and {last} one value or as many; got "
            f"shape={tuple(shape)}, {settings}"
        )
    return found


def whole(name: str, shape: Sequence[int], n_key: int) -> None:
    """Raises ValueError where the grid has not as many positions as there are keys."""
    if math.prod(shape) != n_key:
        raise ValueError(
            f"{name}: shape {tuple(shape)} has {math.prod(shape)} positions, but there are {n_key} keys; tokens that "
            f"stand outside the grid, such as a class token, belong elsewhere"
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    *,
    mask: Tensor | None,
    scale: float,
    tile: Sequence[int] | None = None,
) -> Tensor:
    """Attention within boxes. [batch, head, query, dim]

    mask: which keys there are, [batch|1, 1, 1, key]. tile: queries of each axis that see the same keys, as in blocks.
    """
    if all(axis.dilation == 1 for axis in axes):
        return _attend(query, key, value, axes, mask, scale, tile)
    shape, lengths = [len(axis.at) for axis in axes], [axis.length for axis in axes]
    output, places = [], []
    for parts in itertools.product(*(axis.parts() for axis in axes)):
        at = torch.zeros((), dtype=torch.long)
        for (which, _, _), length in zip(parts, shape, strict=True):
            at = at[..., None] * length + which
        own = [axis for _, _, axis in parts]
        keys = torch.arange(math.prod(lengths)).view(lengths)[tuple(k for _, k, _ in parts)].flatten().to(key.device)
        at = at.flatten().to(query.device)
        inside = None if mask is None else mask[..., keys]
        few = [t.index_select(2, i) for t, i in ((query, at), (key, keys), (value, keys))]
        output.append(_attend(few[0], few[1], few[2], own, inside, scale, tile))
        places.append(at)
    order = torch.cat(places)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(output, 2).index_select(2, back)


def _attend(query: Tensor, key: Tensor, value: Tensor, axes: Any, mask: Any, scale: float, tile: Any) -> Tensor:
    if tile is not None and mask is None and (blocks := _blocks(axes, tile)) is not None:
        regions = Regions(tuple(axis.length for axis in axes), tuple(tile))
        laid = [regions.laid_out(t).flatten(2, 3) for t in (query, key, value)]
        found = attend_blocks(laid[0], laid[1], laid[2], blocks, causal=False, mask=None, scale=scale)
        return regions.back(found.unflatten(2, (-1, blocks.key_size)))
    if not runs_native(query) or not scale > 0 or tile is not None or not query.numel():
        return _over_tiles(query, key, value, axes, mask, scale, tile or TILES[len(axes)])
    if len(axes) == 1:
        return _line(query, key, value, axes[0], mask, scale)
    return _boxes(query, key, value, [axis.side() for axis in axes], mask, scale)


def _blocks(axes: Sequence[Axis], tile: Sequence[int]) -> Blocks | None:
    """Which tiles of keys each tile of queries sees, where these are whole and all of it; None: they are not."""
    chosen, tokens = torch.ones(1, 1), math.prod(tile)
    for axis, size in zip(axes, tile, strict=True):
        if axis.length % size or len(axis.at) != axis.length or tokens % 32:
            return None
        ends = torch.stack([axis.first, axis.first + axis.number]).unflatten(1, (-1, size))
        if (ends % size).any() or (ends != ends[..., :1]).any():
            return None
        first, stop = ends[..., 0] // size
        at = torch.arange(axis.length // size)
        chosen = torch.kron(chosen, ((at >= first[:, None]) & (at < stop[:, None])).float())
    return Blocks(*listed(chosen.bool()[None, None]), tokens, tokens)


def _boxes(query: Tensor, key: Tensor, value: Tensor, sides: list[grid.Side], mask: Any, scale: float) -> Tensor:
    there = None if mask is None else mask.flatten(1)
    return grid.attention(query, key, value, sides, scale=scale, there=there)


def _line(query: Tensor, key: Tensor, value: Tensor, axis: Axis, mask: Any, scale: float) -> Tensor:
    """On a line the kernel's own windows do: those that end at a query are those around one further back."""
    first, stop = axis.first, axis.first + axis.number
    ahead = stop - torch.arange(len(stop))
    middle = (ahead == ahead.mode().values).nonzero().flatten()
    a, b = int(middle[0]), int(middle[-1]) + 1
    window = int((stop - first)[a:b].max())
    low = int(first[a])
    if len(middle) < b - a or not torch.equal(first[a:b], (stop[a:b] - window).clamp_min(low)) or window < 1:
        return _boxes(query, key, value, [axis.side()], mask, scale)

    def part(rows: slice, keys: slice, **limits: Any) -> Tensor:
        seen = None if mask is None else mask[..., keys]
        return native.attention(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask=seen, scale=scale, **limits)

    found = []
    for rows in (slice(0, a), slice(a, b), slice(b, len(stop))):
        if rows.start == rows.stop:
            continue
        f, s = first[rows], stop[rows]
        if rows.start == a:
            found.append(part(rows, slice(low, int(s[-1])), causal=True, window=window))
        elif bool((f == f[0]).all() and (s == s[0]).all() and s[0] > f[0]):
            found.append(part(rows, slice(int(f[0]), int(s[0]))))
        else:
            side = grid.Side(f, s, axis.length)
            found.append(_boxes(query[:, :, rows], key, value, [side], mask, scale))
    return torch.cat(found, 2) if len(found) > 1 else found[0]


def _over_tiles(query: Tensor, key: Tensor, value: Tensor, axes: Any, mask: Any, scale: float, tile: Any) -> Tensor:
    cut = [tuple(t.to(query.device) for t in a.tiles(size)) for a, size in zip(axes, tile, strict=True)]
    counts = [len(at) for at, _, _ in cut]
    n_key = math.prod(of[1].shape[1] for of in cut)
    each = len(key) * key.shape[1] * n_key * (key.shape[-1] + value.shape[-1])
    numbers, parts, places = torch.arange(math.prod(counts), device=query.device), [], []
    # Tiles whose queries see all of their keys need no mask, and go first.
    full = torch.ones(1, dtype=torch.bool, device=query.device)
    for _, _, seen in cut:
        full = (full[:, None] & seen.all(-1).all(-1)).flatten()
    for which in (some for group in (numbers[full], numbers[~full]) for some in group.split(max(1, SPACE // each))):
        if not len(which):
            continue
        of = torch.unravel_index(which, counts)
        at = _joined([rows[i] for (rows, _, _), i in zip(cut, of, strict=True)], [len(a.at) for a in axes])
        keys = _joined([columns[i] for (_, columns, _), i in zip(cut, of, strict=True)], [a.length for a in axes])
        seen = torch.ones(len(which), 1, 1, dtype=torch.bool, device=query.device)
        for (_, _, pairs), i in zip(cut, of, strict=True):
            seen = (seen[:, :, None, :, None] & pairs[i][:, None, :, None]).flatten(3, 4).flatten(1, 2)
        parts.append(recomputed(_tiles, query, key, value, at, keys, seen, mask, scale))
        places.append(at.flatten())
    place = torch.cat(places)
    of_query = torch.empty(query.shape[2], dtype=torch.long, device=query.device)
    of_query[place] = torch.arange(len(place), device=query.device)
    return torch.cat(parts, 2).index_select(2, of_query)


def _joined(positions: list[Tensor], lengths: list[int]) -> Tensor:
    """Positions [tile, ...] along each axis as tokens [tile, all of them]."""
    token = positions[0]
    for length, position in zip(lengths[1:], positions[1:], strict=True):
        token = (token[:, :, None] * length + position[:, None]).flatten(1)
    return token


def _tiles(query: Tensor, key: Tensor, value: Tensor, at: Tensor, keys: Tensor, seen: Tensor, mask: Any, scale: float):
    """Output of the queries `at` [tile, query], tile after tile. [batch, head, query, dim]"""
    batch, heads = len(query), query.shape[1]

    def laid_out(tensor: Tensor, which: Tensor) -> Tensor:  # [batch * tile, head, position, dim]
        return tensor.index_select(2, which.flatten()).unflatten(2, which.shape).transpose(1, 2).flatten(0, 1)

    pairs: Tensor | None = None
    if mask is not None or not seen.all():
        every = seen[None] if mask is None else seen & mask[:, 0, 0, keys][:, :, None]  # [batch|1, tile, query, key]
        pairs = every.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    query, key, value = laid_out(query, at), laid_out(key, keys), laid_out(value, keys)
    if runs_native(query) and not transformed(query, key, value):
        output = attend_whole(query, key, value, causal=False, mask=pairs, scale=scale)
    else:
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(exact) @ by_head(key, heads).to(exact).mT * scale
        output = (softmax(scores, pairs) @ by_head(value, heads).to(exact)).to(value.dtype)
    return output.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
