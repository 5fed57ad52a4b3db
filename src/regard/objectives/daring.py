"""Cross attention of a group of words, tied to where the group's part of the body is.

Li et al., CosmicMan: A Text-to-Image Foundation Model for Humans (arXiv:2404.01294), whose code calls the term HOLA:
captions come in groups of words, each about one part of a person with a mask of its own, and the maps of a group's
words, and their mean, are to equal the mask. Resizing of masks, what counts as a map and the means are as in the
authors' code, which adds 1 times the term to the diffusion loss, for maps of a sixteenth of the picture's height.

The mask, not a share of it, is the target, and a query's weights sum to 1 over all words: where several words have the
same place the term cannot reach 0, and only its changes tell something. The mean counts as one more map, so that a
word in a long group counts less than one alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Span = tuple[int, int]  # the first token of a group, and the one after its last


def daring(
    weights: Tensor,
    masks: Tensor,
    groups: Sequence[Sequence[Span | None]],
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Mean squared difference of words' maps and their group's mask, from 0 to 1. A scalar, with gradient.

    weights: cross attention of pixels to words, [batch, head, query, token], as `call.weights.dense()` gives it; sites
    with the same grid may be joined along head. masks: where each group's part is, 0 to 1, [batch, group, row, column],
    of any size; made to fit the grid. groups: for each picture, its groups' tokens, or None for a group that its
    caption leaves out. grid: rows and columns of queries; without, the masks' shape divided by a whole number. Pictures
    without groups are left out, and with none left the term is 0. Raises ValueError for groups that are no tokens, or
    queries that do not fill a grid.

    >>> import torch
    >>> from regard.objectives.daring import daring
    >>> weights = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])  # two pixels, two words
    >>> float(daring(weights, torch.tensor([[[[1.0, 0.0]]]]), [[(0, 1)]]))  # (0.5 ** 2 + 0.25 ** 2) / 2
    0.15625
    """
    heads = by_head(weights, masks, groups, grid=grid)
    kept = [i for i, spans in enumerate(groups) if any(span is not None for span in spans)]
    return heads[kept].mean() if kept else weights.sum() * 0.0


def by_head(
    weights: Tensor,
    masks: Tensor,
    groups: Sequence[Sequence[Span | None]],
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """The same of each picture and head; NaN for a picture without groups. [batch, head]

    Arguments as in `daring`.
    """
    _check(weights, masks, groups)
    size = _grid(weights.shape[2], masks, grid)
    wanted = interpolate(masks.to(weights), size, mode="bilinear", align_corners=False).flatten(2)
    found = []
    for seen, parts, spans in zip(weights, wanted, groups, strict=True):
        off = []  # of each map, over all places: [head, map]
        for part, span in zip(parts, spans, strict=True):
            if span is not None:
                maps = seen[..., slice(*span)]
                maps = torch.cat([maps, maps.mean(-1, keepdim=True)], -1)
                off.append((maps - part[:, None]).square().mean(1))
        found.append(torch.cat(off, -1).mean(-1) if off else weights.new_full(weights.shape[1:2], torch.nan))
    return torch.stack(found)


def _check(weights: Tensor, masks: Tensor, groups: Sequence[Sequence[Span | None]]) -> None:
    if weights.ndim != 4 or masks.ndim != 4 or not len(weights) == len(masks) == len(groups):
        raise ValueError(
            "daring: weights are [batch, head, query, token], masks [batch, group, row, column], and groups a list for "
            f"each picture; got {list(weights.shape)}, {list(masks.shape)} and {len(groups)} lists"
        )
    for i, spans in enumerate(groups):
        if len(spans) != masks.shape[1]:
            raise ValueError(
                f"daring: picture {i} has {masks.shape[1]} masks and {len(spans)} groups; give None for a group that "
                "its caption leaves out"
            )
        for span in spans:
            if span is not None and not 0 <= span[0] < span[1] <= weights.shape[-1]:
                raise ValueError(
                    f"daring: a group is (first, end) among {weights.shape[-1]} tokens, at least one of them; picture "
                    f"{i} has {tuple(span)}"
                )


def _grid(queries: int, masks: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
    rows, columns = masks.shape[2:]
    if grid is None:
        factor = max(round((rows * columns / queries) ** 0.5), 1)
        grid = rows // factor, columns // factor
    if grid[0] * grid[1] != queries:
        raise ValueError(
            f"daring: {queries} queries do not fill a grid of {grid[0]} x {grid[1]}, for masks of {rows} x {columns}; "
            "leave sites of other sizes out, or give `grid`"
        )
    return grid
