"""Causal softmax attention of each query to its own key block and to others of its choice, at the cost of these.

Queries that chose a block are brought together, so that its keys meet many of them at once; what a query got from each
of its blocks is then joined by the log-sum-exp of each, which is the softmax over all.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.derivatives import again, gradients, transformed
from ..kernels.native import Blocks
from ._blocks import held
from ._mechanism import by_head, recomputed
from ._softmax import runs_native

TILE = 48  # queries that are worked on together: what the kernel takes at once
SPACE = 2**22  # scores held at once where the kernel does not serve


def attend(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, *, block: int, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention to the own block as far as causality lets it, and to the chosen ones. [batch, head, query, dim]

    The queries are the last of the keys. chosen: [batch, head, query, slot], numbers of blocks before the own one, each
    once; -1: none. block: keys. mask: which keys there are, [batch|1, 1, 1, key].
    """
    block = held(block, key.shape[2])
    if runs_native(query) and block % 32 == 0 and not transformed(query, key, value):
        return _Native.apply(query, key, value, chosen, mask, block, scale)  # type: ignore[no-any-return]
    return _in_torch(query, key, value, chosen, mask, block, scale)


class _Tiles(NamedTuple):
    """Pairs of a query and a block it chose, sorted by block, and cut into tiles of one block each."""

    query: Tensor  # [batch, head, row] the query of each row; tile after tile
    there: Tensor  # [batch, head, row] whether the row is one, and not what is left of a tile
    place: Tensor  # [batch, head, query, slot] the row of each pair
    number: Tensor  # [batch, head] tiles
    block: Tensor  # [batch, head, tile] the block of each
    size: int  # rows of a tile

    @classmethod
    def of(cls, chosen: Tensor, n_block: int) -> _Tiles:
        slots, n_pair = chosen.shape[3], chosen.shape[2] * chosen.shape[3]
        size = max(1, min(TILE, n_pair // n_block))  # few queries: no tile could be full
        flat = chosen.flatten(2)
        flat = flat.where(flat >= 0, n_block)  # the last list is of what was not chosen
        block, order = flat.sort(dim=-1, stable=True)
        held = torch.zeros(*flat.shape[:2], n_block + 1, dtype=torch.long, device=flat.device)
        held.scatter_add_(-1, flat, torch.ones_like(flat))
        tiles = -(-held // size)
        last_tile, first = tiles.cumsum(-1), held.cumsum(-1) - held
        number = last_tile[..., -2]
        rows = int(number.max()) * size
        place = (last_tile - tiles).gather(-1, block) * size + torch.arange(n_pair, device=flat.device)
        place = (place - first.gather(-1, block)).where(block < n_block, rows)
        query = torch.full((*flat.shape[:2], rows + 1), -1, device=flat.device).scatter_(-1, place, order // slots)
        at = torch.arange(rows // size, device=flat.device).expand(*flat.shape[:2], -1).contiguous()
        of = torch.searchsorted(last_tile[..., :-1].contiguous(), at, right=True).clamp_max(n_block - 1)
        place = torch.empty_like(place).scatter_(-1, order, place).unflatten(-1, chosen.shape[2:])
        return cls(query[..., :-1].clamp_min(0), query[..., :-1] >= 0, place, number, of, size)

    def listed(self, block: int) -> Blocks:
        at = torch.arange(self.block.shape[-1], device=self.block.device)
        return Blocks((at < self.number[..., None]).int(), self.block[..., None].int(), self.size, block)


def _take(tensor: Tensor, at: Tensor) -> Tensor:
    """Rows `at` [batch, head, row] of a tensor [batch, head, row, ...]."""
    start = torch.arange(at.shape[0] * at.shape[1], device=at.device).view(*at.shape[:2], 1) * tensor.shape[2]
    return tensor.flatten(0, 2).index_select(0, (at + start).flatten()).unflatten(0, at.shape)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, mask: Any, *settings: Any):
        block, scale = settings
        output, lse = _own(query, key, value, mask, block, scale)
        tiles = _Tiles.of(chosen, -(-key.shape[2] // block))
        if tiles.query.numel():
            rows = _take(query, tiles.query)
            parts, logs = native.part(rows, key, value, mask=mask, scale=scale, blocks=tiles.listed(block))
            spots = [(s.clamp_max(parts.shape[2] - 1), chosen[..., i] < 0) for i, s in enumerate(tiles.place.unbind(3))]
            each = torch.stack([lse, *(_take(logs, s).masked_fill_(none, float("-inf")) for s, none in spots)])
            lse = each.logsumexp(0)
            weights = (each - lse.clamp_min(torch.finfo(lse.dtype).min)).exp_()[..., None]
            output = output.mul_(weights[0])
            for weight, (spot, _) in zip(weights[1:], spots, strict=True):
                output.addcmul_(_take(parts, spot), weight)
        ctx.settings, ctx.size = settings, tiles.size
        ctx.save_for_backward(query, key, value, chosen, mask, output, lse, *tiles[:5])
        return output.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        query, key, value, chosen, mask, output, lse, *parts = ctx.saved_tensors
        tiles, (block, scale) = _Tiles(*parts, size=ctx.size), ctx.settings
        if again(grad):
            plain = partial(_in_torch, block=block, scale=scale)
            return *gradients(plain, grad, query, key, value, chosen, mask), None, None
        grads = d_query, d_key, d_value = _own_gradients(query, key, value, output, lse, grad, mask, block, scale)
        if tiles.query.numel():
            logs = _take(lse, tiles.query).masked_fill_(~tiles.there, float("inf"))  # rows left of a tile weigh nothing
            of_rows = (_take(query, tiles.query), key, value, _take(output, tiles.query), logs)
            settings = {"mask": mask, "scale": scale, "blocks": tiles.listed(block)}
            more = native.part_gradients(*of_rows, _take(grad, tiles.query), **settings)
            d_key += more[1]
            d_value += more[2]
            for spot in tiles.place.unbind(3):
                none = (spot >= more[0].shape[2])[..., None]
                d_query += _take(more[0], spot.clamp_max(more[0].shape[2] - 1)).masked_fill_(none, 0.0)
        return *(g.to(t.dtype) for g, t in zip(grads, (query, key, value), strict=True)), None, None, None, None


def _stretches(n_query: int, n_key: int, block: int) -> list[tuple[slice, slice, Blocks | None]]:
    """Queries, their own keys, and the blocks of both: queries that begin inside a block end it first."""
    first = n_key - n_query
    border = min(-(-first // block) * block, n_key)
    found: list[tuple[slice, slice, Blocks | None]] = []
    if first < border:
        found.append((slice(0, border - first), slice(first // block * block, border), None))
    if border < n_key:
        at = torch.arange(-(-(n_key - border) // block), dtype=torch.int32)[None, None, :, None]
        found.append(
            (slice(border - first, n_query), slice(border, n_key), Blocks((at[..., 0] >= 0).int(), at, block, block))
        )
    return found


def _own(query: Tensor, key: Tensor, value: Tensor, mask: Any, block: int, scale: float) -> tuple[Tensor, Tensor]:
    parts = []
    for rows, keys, blocks in _stretches(query.shape[2], key.shape[2], block):
        seen = None if mask is None else mask[..., keys]
        tensors = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        parts.append(native.part(*tensors, mask=seen, scale=scale, causal=True, blocks=blocks))
    return tuple(torch.cat(p, 2) for p in zip(*parts)) if len(parts) > 1 else parts[0]  # type: ignore[return-value]


def _own_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad: Tensor,
    mask: Any,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (torch.zeros(t.shape) for t in (query, key, value))
    for rows, keys, blocks in _stretches(query.shape[2], key.shape[2], block):
        seen = None if mask is None else mask[..., keys]
        tensors = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        whole = (t[:, :, rows] for t in (output, lse, grad))
        found = native.part_gradients(*tensors, *whole, mask=seen, scale=scale, causal=True, blocks=blocks)
        d_query[:, :, rows], d_key[:, :, keys], d_value[:, :, keys] = found
    return d_query, d_key, d_value


def _in_torch(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, mask: Tensor | None, block: int, scale: float
) -> Tensor:
    first = key.shape[2] - query.shape[2]
    own = (torch.arange(first, key.shape[2], device=query.device) // block)[:, None]
    chosen = torch.cat([chosen, own.expand(*chosen.shape[:3], 1)], -1)
    n_block, n_tile = -(-key.shape[2] // block), max(1, SPACE // (query.shape[0] * query.shape[1] * TILE * block))
    tiles, parts = _Tiles.of(chosen, n_block), []
    for a in range(0, tiles.block.shape[2], n_tile):
        which = slice(a, a + n_tile)
        parts.append(recomputed(_tiles_in_torch, query, key, value, tiles, which, block, mask, scale))
    top, total, mixed = (torch.cat(p, 2) for p in zip(*parts, strict=True))
    spots = [(s.clamp_max(top.shape[2] - 1), chosen[..., i] < 0) for i, s in enumerate(tiles.place.unbind(3))]
    tops = torch.stack([_take(top, s).masked_fill(none, float("-inf")) for s, none in spots])
    shares = (tops - tops.amax(0).clamp_min(torch.finfo(tops.dtype).min)).exp()
    sums = torch.stack([_take(total, s) for s, _ in spots]).mul(shares).sum(0)
    output = torch.stack([_take(mixed, s) for s, _ in spots]).mul(shares[..., None]).sum(0)
    return (output / sums.where(sums > 0, 1.0)[..., None]).to(value.dtype)


def _tiles_in_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: _Tiles,
    which: slice,
    block: int,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of these tiles: its largest score, the sum of weights against that, and the values so weighted."""
    exact, heads, n_key = torch.promote_types(query.dtype, torch.float32), query.shape[1], key.shape[2]
    of = tiles.block[:, :, which]
    rows = tiles.query[:, :, which.start * tiles.size : (which.start + of.shape[2]) * tiles.size]
    position = (rows + n_key - query.shape[2]).unflatten(2, (-1, tiles.size))
    at = of[..., None] * block + torch.arange(block, device=of.device)  # [batch, head, tile, key]
    seen = (at < n_key)[..., None, :] & (at[..., None, :] <= position[..., None])
    at = at.clamp_max(n_key - 1)
    if mask is not None:
        there = mask[:, 0, 0].expand(len(query), -1)[:, None, None].expand(*at.shape[:3], -1)
        seen = seen & there.gather(-1, at)[..., None, :]
    keys, values = (_take(by_head(t, heads), at.flatten(2)).to(exact).unflatten(2, (-1, block)) for t in (key, value))
    asked = _take(query, rows).to(exact).unflatten(2, (-1, tiles.size))
    scores = (asked @ keys.mT * scale).masked_fill(~seen, float("-inf"))
    top = scores.amax(-1).detach()
    weights = (scores - top.clamp_min(torch.finfo(exact).min)[..., None]).exp()
    return top.flatten(2), weights.sum(-1).flatten(2), (weights @ values).flatten(2, 3)
