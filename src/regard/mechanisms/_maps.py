"""What blocks on feature maps [batch, channel, row, column] share: their checks, pooling, softmax over positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def checked(block: str, x: Tensor, channels: int | None = None, *, least: int = 1) -> None:
    """Raise ValueError where `x` is no feature map of so many channels and at least so many rows and columns."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{block}: takes feature maps [batch, channel, row, column]; got {type(x).__name__}")
    if x.ndim != 4:
        hint = "; tokens of a picture become one by tokens.mT.unflatten(-1, (rows, columns))" if x.ndim == 3 else ""
        raise ValueError(f"{block}: takes feature maps [batch, channel, row, column]; got {list(x.shape)}{hint}")
    if not x.is_floating_point():
        raise ValueError(f"{block}: takes floating-point feature maps; got {x.dtype}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{block}: was made for {channels} channels; got a feature map {list(x.shape)}")
    if min(x.shape[2:]) < least:
        raise ValueError(f"{block}: needs {least} or more rows and columns; got a feature map {list(x.shape)}")


def shared_out(block: str, channels: int, parts: int, what: str) -> int:
    """Channels of each of `parts`. ValueError where they do not divide evenly; `what`: the knob's name."""
    if parts < 1 or channels < 1 or channels % parts:
        raise ValueError(f"{block}: {channels} channels do not divide evenly by {what}={parts}")
    return channels // parts


def over_positions(logits: Tensor) -> Tensor:
    """Softmax over all positions of each plane, taken in float32 at least. [batch, plane, row, column]"""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.flatten(2).softmax(-1, dtype=exact).to(logits.dtype).view_as(logits)


def largest_and_mean(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Over one axis, which keeps the length 1. The gradient of the largest goes to one place, also among equals."""
    # without a gradient there is no need of places, which take their time
    largest = x.max(axis, keepdim=True).values if x.requires_grad else x.amax(axis, keepdim=True)
    return largest, x.mean(axis, keepdim=True)


def pointwise(channels: int, out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=bias)


def depthwise(channels: int, size: int | tuple[int, int], *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """One filter a channel, padded so that the map keeps its size."""
    rows, columns = (size, size) if isinstance(size, int) else size
    padding = dilation * (rows - 1) // 2, dilation * (columns - 1) // 2
    return nn.Conv2d(
        channels, channels, (rows, columns), padding=padding, dilation=dilation, groups=channels, bias=bias
    )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def per_channel(values: Tensor) -> Tensor:
    """Numbers of channels as they multiply a feature map. [channel, 1, 1]"""
    return values.view(-1, 1, 1)
