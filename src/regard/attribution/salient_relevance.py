"""Salient relevance: the regions in which relevance stands out.

Li, Tian, Mueller and Chen, Beyond saliency: understanding convolutional neural networks from saliency prediction on
layer-wise relevance propagation (arXiv:1712.08268): the relevance of pixels, then context-aware saliency of that map,
after Goferman, Zelnik-Manor and Tal, Context-Aware Saliency Detection (CVPR 2010), with its constants.

The paper hands the sizes of the relevances of three channels on as a colour picture, compared in CIE Lab; here they are
compared as they are. The authors' code of the second step is not public; Goferman's distances are brought into 0 to 1
here by the largest that there can be, and the map by its own largest value before its foci are chosen. As he does,
every picture is scaled so that its longer side has 250 pixels: patches are 7 pixels wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import interpolate, unfold

from ..prediction import Target, predict
from .layerwise_relevance import relevance

PATCH, STEP = 7, 3  # pixels; patches overlap by half
LONGEST = 250  # pixels that the longer side is scaled to
SCALES = (1.0, 0.8, 0.5, 0.3)
AGAINST = (1.0, 0.5, 0.25)  # of its own scale, what a patch is compared with
SMALLEST = 0.2  # scale below which nothing is compared
ROWS = 1024  # patches compared at once


def salient_relevance(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    neighbours: int = 64,
    distance: float = 3.0,
    focus: float = 0.8,
    longest: int = LONGEST,
) -> xr.DataArray:
    """How much the relevance of a pixel's surroundings stands out, 0 to 1. [batch, row, column]

    See `context_aware` for the knobs. ValueError where the model is not a convolutional network with ReLUs.
    """
    with predict(model, inputs, target) as prediction:
        found = relevance(prediction).abs().cpu()
        stretched = found / found.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
        knobs = {"neighbours": neighbours, "distance": distance, "focus": focus, "longest": longest}
        maps = [context_aware(one, **knobs) for one in stretched]
        return prediction.labelled(torch.stack(maps), "salient_relevance")


@torch.no_grad()
def context_aware(
    picture: Tensor, *, neighbours: int = 64, distance: float = 3.0, focus: float = 0.8, longest: int = LONGEST
) -> Tensor:
    """How much each pixel's patch differs from the patches that are most like it, 0 to 1. [row, column]

    picture: [channel, row, column], from 0 to 1
    neighbours: how many similar patches count. distance: how much less unlike a patch is that is far away. focus: the
    saliency, of the largest, from which on a pixel draws attention to what is near it. longest: pixels that the longer
    side is scaled to, before patches are compared; fewer take less time, and make patches a larger part.
    """
    size = picture.shape[-2:]
    if min(size) < PATCH:
        raise ValueError(f"context-aware saliency needs {PATCH} x {PATCH} pixels at least, got {size[0]} x {size[1]}")
    picture = (picture - picture.mean()).double()  # distances of what is nearly alike are small differences
    picture = _resized(picture, longest / max(size))
    if min(picture.shape[-2:]) < PATCH:
        raise ValueError(
            f"context-aware saliency: {size[0]} x {size[1]} pixels with {longest=} are {list(picture.shape[-2:])}, "
            f"less than a patch of {PATCH}"
        )
    levels: dict[float, tuple[Tensor, Tensor, tuple[int, int]]] = {}

    def patches(scale: float) -> tuple[Tensor, Tensor, tuple[int, int]]:
        if scale not in levels:
            levels[scale] = _patches(_resized(picture, scale))
        return levels[scale]

    def fits(scale: float) -> bool:
        return scale >= SMALLEST and round(min(picture.shape[-2:]) * scale) >= PATCH

    found = []
    for scale in filter(fits, SCALES):
        own, places, shape = patches(scale)
        others = [patches(scale * factor) for factor in AGAINST if fits(scale * factor)]
        theirs, where = torch.cat([o[0] for o in others]), torch.cat([o[1] for o in others])
        unlike = own.new_empty(len(own))
        for a in range(0, len(own), ROWS):
            rows = slice(a, a + ROWS)
            apart = torch.cdist(own[rows], theirs) / own.shape[1] ** 0.5
            apart /= 1 + distance * torch.cdist(places[rows], where)
            at = torch.arange(len(apart))
            apart[at, at + a] = torch.inf  # a patch is no neighbour of its own
            nearest = apart.topk(min(neighbours, apart.shape[1] - 1), largest=False).values
            unlike[rows] = nearest.mean(1)
        found.append(_to(1 - torch.exp(-unlike).reshape(shape), size))
    whole = torch.stack(found).mean(0)
    whole = whole / whole.max().clamp(min=1e-30)
    return (whole * (1 - _from_foci(whole >= focus))).float()


def _patches(picture: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Each patch's values [patch, value], its place in lengths of the longer side [patch, 2], rows and columns."""
    rows, columns = ((n - PATCH) // STEP + 1 for n in picture.shape[-2:])
    values = unfold(picture[None], PATCH, stride=STEP)[0].T
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(picture) * STEP + PATCH / 2
    return values, at / max(picture.shape[-2:]), (rows, columns)


def _from_foci(foci: Tensor) -> Tensor:
    """Distance of each pixel to the nearest focus, in lengths of the longer side; 0 where there is none."""
    rows, columns = foci.shape
    every = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    chosen = every[foci.flatten()]
    if not len(chosen):
        return torch.zeros(foci.shape)
    nearest = torch.cat([torch.cdist(part, chosen).amin(1) for part in every.split(ROWS)])
    return (nearest / max(rows, columns)).reshape(foci.shape)


def _resized(picture: Tensor, scale: float) -> Tensor:
    size = [max(1, round(n * scale)) for n in picture.shape[-2:]]
    if size == list(picture.shape[-2:]):
        return picture
    return interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def _to(found: Tensor, size: tuple[int, ...]) -> Tensor:
    return interpolate(found[None, None], size, mode="bilinear", align_corners=False)[0, 0]
