"""Attention of each token to its nearest neighbours on a line, in a picture or in a video.

Hassani et al., Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level
(arXiv:2403.04690), section 3; borders, dilation and causal axes as in the authors' library, NATTEN.

Along each axis a token sees `window` tokens, itself in the middle; at a border the window is shifted inside, not cut,
so that every token has as many neighbours. With dilation, neighbours are that far apart, and windows are shifted among
the tokens of the same remainder. Along a causal axis a token sees the window that ends with it, cut at the border.

The paper's fused kernel is ours in this: neighbouring queries are worked on together, and scores are never stored
whole. Window and dilation are 7 and 1, those of the authors' vision models; the paper
has no default. Deviations: an axis shorter than its window is seen whole, where NATTEN refuses; where a mask says which
keys there are, the axes that are not causal end with the outermost keys, so that padding changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    dilation: Axes = 1,
) -> list[Window]:
    shape = (n_key,) if shape is None else tuple(shape)
    sizes, steps, pasts = windows.given("neighborhood", shape, window=window, dilation=dilation, causal=causal)
    if min(*sizes, *steps) < 1:
        raise ValueError(f"neighborhood: window and dilation are 1 or more; got {window=}, {dilation=}")
    windows.whole("neighborhood", shape, n_key)
    rest = math.prod(shape[1:])
    if n_query != n_key and (not pasts[0] or n_query % rest):
        raise ValueError(
            f"neighborhood: fewer queries than keys are the last of a causal first axis, in whole steps of {rest}; got "
            f"{n_query} queries and {n_key} keys, {causal=}"
        )
    firsts = [(n_key - n_query) // rest, *[0] * (len(shape) - 1)]
    return [
        Window(n, w, d, bool(c), first) for n, w, d, c, first in zip(shape, sizes, steps, pasts, firsts, strict=True)
    ]


def _weights(query: Tensor, key: Tensor, *, causal: Any, mask: Tensor | None, scale: float | None, **knobs: Any):
    axes = _axes(query.shape[2], key.shape[2], causal, **knobs)
    return windows.weights(query, key, axes, mask, scale_of(query, scale))


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool | Sequence[bool] = False, **knobs: Any) -> Cost:
    return windows.cost(_axes(n_query, n_key, causal, **knobs), n_query, dim)


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

        >>> import torch
        >>> x = torch.randn(1, 4, 32 * 32, 64)
        >>> neighborhood(x, x, x, shape=(32, 32), window=7).shape
        torch.Size([1, 4, 1024, 64])
    """
    axes = _axes(query.shape[2], key.shape[2], causal, shape, window, dilation)
    return windows.windowed(query, key, value, axes, mask, scale_of(query, scale))
