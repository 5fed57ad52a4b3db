"""Windows that neighbouring queries share, from sliding to blocked, and what speedup they can have.

Hassani et al., Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light
(arXiv:2504.16922), section 3; the simulator: appendix B.1. Who sees whom as in the authors' library, NATTEN.

Along each axis `stride` neighbouring queries share a window, that of the one in their middle (of an even number, the
right one); along a causal axis that of the last, and none sees beyond itself. Stride 1 is `neighborhood`, stride =
window is attention in blocks. Window and dilation are 7 and 1, as there. Deviations: the same; a window that reaches
beyond its axis is refused with strides only; there are no extra keys that everybody sees. Causal windows with a stride
depend on how many tokens come later, so with them all keys have their queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _windows as windows
from ._mechanism import Cost, mechanism, scale_of
from ._windows import Axes, Window


def _axes(
    n_query: int,
    n_key: int,
    causal: bool | Sequence[bool],
    shape: Sequence[int] | None = None,
    window: Axes = 7,
    stride: Axes = 1,
    dilation: Axes = 1,
) -> list[Window]:
    shape = (n_key,) if shape is None else tuple(shape)
    sizes, together, steps, pasts = windows.given(
        "gna", shape, window=window, stride=stride, dilation=dilation, causal=causal
    )
    if min(*sizes, *together, *steps) < 1:
        raise ValueError(f"gna: window, stride and dilation are 1 or more; got {window=}, {stride=}, {dilation=}")
    if any(s > w or (s > 1 and w * d > n) for n, w, s, d in zip(shape, sizes, together, steps, strict=True)):
        raise ValueError(
            f"gna: a stride is at most the window, and with one the window, times its dilation, lies within the axis; "
            f"got {shape=}, {window=}, {stride=}, {dilation=}"
        )
    windows.whole("gna", shape, n_key)
    rest = math.prod(shape[1:])
    if n_query != n_key and (not pasts[0] or n_query % rest or together[0] > 1):
        raise ValueError(
            f"gna: fewer queries than keys are the last of a causal first axis with stride 1, in steps of {rest}; "
            f"got {n_query} queries and {n_key} keys, {causal=}, {stride=}"
        )
    firsts = [(n_key - n_query) // rest, *[0] * (len(shape) - 1)]
    each = zip(shape, sizes, steps, pasts, firsts, together, strict=True)
    return [Window(n, w, d, bool(c), first, stride=s) for n, w, d, c, first, s in each]


def _weights(query: Tensor, key: Tensor, *, causal: Any, mask: Tensor | None, scale: float | None, **knobs: Any):
    axes = _axes(query.shape[2], key.shape[2], causal, **knobs)
    return windows.weights(query, key, axes, mask, scale_of(query, scale))


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool | Sequence[bool] = False, **knobs: Any) -> Cost:
    return windows.cost(_axes(n_query, n_key, causal, **knobs), n_query, dim)


@mechanism("causal", "full", mask="keys", weights=_weights, cost=_cost)
def gna(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | Sequence[bool] = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    window: Axes = 7,
    stride: Axes = 1,
    dilation: Axes = 1,
) -> Tensor:
    """Softmax attention to windows that `stride` neighbouring queries share. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the tokens of a grid of this `shape`, the
    last of 1 to 3 axes running fastest; without shape, a sequence. window: tokens seen along each axis; stride: queries
    that share it; dilation: how far apart keys are; causal: along which axes only what was before is seen. Each is one
    value, or one for each axis. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where shape and
    tokens do not fit, or a stride is larger than its window.

        >>> x = torch.randn(1, 4, 32 * 32, 64)
        >>> gna(x, x, x, shape=(32, 32), window=16, stride=8).shape
        torch.Size([1, 4, 1024, 64])
    """
    axes = _axes(query.shape[2], key.shape[2], causal, shape, window, stride, dilation)
    return windows.windowed(query, key, value, axes, mask, scale_of(query, scale))


class Bound(NamedTuple):
    """How much faster than full attention a kernel of tiles can be."""

    visited: Tensor  # tiles of keys that each tile of queries needs. [query tile]
    most: int  # of any tile of queries
    total: int  # tiles of keys
    speedup: float  # total / most: the paper's bound, of as many processors as tiles of queries
    throughput: float  # total over the mean of `visited`: of few processors, each with many tiles
    flops: float  # all pairs over those that are visible
    perfect: bool  # nothing that is visited is hidden


def simulate(
    shape: Sequence[int],
    window: Axes,
    stride: Axes = 1,
    *,
    query_tile: Axes,
    key_tile: Axes,
    dilation: Axes = 1,
    causal: bool | Sequence[bool] = False,
    dynamic: bool = False,
    flat: bool = False,
) -> Bound:
    """Count the tiles of keys that each tile of queries needs: the paper's simulator.

    query_tile, key_tile: tokens along each axis; with `flat`, of the tokens in one line. Where `dynamic`, tiles of keys
    begin with the first key that a tile of queries sees, otherwise they lie fixed. Raises ValueError as `gna` does.

        >>> simulate((64,), 24, 8, query_tile=8, key_tile=8).speedup
        2.6666666666666665
    """
    n = math.prod(shape)
    axes = [axis.sees() for axis in _axes(n, n, causal, shape, window, stride, dilation)]
    counts = float(math.prod(int(axis.count.sum()) for axis in axes))
    if flat:
        seen = [windows.pairs(axes)]
        lengths, of_query, of_key = [n], [query_tile], [key_tile]
    else:
        seen, lengths = [axis.seen() for axis in axes], list(shape)
        of_query, of_key = windows.given("gna", shape, query_tile=query_tile, key_tile=key_tile)
    if not all(isinstance(size, int) and size >= 1 for size in (*of_query, *of_key)):
        raise ValueError(f"gna: tiles hold 1 token or more along each axis; got {query_tile=}, {key_tile=}")
    each = [_visited(s, q, k, dynamic) for s, q, k in zip(seen, of_query, of_key, strict=True)]
    visited = torch.tensor([math.prod(v) for v in itertools.product(*(v.tolist() for v, _ in each))])
    held = math.prod(float(pairs) for _, pairs in each)
    total, most = math.prod(-(-n // k) for n, k in zip(lengths, of_key, strict=True)), int(visited.max())
    mean = float(visited.double().mean())
    return Bound(visited, most, total, total / most, total / mean, n * n / counts, held == counts)


def _visited(seen: Tensor, query_tile: int, key_tile: int, dynamic: bool) -> tuple[Tensor, int]:
    """Along one axis: tiles of keys for each tile of queries, and pairs of tokens in them."""
    found, pairs = [], 0
    for rows in seen.split(query_tile):
        keys = rows.any(0).nonzero().flatten()
        if dynamic:
            begins = torch.arange(int(keys[0]), int(keys[-1]) + 1, key_tile)
        else:
            begins = (keys // key_tile).unique() * key_tile
        found.append(len(begins))
        pairs += len(rows) * int((begins + key_tile).clamp_max(seen.shape[1]).sub(begins).sum())
    return torch.tensor(found), pairs
