"""Attention of the pixels of a picture to a wide, thinned neighbourhood, out of a shadow to what is lit around it.

Regional Attention for Shadow Removal (arXiv:2411.14201), RASM. In the authors' code it is the window of `neighborhood`
with 11 x 11 pixels two apart, for all pixels alike; the shadow is an input channel of their network, which attention
does not see.

Ours: with `lit_only` pixels in the shadow are no keys, but for a query that has no lit pixel in its window, which sees
all of it. Deviation: axes shorter than the window are seen whole. Left out: the network around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _windows as windows
from ._mechanism import Cost, by_head, mechanism, scale_of, softmax
from ._windows import Axes, Window


def _axes(n: int, shape: Sequence[int] | None = None, window: Axes = 11, dilation: Axes = 2) -> list[Window]:
    shape = (n,) if shape is None else tuple(shape)
    sizes, steps = windows.given("regional_attention", shape, window=window, dilation=dilation)
    if min(*sizes, *steps) < 1:
        raise ValueError(f"regional_attention: window and dilation are 1 or more; got {window=}, {dilation=}")
    windows.whole("regional_attention", shape, n)
    return [Window(n, w, d, False) for n, w, d in zip(shape, sizes, steps, strict=True)]


def _region(key: Tensor, region: Tensor | None, lit_only: bool) -> Tensor | None:
    """Which keys are in the shadow, where that counts. [batch|1, 1, 1, key]"""
    if region is None:
        if lit_only:
            raise ValueError("regional_attention: lit_only needs region, which pixels are in the shadow")
        return None
    if (
        region.dtype != torch.bool
        or region.ndim != 2
        or region.shape[1] != key.shape[2]
        or len(region) not in (1, len(key))
    ):
        raise ValueError(
            f"regional_attention: region is boolean [batch, token] = {[len(key), key.shape[2]]}, True in the shadow; "
            f"got {list(region.shape)} of {region.dtype}"
        )
    return region[:, None, None] if lit_only else None


def _weights(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
    region: Tensor | None = None,
    lit_only: bool = False,
    **knobs: Any,
) -> Tensor:
    axes, dark = _axes(key.shape[2], **knobs), _region(key, region, lit_only)
    scale = scale_of(query, scale)
    if dark is None:
        return windows.weights(query, key, axes, mask, scale)
    seen = windows.weights(torch.zeros_like(query), torch.zeros_like(key), axes, mask, 1.0) > 0
    lit = seen & ~dark
    scores = query @ by_head(key, query.shape[1]).mT * scale
    return softmax(scores, torch.where(lit.any(-1, keepdim=True), lit, seen))


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool = False,
    region: Tensor | None = None,
    lit_only: bool = False,
    **knobs: Any,
) -> Cost:
    return windows.cost(_axes(n_key, **knobs), n_query, dim)


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def regional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    window: Axes = 11,
    dilation: Axes = 2,
    region: Tensor | None = None,
    lit_only: bool = False,
) -> Tensor:
    """Softmax attention of each pixel to a wide, thinned neighbourhood. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the pixels of `shape` rows and columns,
    the last axis running fastest; without shape, a sequence. window: pixels seen along each axis; dilation: how far
    apart. region: which pixels are in the shadow, boolean [batch, token]; with lit_only they are not seen where others
    are. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where shape, region and tokens do not fit.

        >>> x = torch.randn(1, 2, 32 * 32, 16)
        >>> regional_attention(x, x, x, shape=(32, 32)).shape
        torch.Size([1, 2, 1024, 16])
    """
    axes, scale = _axes(key.shape[2], shape, window, dilation), scale_of(query, scale)
    dark = _region(key, region, lit_only)
    found = windows.windowed(query, key, value, axes, mask, scale)
    if dark is None:
        return found
    # With scores of 0 the output is the share of what is lit; borders are those of the keys that there are.
    lit, parts = (~dark).expand(len(key), -1, -1, -1), windows.boxed(axes, mask)
    zero = query.new_zeros(len(key), 1, key.shape[2], 1)
    share = windows.windowed(zero, zero, lit.mT.to(query.dtype), axes, mask, 1.0)
    inside = lit if mask is None else lit & mask
    out = []
    for row in range(len(key)):
        own = next(axes for rows, axes in parts if rows is None or rows[row % len(rows)])
        few = (t[row, None] for t in (query, key, value))
        out.append(windows.attend(*few, [a.sees() for a in own], mask=inside[row, None], scale=scale))
    return torch.where(share > 0, torch.cat(out), found)
