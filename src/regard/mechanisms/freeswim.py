"""Windows as large as the picture that a video model was trained on, shifted inside at borders, for larger ones.

FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free Ultra-High-Resolution Video Generation
(arXiv:2511.14712); the rule of who sees whom and the scale from the authors' code.

Of frames x rows x columns a token sees all frames, and 2 d + 1 rows and columns around it, d half the number of the
training picture; at a border they are shifted inside, so that every token sees as many as in training. More tokens than
in training flatten softmax, against which scores are scaled by sqrt(log n / log n_train); the authors' code takes n to
be twice n_train, which is `tokens_ratio`. It is the window of `neighborhood`.
Left out: the dual path of the paper, in which text is attended to by the queries of a second, full pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _windows as windows
from ._mechanism import Cost, mechanism, scale_of
from ._windows import Window

TRAINED = (30, 52)  # rows and columns of patches of the authors' model, Wan 2.1 at 480 x 832


def _axes(
    n_query: int,
    n_key: int,
    shape: Sequence[int] | None = None,
    train_shape: Sequence[int] = TRAINED,
    half_window: Sequence[int] | None = None,
    tokens_ratio: float = 2.0,
) -> list[Window]:
    shape = (1, 1, n_key) if shape is None else (1,) * (len(shape) == 2) + tuple(shape)
    half_window = [size // 2 for size in train_shape] if half_window is None else half_window
    if [len(shape), len(train_shape), len(half_window)] != [3, 2, 2] or min(train_shape) < 2:
        raise ValueError(
            f"freeswim: shape is frames, rows and columns (or of one frame, without it), train_shape rows and columns, "
            f"2 or more, and half_window one number for each of these; got {shape=}, {train_shape=}, {half_window=}"
        )
    if not tokens_ratio * math.prod(train_shape) > 1:
        raise ValueError(f"freeswim: tokens_ratio times the {math.prod(train_shape)} trained on is above 1")
    windows.whole("freeswim", shape, n_key)
    rows, columns = half_window
    if min(rows, columns) < 0:
        raise ValueError(f"freeswim: half_window is 0 or more; got {half_window}")
    frames = Window(shape[0], shape[0], 1, False)
    return [frames, Window(shape[1], 2 * rows + 1, 1, False), Window(shape[2], 2 * columns + 1, 1, False)]


def _scale(query: Tensor, scale: float | None, train_shape: Sequence[int], tokens_ratio: float) -> float:
    trained = math.prod(train_shape)
    return scale_of(query, scale) * math.sqrt(math.log(tokens_ratio * trained) / math.log(trained))


def _weights(query: Tensor, key: Tensor, *, causal: bool, mask: Tensor | None, scale: float | None, **knobs: Any):
    axes = _axes(query.shape[2], key.shape[2], **knobs)
    scale = _scale(query, scale, knobs.get("train_shape", TRAINED), knobs.get("tokens_ratio", 2.0))
    return windows.weights(query, key, axes, mask, scale)


def _cost(n_query: int, n_key: int, dim: int, *, causal: bool = False, **knobs: Any) -> Cost:
    return windows.cost(_axes(n_query, n_key, **knobs), n_query, dim)


def _sized(shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    rows, columns = (1,) * (len(shape) == 1) + shape
    return {"train_shape": (max(2, rows // 2), max(2, columns // 2))}


@mechanism("full", mask="keys", weights=_weights, cost=_cost, sized=_sized)
def freeswim(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    shape: Sequence[int] | None = None,
    train_shape: Sequence[int] = TRAINED,
    half_window: Sequence[int] | None = None,
    tokens_ratio: float = 2.0,
) -> Tensor:
    """Softmax attention of a video's tokens to a window as large as the training picture. [batch, head, query, dim]

    query: [batch, head, query, dim]; key, value: [batch, kv_head, key, dim], tokens of `shape` frames, rows and
    columns, the last running fastest, or of a picture's rows and columns; without shape, one row. train_shape: rows and
    columns of tokens that the model was trained on; half_window: rows and columns to either side, half of these unless
    given. tokens_ratio: tokens over those trained on, by which the scale follows; 1: as it is. mask: which keys there
    are, [batch, 1, 1, key]. Raises ValueError where shape and tokens do not fit.

        >>> import torch
        >>> x = torch.randn(1, 2, 2 * 12 * 16, 32)
        >>> freeswim(x, x, x, shape=(2, 12, 16), train_shape=(6, 8)).shape
        torch.Size([1, 2, 384, 32])
    """
    axes = _axes(query.shape[2], key.shape[2], shape, train_shape, half_window, tokens_ratio)
    scale = _scale(query, scale, train_shape, tokens_ratio)
    return windows.windowed(query, key, value, axes, mask, scale)
