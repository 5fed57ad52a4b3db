"""Attention of blocks of a picture to themselves and a margin around them.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones (arXiv:2103.12731), section 3.1,
with relative positions and strided queries as in timm's layer, since the authors published no code.

All queries of a block share one window of keys, the block and a halo on each side. Positions are biases of the scores:
the product of the query with a learned vector for the row, and one for the column, at which the key lies from it. A
stride keeps every such query of each row and column, and all keys. Block and halo are 8 and 3, timm's.
Deviations: keys outside the picture are masked, where timm has zeros that take part (padding="zeros"); with a stride,
positions are true ones, where timm counts the queries that were kept (true_offsets=False); blocks at the end may be
smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _windows as windows
from ._maps import checked
from ._mechanism import Cost, by_head, mechanism, recomputed, scale_of, softmax
from ._windows import Axis


class Positions(NamedTuple):
    """Vectors of relative rows and columns, each [2 window - 1, dim]; window: block + 2 halo. All heads share them."""

    row: Tensor
    column: Tensor
    true_offsets: bool = True


class _Blocks(NamedTuple):
    shape: tuple[int, ...]
    block: int
    halo: int
    stride: int

    @classmethod
    def of(cls, n: int, shape: Sequence[int] | None, block: int, halo: int, stride: int, bias: Positions | None):
        shape = (n,) if shape is None else tuple(shape)
        if not 1 <= len(shape) <= 2 or block < 1 or halo < 0 or stride < 1 or block % stride:
            raise ValueError(
                f"halonet: shape is of rows and columns, block >= 1, halo >= 0, and stride divides block; got "
                f"{shape=}, {block=}, {halo=}, {stride=}"
            )
        windows.whole("halonet", shape, n)
        cut = cls(shape, block, halo, stride)
        if bias is not None and (len(shape) != 2 or {len(bias.row), len(bias.column)} != {2 * cut.window - 1}):
            raise ValueError(
                f"halonet: bias is of pictures, two tables of {2 * cut.window - 1} vectors, two windows less one; "
                f"got {len(bias.row)} and {len(bias.column)} vectors and {shape=}"
            )
        return cut

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def grid(self) -> tuple[int, ...]:
        """Of queries."""
        return tuple(-(-n // self.stride) for n in self.shape)

    def axes(self) -> list[Axis]:
        found = []
        for n in self.shape:
            at = torch.arange(0, n, self.stride)
            start = at // self.block * self.block
            first = (start - self.halo).clamp_min(0)
            found.append(Axis(n, at, first, (start + self.block + self.halo).clamp_max(n) - first))
        return found

    def kept(self, query: Tensor) -> Tensor:
        """The queries at the stride."""
        if self.stride == 1:
            return query
        cuts = (slice(None, None, self.stride),) * len(self.shape)
        return query.unflatten(2, self.shape)[(slice(None), slice(None), *cuts)].flatten(2, 1 + len(self.shape))


def _biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cut: _Blocks,
    mask: Tensor | None,
    scale: float,
    bias: Positions | None,
    padding: str,
) -> Tensor:
    """With positions, or zeros outside; of queries at the stride. [batch, head, query, dim]"""
    (rows, columns), b, h, heads = cut.shape, cut.block, cut.halo, query.shape[1]
    few = b // cut.stride

    def spread(x: Tensor) -> Tensor:  # [batch, head, row of blocks, column of blocks, key, dim]
        x = F.pad(x.unflatten(2, (rows, columns)), (0, 0, h, h + -columns % b, h, h + -rows % b))
        return x.unfold(2, cut.window, b).unfold(3, cut.window, b).permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)

    q = query.unflatten(2, cut.grid)
    q = F.pad(q, (0, 0, 0, -q.shape[3] % few, 0, -q.shape[2] % few))
    q = q.unflatten(3, (-1, few)).unflatten(2, (-1, few)).transpose(3, 4)  # .., row, column of the block, dim
    scores = q.flatten(4, 5) @ spread(by_head(key, heads)).mT * scale
    if bias is not None:
        step = cut.stride if bias.true_offsets else 1
        window = torch.arange(cut.window, device=query.device)
        at = cut.window - 1 + window - step * torch.arange(few, device=query.device)[:, None]
        by_row = (q @ bias.row.to(q.dtype).mT).gather(-1, at[:, None].expand(*q.shape[:6], -1))
        by_column = (q @ bias.column.to(q.dtype).mT).gather(-1, at.expand(*q.shape[:6], -1))
        scores = scores + (by_row[..., None] + by_column[..., None, :]).flatten(-2).flatten(4, 5)
    there = torch.ones(1, 1, rows * columns, 1, dtype=torch.bool, device=query.device) if mask is None else mask.mT
    outside = padding == "zeros"  # spread fills what is outside with 0
    there = (spread((there ^ outside).float()).mT > 0) ^ outside
    found = softmax(scores, there) @ spread(by_head(value, heads))
    found = found.unflatten(4, (few, few)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return found[:, :, : cut.grid[0], : cut.grid[1]].flatten(2, 3)


def _weights(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float | None,
    shape: Sequence[int] | None = None,
    block: int = 8,
    halo: int = 3,
    stride: int = 1,
    bias: Positions | None = None,
    padding: str = "masked",
) -> Tensor:
    cut = _Blocks.of(key.shape[2], shape, block, halo, stride, bias)
    if padding != "masked":
        raise ValueError("halonet: with zeros outside the picture, weights of the keys do not sum to 1")
    query = cut.kept(query)
    scores = query @ by_head(key, query.shape[1]).mT * scale_of(query, scale)
    if bias is not None:
        apart = []
        for table, length, number in zip(bias[:2], cut.shape, cut.grid, strict=True):
            at = torch.arange(number, device=query.device)
            first = at * stride // block * block - halo
            start = at * stride % block if bias.true_offsets else at % (block // stride)  # from the block's corner
            offset = torch.arange(length, device=query.device) - first[:, None] - start[:, None] + cut.window - 1
            vectors = table.to(query.dtype)[offset.clamp(0, len(table) - 1)]  # what is beyond is not seen
            apart.append(vectors)
        grid = query.unflatten(2, cut.grid)
        by_row, by_column = (
            torch.einsum("bhrcd,rkd->bhrck", grid, apart[0]),
            torch.einsum("bhrcd,ckd->bhrck", grid, apart[1]),
        )
        scores = scores + (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
    seen = windows.pairs(cut.axes()).to(query.device)
    return softmax(scores, seen[None, None] if mask is None else seen & mask)


def _cost(
    n_query: int,
    n_key: int,
    dim: int,
    *,
    causal: bool = False,
    shape: Sequence[int] | None = None,
    block: int = 8,
    halo: int = 3,
    stride: int = 1,
    bias: Positions | None = None,
    padding: str = "masked",
) -> Cost:
    seen, taken, kept = 1.0, 1.0, 1.0
    for axis in _Blocks.of(n_key, shape, block, halo, stride, bias).axes():
        seen *= float(axis.number.sum())
        taken *= float(axis.number[:: block // stride].sum())
        kept *= len(axis.at)
    return Cost(4 * dim * seen, 2 * dim * (kept + taken))


@mechanism("full", mask="keys", weights=_weights, cost=_cost)
def halonet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    block: int = 8,
    halo: int = 3,
    stride: int = 1,
    bias: Positions | None = None,
    padding: str = "masked",
) -> Tensor:
    """Softmax attention of each block of a picture to itself and a margin. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], the tokens of `shape` rows and columns,
    columns running fastest; without shape, a sequence. block: tokens on a side; halo: the margin; stride: every such
    row and column of queries is kept, and the output has these alone. bias: `Positions`. padding: "masked", or "zeros":
    what is outside the picture takes part. mask: which keys there are, [batch, 1, 1, key]. Raises ValueError where
    shape and tokens, or block and stride, do not fit.

        >>> x = torch.randn(1, 4, 32 * 32, 64)
        >>> halonet(x, x, x, shape=(32, 32), stride=2).shape
        torch.Size([1, 4, 256, 64])
    """
    cut = _Blocks.of(key.shape[2], shape, block, halo, stride, bias)
    return _halo(cut.kept(query), key, value, cut, mask, scale_of(query, scale), bias, padding)


def _halo(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cut: _Blocks,
    mask: Tensor | None,
    scale: float,
    bias: Positions | None,
    padding: str,
) -> Tensor:
    if padding not in ("masked", "zeros") or (padding == "zeros" and len(cut.shape) != 2):
        raise ValueError(f"halonet: padding is 'masked', or of a picture 'zeros'; got {padding!r} and {cut.shape}")
    if bias is not None or padding == "zeros":
        return recomputed(_biased, query, key, value, cut, mask, scale, bias, padding).to(value.dtype)
    few = cut.block // cut.stride
    tile = (few,) * len(cut.shape) if few ** len(cut.shape) >= 16 else None  # else windows hardly share keys
    return windows.attend(query, key, value, cut.axes(), mask=mask, scale=scale, tile=tile)


class HaloAttention(nn.Module):
    """The layer, with positions and without an output projection. [batch, dim, row, column]

    dim, dim_out: channels; dim_head: of a head's queries and keys. average: attend at every position, then take
    means of 2 x 2. scaled_bias: positions are scaled as scores are. padding, true_offsets: see the module.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        dim_out: int | None = None,
        dim_head: int | None = None,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        qkv_bias: bool = False,
        average: bool = False,
        scaled_bias: bool = False,
        padding: str = "masked",
        true_offsets: bool = True,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        dim_head = dim_head or dim_out // heads
        if dim_out % heads or stride not in (1, 2):
            raise ValueError(f"halonet: heads divide dim_out, stride is 1 or 2; got {heads=}, {dim_out=}, {stride=}")
        self.heads, self.dim_head, self.block, self.halo = heads, dim_head, block, halo
        self.average = average and stride > 1
        self.stride = 1 if self.average else stride
        self.scaled_bias, self.padding, self.true_offsets = scaled_bias, padding, true_offsets
        self.q = nn.Conv2d(dim, heads * dim_head, 1, stride=self.stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, heads * dim_head + dim_out, 1, bias=qkv_bias)
        number = 2 * (block + 2 * halo) - 1
        self.row, self.column = (nn.Parameter(torch.randn(number, dim_head) * dim_head**-0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        checked("HaloAttention", x, self.q.in_channels)
        query = self.q(x).unflatten(1, (self.heads, -1)).flatten(3).mT
        key, value = self.kv(x).unflatten(1, (self.heads, -1)).flatten(3).mT.tensor_split([self.dim_head], -1)
        scale = self.dim_head**-0.5
        by = scale if self.scaled_bias else 1.0
        bias = Positions(self.row * by, self.column * by, self.true_offsets)
        cut = _Blocks.of(key.shape[2], tuple(x.shape[2:]), self.block, self.halo, self.stride, bias)
        found = _halo(query, key, value, cut, None, scale, bias, self.padding)
        found = found.mT.flatten(1, 2).unflatten(2, cut.grid)
        return F.avg_pool2d(found, 2) if self.average else found
