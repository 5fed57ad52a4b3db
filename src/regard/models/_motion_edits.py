"""Edits of motions by attention: interventions of `regard.models.motionclr`, whose module docstring says what of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import Call


@dataclass
class Edit:
    """A change of attention in denoising steps `first` to `last`, both counted, of a `generate` in progress."""

    first: int = 0
    last: int | None = None
    cross: bool | None = None  # of which attention: to words, of frames, or both
    step: int = 0  # set by `generate`

    def where(self, call: Call) -> bool:
        inside = self.first <= self.step and (self.last is None or self.step <= self.last)
        ours = call.site.name.endswith(("self_attention", "cross_attention"))
        return inside and ours and self.cross in (None, call.site.cross)

    def _two(self, call: Call) -> None:
        if len(call.query) < 2:
            raise ValueError(f"{type(self).__name__}: row 0 is the source and row 1 is edited; got a batch of one")


class Emphasise(Edit):
    """Adds to the weights of words, after the softmax: above 0 for more of it, below for less; -1 to 1.

    keys: of the words; row: of the batch, all unless given. ValueError where there is no such row.
    """

    def __init__(self, keys: Sequence[int], amount: float, *, row: int | None = None, **steps: Any) -> None:
        super().__init__(**steps, cross=True)
        self.keys, self.amount, self.row = list(keys), amount, row

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        if self.row is not None and not 0 <= self.row < len(weights):
            raise ValueError(f"Emphasise: there is no row {self.row} in a batch of {len(weights)}")
        weights = weights.clone()
        at = slice(None) if self.row is None else slice(self.row, self.row + 1)
        weights[at, :, :, self.keys] += self.amount
        return weights


class Erase(Edit):
    """Multiplies row 1's weights of words in a part of the frames, from `begin` to `end`, in shares of the motion."""

    def __init__(
        self, keys: Sequence[int], *, factor: float = 0.1, begin: float = 0.5, end: float = 1.0, **steps: Any
    ) -> None:
        super().__init__(**steps, cross=True)
        self.keys, self.factor, self.part = list(keys), factor, (begin, end)

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        self._two(call)
        frames = call.query.shape[2]
        at = torch.arange(rows.start, rows.stop, device=weights.device)
        begin, end = (int(share * frames) for share in self.part)
        inside = (at >= begin) & (at < end)
        factor = torch.ones_like(weights[1])
        factor[..., self.keys] = torch.where(inside, self.factor, 1.0)[:, None]
        return torch.cat([weights[:1], (weights[1] * factor)[None], weights[2:]])


class Replace(Edit):
    """Gives row 1 the timing of row 0: its weights over frames, and over all words but those that differ.

    keys: of the words that differ.
    """

    def __init__(self, keys: Sequence[int], *, last: int | None = 3, **steps: Any) -> None:
        super().__init__(**steps, last=last)
        self.keys = list(keys)

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        self._two(call)
        own = weights[0].clone()
        if call.site.cross:
            own[..., self.keys] = weights[1, ..., self.keys]
        return torch.cat([weights[:1], own[None], weights[2:]])


class Shift(Edit):
    """Row 1 is row 0 with its second part first: the first `ratio` of the frames moves to the end."""

    def __init__(self, ratio: float = 0.5, *, last: int | None = 4, **steps: Any) -> None:
        super().__init__(**steps, last=last, cross=False)
        self.ratio = ratio

    def inputs(self, call: Call) -> Call:
        if not self.where(call):
            return call
        self._two(call)
        frames = call.query.shape[2]
        cut = math.floor(self.ratio * frames)
        if cut + math.floor((1 - self.ratio) * frames) != frames:
            raise ValueError(f"Shift: {frames} frames do not divide at a share of {self.ratio}")

        def moved(x: Tensor) -> Tensor:
            return torch.cat([x[:1], x[:1].roll(-cut, 2), x[2:]])

        return call.but(query=moved(call.query), key=moved(call.key), value=moved(call.value))


class Example(Edit):
    """Rows from 1 on look with row 0's queries, cut into chunks of frames, shuffled for each row in its own way."""

    def __init__(self, *, chunk: int = 20, rows: int = 2, seed: int = 0, at: int = 6) -> None:
        super().__init__(first=at, last=at, cross=False)
        self.chunk, self.rows, self.seed = chunk, rows, seed

    def inputs(self, call: Call) -> Call:
        if not self.where(call):
            return call
        self._two(call)
        query = call.query.clone()
        for row in range(1, min(self.rows, len(query))):
            parts = call.query[0].split(self.chunk, 1)
            order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(self.seed + row))
            query[row] = torch.cat([parts[i] for i in order.tolist()], 1)
        return call.but(query=query)


class Style(Edit):
    """Row 1 moves as row 0, in its own style: its frames look with row 0's queries."""

    def __init__(self, *, last: int | None = 5, **steps: Any) -> None:
        super().__init__(**steps, last=last, cross=False)

    def inputs(self, call: Call) -> Call:
        if not self.where(call):
            return call
        self._two(call)
        return call.but(query=torch.cat([call.query[:1], call.query[:1], call.query[2:]]))
