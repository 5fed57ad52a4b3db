"""Windows whose size and place each head learns: queries stay in theirs, keys come from a rectangle that is predicted.

Zhang et al., VSA: Learning Varied-Size Window Attention in Vision Transformers (arXiv:2204.08446), section 3; details
from the authors' code. The mean of a window gives, for each head, a scale s and a move o of columns and rows. With c
the window's centre and d a place's distance from it, in units in which the padded picture reaches from -1 to 1, the
place's key and value are read at c + d (1 + s) + o / (windows that the picture holds whole), between pixels
bilinearly, zeros outside. Scores get Swin's bias by place in the window, wherever it was moved.

The maps that predict start at 0, so training starts from plain windows. The pictures' sides need not be known before.
Left out: the paper's position encoding by a convolution before it. Refused: pictures smaller than a window (the
authors' code divides by 0 there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import register
from ._layers import exchanged, fill, not_causal, square
from ._maps import checked
from ._mechanism import Cost, scale_of
from ._modules import module
from ._pictures import grid


def coordinates(offset: Tensor, scale: Tensor, *, shape: Sequence[int], window: int) -> Tensor:
    """Where each head reads, in units of the padded picture. [batch, head, row, column, 2], column before row

    offset, scale: [batch, head, window row, window column, 2], column before row; shape: rows and columns unpadded.
    """
    found = []
    for axis, n in enumerate(reversed(shape)):
        windows = -(-n // window)
        if n < window or (offset.shape[3 - axis], scale.shape[3 - axis]) != (windows, windows):
            raise ValueError(
                f"varied_size_window: a picture of {tuple(shape)} in windows of {window} needs as many rows and "
                f"columns as a window, and offset and scale of each; got {list(offset.shape)} and {list(scale.shape)}"
            )
        unit = 2 / (windows * window - 1) if windows * window > 1 else 0.0
        place = torch.arange(window, device=offset.device, dtype=offset.dtype) - (window - 1) / 2
        centre = (
            torch.arange(windows, device=offset.device, dtype=offset.dtype) * window + (window - 1) / 2
        ) * unit - 1
        move = offset[..., axis] / (n // window)
        # batch, head, window row, window column, place
        centre = centre[None, :, None] if axis == 0 else centre[:, None, None]
        found.append(centre + place * unit * (1 + scale[..., axis, None]) + move[..., None])
    columns, rows = found
    both = torch.broadcast_tensors(columns[..., None, :], rows[..., None])  # ... place in row, place in column
    at = torch.stack(both, -1)  # batch head wr wc pr pc 2
    return at.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def sample_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: Tensor,
    scale: Tensor,
    *,
    shape: Sequence[int],
    window: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of each window to the rectangle of each head. [batch, head, row, column, dim], of the padded picture

    query, key, value: [batch, head, row, column, dim], padded to whole windows; offset, scale: as `coordinates` takes
    them; shape: rows and columns unpadded. bias: added to scores, [head, query, key] of a window.
    """
    batch, heads, tall, wide, _ = query.shape
    at = coordinates(offset, scale, shape=shape, window=window)
    key, value = (
        F.grid_sample(t.flatten(0, 1).permute(0, 3, 1, 2), at.flatten(0, 1), "bilinear", "zeros", align_corners=True)
        .permute(0, 2, 3, 1)
        .unflatten(0, (batch, heads))
        for t in (key, value)
    )

    def cut(t: Tensor) -> Tensor:  # [batch, window, head, place, dim]
        t = t.unflatten(3, (-1, window)).unflatten(2, (-1, window))
        return t.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)

    query, key, value = (cut(t) for t in (query, key, value))
    scores = query @ key.mT * scale_of(query, None)
    mixed = (scores if bias is None else scores + bias).softmax(-1) @ value
    mixed = mixed.unflatten(3, (window, window)).unflatten(1, (tall // window, wide // window))
    return mixed.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


@module(
    "full",
    takes="map",
    build=lambda dim, heads, shape: VariedSizeWindow(dim, heads, window=max(1, min(7, *(n // 2 for n in shape)))),
)
class VariedSizeWindow(nn.Module):
    """Attention of a picture: [batch, dim, row, column] to [batch, out_dim, row, column].

    window: rows and columns of a window; bias: whether scores get Swin's, by place. `regard.record` sees each window as
    a sequence, whose keys are the places where a head reads, not tokens.

    >>> VariedSizeWindow(8, 2, window=4)(torch.randn(2, 8, 7, 9)).shape
    torch.Size([2, 8, 7, 9])
    """

    is_causal = False

    def __init__(self, dim: int, heads: int, *, window: int = 7, out_dim: int | None = None, bias: bool = True) -> None:
        super().__init__()
        out = out_dim or dim
        if window < 1 or dim % heads or out % heads:
            raise ValueError(
                f"varied_size_window: {heads} heads do not share {dim} and {out} channels, or {window=} < 1"
            )
        self.heads, self.window, self.width = heads, window, dim // heads
        self.qkv, self.proj = nn.Conv2d(dim, 3 * out, 1), nn.Conv2d(out, out, 1)
        self.offsets, self.scales = nn.Conv2d(dim, 2 * heads, 1), nn.Conv2d(dim, 2 * heads, 1)
        for predicting in (self.offsets, self.scales):
            for parameter in predicting.parameters():
                nn.init.zeros_(parameter)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads)) if bias else None
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.02)

    def _padded(self, picture: Tensor) -> Tensor:
        return F.pad(picture, (0, -picture.shape[3] % self.window, 0, -picture.shape[2] % self.window))

    def predicted(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """offset and scale of each window. [batch, head, window row, window column, 2], column before row"""
        mean = F.leaky_relu(F.avg_pool2d(self._padded(picture), self.window))
        offset, scale = (
            module(mean).unflatten(1, (self.heads, 2)).movedim(2, -1) for module in (self.offsets, self.scales)
        )
        return offset, scale

    def rectangles(self, picture: Tensor) -> Tensor:
        """Where heads read: first and last row, first and last column. [batch, head, window row, window column, 4]

        In pixels, which may lie between two or outside.
        """
        offset, scale = self.predicted(picture)
        at = coordinates(offset, scale, shape=picture.shape[2:], window=self.window)
        size = torch.tensor(at.shape[2:4], device=at.device).flip(0)
        at = ((at + 1) / 2 * (size - 1)).unflatten(3, (-1, self.window)).unflatten(2, (-1, self.window))
        first, last = at[:, :, :, 0, :, 0], at[:, :, :, -1, :, -1]  # [batch, head, window row, window column, 2]
        return torch.stack([first[..., 1], last[..., 1], first[..., 0], last[..., 0]], -1)

    def forward(self, picture: Tensor) -> Tensor:
        checked("VariedSizeWindow", picture, self.qkv.in_channels)
        rows, columns = picture.shape[2:]
        offset, scale = self.predicted(picture)
        parts = self._padded(self.qkv(picture)).unflatten(1, (3, self.heads, -1)).movedim(3, -1)
        query, key, value = parts.unbind(1)
        # the authors scale by the width of the input's heads, whatever that of the output's
        query = query * (query.shape[-1] / self.width) ** 0.5
        mixed = sample_window(
            query, key, value, offset, scale, shape=(rows, columns), window=self.window, bias=self._bias()
        )
        return self.proj(mixed.movedim(-1, 2).flatten(1, 2)[..., :rows, :columns])

    def _bias(self) -> Tensor | None:
        if self.bias is None:
            return None
        at = torch.arange(self.window, device=self.bias.device)
        apart = at[:, None] - at + self.window - 1
        index = apart[:, None, :, None] * (2 * self.window - 1) + apart[None, :, None]
        return self.bias[index.flatten(2).flatten(0, 1)].movedim(-1, 0)


register(VariedSizeWindow)


class _OfTokens(nn.Module):
    def __init__(self, module: VariedSizeWindow, shape: Sequence[int]) -> None:
        super().__init__()
        self.module, self.shape = module, shape

    def forward(self, hidden: Tensor) -> Tensor:
        shape = grid("varied_size_window", self.shape, hidden.shape[1])
        return self.module(hidden.mT.unflatten(-1, shape)).flatten(2).mT


def varied_size_window(
    model: nn.Module, *, shape: Sequence[int], window: int = 7, bias: bool = True
) -> Callable[[], None]:
    """Put such windows where every attention of an encoder of pictures is; gives the function that undoes it.

    shape: rows and columns of its tokens, which have to be all of them: a class token has no place in a window.
    Queries, keys, values and outputs keep their weights; what predicts the windows is new, and starts from plain ones.
    Raises ValueError where a layer has no such weights, or the model's tokens do not fit.

        undo = varied_size_window(model, shape=(14, 14))
        undo()
    """
    rows, columns = shape
    of = grid("varied_size_window", shape, rows * columns, window)

    def made(attention: nn.Module, dim: int) -> nn.Module:
        not_causal(attention, "varied_size_window")
        heads, parts = square(attention, dim, "varied_size_window")
        layer = VariedSizeWindow(dim, heads, window=window, bias=bias)
        fill(layer.qkv, *parts[:3])
        fill(layer.proj, parts[3])
        return _OfTokens(layer, of)

    return exchanged(model, made, None, "varied_size_window")


convert = varied_size_window


def cost(n: int, dim: int, *, window: int = 7) -> Cost:
    """Of all heads of a picture of `n` pixels, `dim` channels together, without the projections (8 n dim^2)."""
    return Cost(4 * n * window**2 * dim + 16 * n * dim, 2 * dim * 2 * n + 8 * dim * n)
