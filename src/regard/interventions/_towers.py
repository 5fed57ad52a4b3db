"""What a vision tower says of each patch, at the image tokens of a language model that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import sites
from ..call import Call
from ..seam import intervene
from ..tokens import Tokens
from ._method import STACK, image_ids, image_keys, padded_left

Grids = dict[int, Tensor]  # by the number of a picture, [row, column]


@torch.no_grad()
def read(
    model: nn.Module,
    inputs: Mapping[str, Any],
    look: Callable[[Call], Tensor],
    among: Callable[[Sequence[int]], Sequence[int]],
    method: str,
) -> tuple[list[Grids], Tokens]:
    """A number of each patch, by `look` [batch, key], in layers of the tower; and the tokens of the prompt.

    among: which, of the layers that there are. One run of the model. ValueError, which names the method, where it
    reads no image tokens, has no tower whose patches are told apart, or a row no picture, or padding on the right.
    """
    image_ids(model, method)
    padded_left(inputs, method)
    found = [site for site in sites.find(model).values() if site.stack != STACK and not site.cross]
    towers = [site for site in found if site.stack == found[0].stack]
    if not towers:
        raise ValueError(f"{method} asks a vision tower, and {type(model).__name__} has none")
    reader = _Reader(towers[0].stack, list(among(sorted(site.layer for site in towers))), look)
    with intervene(model, reader):
        model(**inputs, use_cache=False)
    tokens = reader.tokens
    if tokens is None or not tokens.role("image").any(1).all() or not all(reader.grids):
        raise ValueError(f"{method}: a row of the inputs has no picture, or its patches cannot be told apart")
    return reader.grids, tokens


def at_tokens(grids: Grids, tokens: Tokens, method: str) -> Tensor:
    """The mean of the patches that each image token is made of; NaN elsewhere. [batch, token]"""
    places = tokens.places
    found = torch.full(places.shape[:2], torch.nan)
    image = tokens.role("image")
    for i in places[..., 0][image].unique().tolist():
        grid, of = grids.get(i), tokens.grids[i] if 0 <= i < len(tokens.grids) else (0, 0)
        if grid is None or 0 in of or grid.shape[0] % of[0] or grid.shape[1] % of[1]:
            raise ValueError(
                f"{method}: which patches an image token is made of is not known: those of picture {i} are "
                f"{None if grid is None else list(grid.shape)}, its tokens {list(of)} in rows and columns"
            )
        pooled = grid.unflatten(1, (of[1], -1)).unflatten(0, (of[0], -1)).mean((1, 3))
        here = image & (places[..., 0] == i)
        found[here] = pooled[places[..., 1][here], places[..., 2][here]]
    return found


class _Reader:
    def __init__(self, stack: str, among: Sequence[int], look: Callable[[Call], Tensor]) -> None:
        self.stack, self.among, self.look = stack, among, look
        self.grids: list[Grids] = [{} for _ in among]
        self.tokens: Tokens | None = None

    def inputs(self, call: Call) -> Call:
        if call.site.stack == self.stack and call.tokens is not None:
            for grids, layer in zip(self.grids, self.among):
                if call.site.layer == layer:
                    _gather(grids, call.tokens.to(torch.device("cpu")), self.look(call).cpu())
        elif self.tokens is None and image_keys(call) is not None:
            assert call.tokens is not None
            self.tokens = call.tokens.to(torch.device("cpu"))
        return call


def _gather(grids: Grids, tokens: Tokens, values: Tensor) -> None:
    number, row, column = tokens.places[..., 0], tokens.places[..., 1], tokens.places[..., 2]
    for i in number[number >= 0].unique().tolist():
        here = number == i
        rows, columns = int(row[here].max()) + 1, int(column[here].max()) + 1
        if rows * columns == int(here.sum()):
            grid = torch.empty(rows, columns)
            grid[row[here], column[here]] = values[here].float()
            grids[i] = grid
