"""Pictures cut into windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def grid(asked_by: str, shape: Sequence[int] | None, tokens: int, window: int = 1) -> tuple[int, int]:
    """Rows and columns; without shape, one row. ValueError where they are not those of the tokens."""
    shape = (1, tokens) if shape is None else tuple(shape)
    if len(shape) != 2 or math.prod(shape) != tokens:
        raise ValueError(
            f"{asked_by}: shape {tuple(shape)} does not hold {tokens} tokens in rows and columns; tokens that stand "
            f"outside the picture, such as a class token, belong elsewhere"
        )
    if window < 1:
        raise ValueError(f"{asked_by}: a window is 1 or more; got {window=}")
    return shape[0], shape[1]


def group(tensor: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """[batch, head, token, dim] as [batch * window, head, place, dim]; zeros beyond the last row and column."""
    rows, columns = shape
    tall, wide = _sides(shape, window)
    picture = tensor.unflatten(2, (rows, columns))
    down, right = -rows % tall, -columns % wide
    if down or right:
        picture = F.pad(picture, (0, 0, 0, right, 0, down))
    cut = picture.unflatten(3, (-1, wide)).unflatten(2, (-1, tall))  # batch head row tall column wide dim
    return cut.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def ungroup(tensor: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """Undo `group`."""
    rows, columns = shape
    tall, wide = _sides(shape, window)
    down, right = -(-rows // tall), -(-columns // wide)
    cut = tensor.unflatten(0, (-1, down, right)).unflatten(4, (tall, wide))
    picture = cut.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return picture[:, :, :rows, :columns].flatten(2, 3)


def _sides(shape: Sequence[int], window: int) -> tuple[int, int]:
    """A line has windows of one row; a picture smaller than its window is one."""
    return min(window, shape[0]), min(window, shape[1])
