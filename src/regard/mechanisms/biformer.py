"""Attention of the regions of a picture to the few regions that fit them best.

Zhu et al., BiFormer: Vision Transformer with Bi-Level Routing Attention (arXiv:2303.08810), section 3.2, with the local
convolution of values of section 3.3 in the layer. Scales and options are those of the authors' code.

A picture is cut into regions. The mean query of each, over all heads together, picks the `top` regions whose mean keys
fit best, one choice for all heads, and each token of the region attends to all tokens of these. Nothing forces a region
to pick itself. Routing gets no gradient. Scores are scaled by the root of the width of all heads together, as in the
code; a transformers model passes its own scale.
Deviation: where regions do not divide the picture, the last ones are smaller; the authors pad the picture with zeros
that take part, which padding="zeros" does. Left out: soft routing, and pooling of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.native import Blocks
from . import _windows as windows
from ._blocks import attend
from ._mechanism import Cost, by_head, mechanism, softmax
from ._windows import Axes, Regions


@torch.no_grad()
def route(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    shape: Sequence[int] | None = None,
    regions: Axes = 7,
    size: Axes | None = None,
    top: int = 4,
) -> Tensor:
    """The regions that each region attends to, best first. [batch, 1, region, top]

    query: [batch, head, token, dim]; key: [batch, kv_head, token, dim]; mask: which keys there are.
    """
    cut, heads = _cut(key.shape[2], shape, regions, size), query.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    means = []
    for x in (query, by_head(key, heads)):
        there = torch.ones(1, 1, key.shape[2], 1, dtype=torch.bool, device=x.device) if mask is None else mask.mT
        number = cut.laid_out(there.to(exact)).sum(3)
        total = cut.laid_out(x.where(there, 0.0)).sum(3, dtype=exact) / number.clamp_min(1)
        means.append((total.transpose(1, 2).flatten(2), number[:, 0, :, 0]))
    (of_query, _), (of_key, number) = means
    scores = (of_query @ of_key.mT).masked_fill((number == 0)[:, None], float("-inf"))
    return scores.topk(min(top, scores.shape[-1]), dim=-1).indices[:, None]


def _graph(query: Tensor, key: Tensor, mask: Tensor | None, cut: Regions, graph: Tensor | None, top: int) -> Tensor:
    n, heads = math.prod(cut.number), query.shape[1]
    if top < 1:
        raise ValueError(f"biformer: a region takes 1 region or more; got {top=}")
    if graph is None:
        return route(query, key, mask=mask, shape=cut.shape, size=cut.size, top=top)
    fits = graph.ndim == 4 and len(graph) in (1, len(query)) and graph.shape[1] in (1, heads) and graph.shape[2] == n
    if not fits or graph.is_floating_point() or graph.min() < 0 or graph.max() >= n:
        raise ValueError(
            f"biformer: graph is of numbers of the {n} regions, [batch|1, head|1, {n}, top]; got {list(graph.shape)} "
            f"of {graph.dtype}"
        )
    if (graph.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError("biformer: graph names each region once at most for a region")
    return graph


def _cut(n: int, shape: Sequence[int] | None, regions: Axes, size: Axes | None) -> Regions:
    shape = (n,) if shape is None else tuple(shape)
    windows.whole("biformer", shape, n)
    (given,) = windows.given(
        "biformer", shape, **{"regions" if size is None else "size": regions if size is None else size}
    )
    if min(given) < 1:
        raise ValueError(f"biformer: 1 region or more, of 1 token or more; got {regions=}, {size=}")
    sizes = given if size is not None else tuple(-(-n // g) for n, g in zip(shape, given, strict=True))
    return Regions(shape, sizes)


def _scale(query: Tensor, scale: float | None) -> float:
    return (query.shape[1] * query.shape[-1]) ** -0.5 if scale is None else scale


def _weights(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
    shape: Sequence[int] | None = None,
    regions: Axes = 7,
    size: Axes | None = None,
    top: int = 4,
    graph: Tensor | None = None,
) -> Tensor:
    cut = _cut(key.shape[2], shape, regions, size)
    graph = _graph(query, key, mask, cut, graph, top)
    of_token = torch.zeros(1, 1, dtype=torch.long, device=query.device)
    for n, s, number in zip(cut.shape, cut.size, cut.number, strict=True):
        of_token = (of_token[..., None] * number + torch.arange(n, device=query.device) // s).flatten(1)
    taken = torch.zeros(*graph.shape[:3], graph.shape[2], dtype=torch.bool, device=query.device)
    seen = taken.scatter_(-1, graph, True)[:, :, of_token[0]][..., of_token[0]]
    scores = query @ by_head(key, query.shape[1]).mT * _scale(query, scale)
    return softmax(scores, seen if mask is None else seen & mask)


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool = False,
    shape: Sequence[int] | None = None,
    regions: Axes = 7,
    size: Axes | None = None,
    top: int = 4,
    graph: Tensor | None = None,
) -> Cost:
    cut = _cut(n_key, shape, regions, size)
    number, tokens = math.prod(cut.number), math.prod(cut.size)
    taken = min(top if graph is None else graph.shape[-1], number) * tokens
    routing = 0 if graph is not None else 2 * dim * number**2
    return Cost(4 * dim * n_query * taken + routing, 2 * dim * (n_query + number * taken))


@mechanism("full", mask="keys", weights=_weights, cost=_cost, whole=True)
def biformer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    regions: Axes = 7,
    size: Axes | None = None,
    top: int = 4,
    graph: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each region of a picture to the `top` regions that fit it best. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the tokens of a grid of this `shape`, the
    last axis running fastest; without shape, a sequence. regions: along each axis, or size: their tokens along each.
    graph: regions that each attends to, [batch|1, head|1, region, top], in place of those that fit best. With all
    regions it is full attention. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where shape, graph
    and tokens do not fit.

        >>> x = torch.randn(1, 4, 56 * 56, 32)
        >>> biformer(x, x, x, shape=(56, 56)).shape
        torch.Size([1, 4, 3136, 32])
    """
    cut = _cut(key.shape[2], shape, regions, size)
    graph = _graph(query, key, mask, cut, graph, top).to(torch.int32)
    there = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask
    tokens = math.prod(cut.size)
    padded = -(-tokens // 32) * 32  # the kernel's blocks of keys are whole multiples of this
    key, value, there = (
        F.pad(cut.laid_out(x), (0, 0, 0, padded - tokens)).flatten(2, 3) for x in (key, value, there.mT)
    )
    counts = torch.full(graph.shape[:3], graph.shape[3], dtype=torch.int32, device=graph.device)
    blocks = Blocks(counts, graph.contiguous(), tokens, padded)
    inside = None if there.all() else there.mT
    found = attend(
        cut.laid_out(query).flatten(2, 3), key, value, blocks, causal=False, mask=inside, scale=_scale(query, scale)
    )
    return cut.back(found.unflatten(2, (-1, tokens)))


class BiLevelRoutingAttention(nn.Module):
    """The layer: projections, bi-level routing, and a depthwise convolution of values. [batch, row, column, dim]

    kernel: of that convolution; 0: none. padding: "masked", or "zeros", with which the picture is padded to whole
    regions before it is projected, so that what was padded is attended to, as by the authors.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        regions: int = 7,
        top: int = 4,
        kernel: int = 5,
        padding: str = "masked",
    ) -> None:
        super().__init__()
        if dim % heads or padding not in ("masked", "zeros") or (kernel and kernel % 2 == 0):
            raise ValueError(
                f"biformer: heads divide dim, kernel is 0 or odd, padding is 'masked' or 'zeros'; got {dim=}, "
                f"{heads=}, {kernel=}, {padding=}"
            )
        self.heads, self.regions, self.top, self.padding = heads, regions, top, padding
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        if self.padding == "zeros":
            x = F.pad(x, (0, 0, 0, -columns % self.regions, 0, -rows % self.regions))
        shape = tuple(x.shape[1:3])
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x.flatten(1, 2)).chunk(3, -1)
        )
        found = biformer(query, key, value, shape=shape, regions=self.regions, top=self.top)
        mixed = found.transpose(1, 2).flatten(2).unflatten(1, shape)
        if self.local is not None:
            grid = value.transpose(1, 2).flatten(2).unflatten(1, shape).permute(0, 3, 1, 2)
            mixed = mixed + self.local(grid).permute(0, 2, 3, 1)
        return self.out(mixed)[:, :rows, :columns]
