"""Features of a layer that resemble a map of where the class shows.

Belharbi, Pedersoli, Koerich, Bacon, Granger, Guided Interpretable Facial Expression Recognition via Spatial Action Unit
Cues (arXiv:2402.00281): beside cross entropy, 1 - cosine of a layer's channel mean, which the paper calls attention,
and a map of the face regions that a codebook of action units names for the expression. Resizing of the map, the
standardised variant and what is left out are as in the authors' code; its README adds 9 times the term for the last
layer of a ResNet-50.

Deviations: the map comes from the caller, since there are no landmarks of faces here; the code's other means over
channels (a random half, the first of them) and its enlarging of attention to the map are not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate


def au_guided(
    features: Tensor, cue: Tensor, *, standardised: bool = False, grid: tuple[int, int] | None = None
) -> Tensor:
    """Mean of 1 - cosine(channel mean, cue), from 0 where they are alike up to scale, to 2. A scalar, with gradient.

    features: of one layer, [batch, channel, row, column], or [batch, token, dim] with `grid`, the rows and columns of
    its tokens, others such as `[CLS]` left out before. Weights of attention count as one channel. cue: where the class
    shows, [batch, row, column], of any size; a picture whose cue is not finite everywhere is left out, and with none
    left the loss is 0. standardised: subtract from the channel mean its mean over places, and divide by its deviation;
    without, an offset of the features counts, and a wide cue is met in part by features that are the same everywhere.
    Raises ValueError for other shapes.

    >>> import torch
    >>> from regard.objectives.au_guided import au_guided
    >>> cue = torch.ones(1, 1, 2)
    >>> round(float(au_guided(torch.tensor([[[[1.0, 0.0]]]]), cue)), 4)  # 1 - cosine of 45 degrees
    0.2929
    """
    seen = channel_mean(features, grid=grid)
    if cue.ndim != 3 or len(cue) != len(seen):
        raise ValueError(
            f"au_guided: cue is [batch, row, column] for {len(seen)} pictures of features; got {list(cue.shape)}"
        )
    if standardised and seen[0].numel() < 2:
        raise ValueError("au_guided: a single place has no deviation; take a layer with more, or standardised=False")
    kept = cue.isfinite().flatten(1).all(1)
    if not bool(kept.any()):
        return features.sum() * 0.0
    wanted = _resized(cue[kept].to(seen), seen.shape[1:]).flatten(1)
    places = seen[kept].flatten(1)
    if standardised:
        places = (places - places.mean(1, keepdim=True)) / (places.std(1, keepdim=True) + 1e-4)
    return (1 - cosine_similarity(places, wanted, dim=1)).mean()


def channel_mean(features: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    """What the paper calls attention: the mean over channels. [batch, row, column]

    Arguments as in `au_guided`.
    """
    if features.ndim == 4 and grid is None:
        return features.mean(1)
    if features.ndim == 3 and grid is not None and features.shape[1] == grid[0] * grid[1]:
        return features.mean(2).unflatten(1, grid)
    raise ValueError(
        "au_guided: features are [batch, channel, row, column], or [batch, token, dim] with `grid`, rows and columns "
        f"of as many tokens; got {list(features.shape)} and grid {grid}"
    )


def _resized(cue: Tensor, size: torch.Size) -> Tensor:
    """As in the code, kept between each map's lowest and highest value.

    With both `align_corners` and `antialias`, PyTorch steps from corner to corner but starts half a step in: a map that
    is made smaller moves a little towards the lower right.
    """
    found = interpolate(cue[:, None], tuple(size), mode="bilinear", align_corners=True, antialias=True)[:, 0]
    return found.clamp(cue.amin((1, 2), keepdim=True), cue.amax((1, 2), keepdim=True))
