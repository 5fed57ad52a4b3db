"""Pictures cut into square windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._windows import Regions


def grid(asked_by: str, shape: Sequence[int] | None, tokens: int, window: int = 1) -> tuple[int, int]:
    """Rows and columns; one row without shape, or of a line. ValueError where they are not those of the tokens."""
    shape = (1, tokens) if shape is None else (1,) * (len(shape) == 1) + tuple(shape)
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
    return _cut(shape, window).laid_out(tensor).transpose(1, 2).flatten(0, 1)


def ungroup(tensor: Tensor, shape: Sequence[int], window: int) -> Tensor:
    """Undo `group`."""
    cut = _cut(shape, window)
    return cut.back(tensor.unflatten(0, (-1, math.prod(cut.number))).transpose(1, 2))


def _cut(shape: Sequence[int], window: int) -> Regions:
    """A line has windows of one row; a picture smaller than its window is one."""
    return Regions(tuple(shape), tuple(min(window, n) for n in shape))
