"""VL-SAM: attention flow of a vision-language model from a word that it says to the picture, as points for a segmenter.

Lin, Wang and Tang, Training-Free Open-Ended Object Detection and Segmentation via Attention as Prompts
(arXiv:2410.05963). No code was published; the abstract and a detailed note on the paper were at hand, not the paper, so
that the recursion may differ from theirs. Heads are weighted by the mean over queries of their largest weight, and
averaged: S of each layer. The flow is F = I + S in the first layer, and (I + S)(I + F before) in those above. Since
early positions are seen by all later ones, it gathers there; the regularised flow scales column j of S, in each layer,
by (j + 1) / n, counted from 0 among n tokens. The map of a word is its row of F, at the tokens of the picture.

Points: of the region of 4-neighbours that is largest where the map is high, the maximum is a positive point, and the
minimum outside it a negative one. How high is not known to us: a standard deviation above the mean. The segmenter's
mask then masks the map, points are taken again, and segmented again. A language model predicts a word one position
before it, and that position's row is read here; `position="at"` reads the word's own.

Left out: crops and the ten questions that the model asks itself, from which most of their score comes; parsing
captions, and matching words with classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from ..call import Call
from ..prediction import Prediction, Target, predict
from ..recording import statistic
from ..seam import record
from ._attention import of_word

BLOCK = 256  # queries whose dense weights are in memory at once
Segmenter = Callable[[Tensor, Tensor, Tensor], Tensor]


class Points(NamedTuple):
    """Prompts for a segmenter: where, x before y in pixels, and whether on the object (1) or off it (0)."""

    points: Tensor  # [batch, point, 2]
    labels: Tensor  # [batch, point]


def vl_sam(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target = None,
    *,
    position: Literal["before", "at"] = "before",
    head_weights: bool = True,
    regularised: bool = True,
) -> xr.DataArray:
    """How much flows to each patch from where a word is said, through all layers; from 0 up. [batch, token]

    inputs: of a model whose patches are tokens among its words, such as LLaVA. What is explained is the next token
    after them, or after position `at` of a text that goes on; at tokens that are no patches there is 0. position: "at"
    reads the row of the target itself, "before" the one that predicts it, the same for every target.

    head_weights: whether heads count by their largest weights; regularised: whether early positions are held back.
    Takes a map of tokens by tokens for each layer. ValueError where the model has no patches among its words.

    >>> import regard
    >>> from regard.zoo.recipes.describer import pictures, plain
    >>> model, processor = regard.load("describer")
    >>> inputs = processor(text="user: <image> describe assistant: a", images=pictures(plain(1)), return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="vl_sam", processor=processor)
    >>> found.dims, int((found > 0).sum()), int(found.row.max())
    (('batch', 'token'), 64, 7)
    """
    if position not in ("before", "at"):
        raise ValueError(f"vl_sam(position={position!r}): it is 'before' the word or 'at' it")
    with predict(model, inputs, target) as prediction:
        kind = type(model).__name__
        stack, at = of_word(prediction, f"vl_sam follows a word that is said to the picture, and {kind} says none")
        given, at = (prediction.inputs, at) if position == "before" else _said(prediction, at)
        layers, image, real = _read(prediction.model, given, stack, head_weights)
        if not image.any(1).all():
            raise ValueError(f"vl_sam: {kind} was given no picture whose patches are tokens among its words")
        found = flow(layers, at, real, regularised=regularised).masked_fill(~image, 0)
        return prediction.labelled(found[:, : prediction.shape[-1]], "vl_sam").assign_attrs(knows_target=False)


def flow(layers: Tensor, at: Tensor, real: Tensor, *, regularised: bool = True) -> Tensor:
    """A row of the flow through layers, from the first to the last, without the whole of it. [batch, key]

    layers: [batch, layer, query, key]; at: which row [batch]; real: which tokens are no padding [batch, key].

    With e the row of the identity at `at`, h = e (I + S) for the last S, and h (I + S) going down, F is the sum of all
    these h.
    """
    if regularised:
        rank = real.cumsum(1) / real.sum(1, keepdim=True)
        layers = layers * (rank * real)[:, None, None]
    row = torch.zeros_like(layers[:, 0, 0])
    row[torch.arange(len(row)), at] = 1
    whole = torch.zeros_like(row)
    for layer in reversed(layers.unbind(1)):
        row = row + torch.einsum("bq,bqk->bk", row, layer)
        whole = whole + row
    return whole


def point_prompts(maps: Tensor, shape: tuple[int, int], *, deviations: float = 1.0) -> Points:
    """A positive and a negative point of each map, where it is highest and lowest. maps: [batch, row, column]

    shape: rows and columns of the picture, whose pixels the points count. The positive point is the highest of the
    largest region above the mean by so many standard deviations; where none is, of the whole map.
    """
    flat = maps.flatten(1)
    bar = flat.mean(1) + deviations * flat.std(1, correction=0)
    found = []
    for one, least in zip(maps, bar):
        numbers = regions(one > least)
        counts = torch.bincount(numbers.flatten())[1:]
        inside = numbers == counts.argmax() + 1 if len(counts) else torch.ones_like(one, dtype=torch.bool)
        outside = ~inside if not inside.all() else inside
        high = one.masked_fill(~inside, -torch.inf).argmax()
        low = one.masked_fill(~outside, torch.inf).argmin()
        found.append(torch.stack([high, low]))
    rows, columns = maps.shape[1:]
    at = torch.stack(found)
    x, y = (at % columns + 0.5) * shape[1] / columns, (at // columns + 0.5) * shape[0] / rows
    return Points(torch.stack([x, y], -1), torch.tensor([1, 0], device=maps.device).expand(len(maps), 2))


def segment(maps: Tensor, pixels: Tensor, segmenter: Segmenter, *, rounds: int = 2, deviations: float = 1.0) -> Tensor:
    """Masks of what maps point at, each round with points from where the mask before was. [batch, row, column] boolean

    maps: [batch, row, column] of any size, from 0 up; pixels: [batch, channel, row, column]. segmenter: makes masks of
    pixels, points and labels, such as `sam(model)` and `alike`. A mask that leaves nothing of the map is not followed.
    """
    shape = (pixels.shape[2], pixels.shape[3])
    points = point_prompts(maps, shape, deviations=deviations)
    masks = segmenter(pixels, *points)
    for _ in range(rounds - 1):
        kept = maps * interpolate(masks[:, None].to(maps), maps.shape[1:], mode="area")[:, 0]
        kept = torch.where((kept > 0).any((1, 2), keepdim=True).expand_as(kept), kept, maps)
        masks = segmenter(pixels, *point_prompts(kept, shape, deviations=deviations))
    return masks


def sam(model: nn.Module) -> Segmenter:
    """A segmenter of transformers' `SamModel`, whose own mask is given back to it once.

    Pixels are as its processor gives them.
    """

    @torch.no_grad()
    def segmenter(pixels: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        asked = {"input_points": points[:, None], "input_labels": labels[:, None], "multimask_output": False}
        asked["image_embeddings"] = model.get_image_embeddings(pixels)  # type: ignore[operator]
        first = model(**asked).pred_masks[:, 0]
        again = model(**asked, input_masks=first).pred_masks[:, 0]
        return interpolate(again, pixels.shape[2:], mode="bilinear", align_corners=False)[:, 0] > 0

    return segmenter


def alike(pixels: Tensor, points: Tensor, labels: Tensor, *, tolerance: float = 0.3) -> Tensor:
    """A segmenter for plain drawings: the region of pixels that look like the first positive point's, without learning.

    pixels: [batch, channel, row, column], 0 to 1; tolerance: by how much a channel may differ. Negative points are cut
    out where they lie in it.
    """
    found = []
    for one, some, kinds in zip(pixels, points, labels):
        x, y = some[kinds == 1][0].long().tolist()
        numbers = regions(((one - one[:, y, x, None, None]).abs() <= tolerance).all(0))
        off = [numbers[y2, x2] for x2, y2 in some[kinds == 0].long().tolist()]
        own = numbers == numbers[y, x]
        found.append(
            own & ~torch.stack([numbers == n for n in off]).any(0) if off and numbers[y, x] not in off else own
        )
    return torch.stack(found)


def regions(mask: Tensor) -> Tensor:
    """Numbers from 1 of the regions of 4-neighbours, 0 where the mask is not. [row, column]"""
    numbers = torch.arange(1, mask.numel() + 1, device=mask.device).view(mask.shape).float() * mask
    while True:
        grown = [max_pool2d(numbers[None], size, 1, pad)[0] for size, pad in (((3, 1), (1, 0)), ((1, 3), (0, 1)))]
        new = torch.maximum(*grown) * mask
        if torch.equal(new, numbers):
            return numbers.unique(return_inverse=True)[1] + (0 if not mask.all() else 1)
        numbers = new


def _said(prediction: Prediction, at: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Inputs in which the target stands behind the position that predicts it, and where it stands."""
    ids, name = prediction.inputs["input_ids"], type(prediction.model).__name__
    rows = torch.arange(len(ids), device=ids.device)
    if bool((at + 1 < ids.shape[1]).all()) and torch.equal(ids[rows, at + 1], prediction.target.to(ids)):
        return prediction.inputs, at + 1
    if bool((at + 1 != ids.shape[1]).any()):
        raise ValueError(f"vl_sam(position='at'): what {name} was given goes on after the word otherwise; end it there")
    more = {"input_ids": prediction.target.to(ids)[:, None]}
    if "attention_mask" in prediction.inputs:
        more["attention_mask"] = torch.ones_like(more["input_ids"])
    return {**prediction.inputs, **{k: torch.cat([prediction.inputs[k], v], 1) for k, v in more.items()}}, at + 1


def _read(model: nn.Module, inputs: Mapping[str, Any], stack: str, head_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of each layer, its heads joined [batch, layer, query, key]; which tokens are patches, which real."""
    layers: dict[int, Tensor] = {}
    tokens: list[Any] = []

    @statistic("batch query key", title="Weights, heads joined")
    def read(call: Call) -> None:
        if call.site.stack != stack:
            return
        tokens.append(call.tokens)
        n, keys = call.query.shape[2], call.key.shape[2]
        real = torch.ones(len(call.query), keys, dtype=torch.bool) if call.tokens is None else call.tokens.role("real")
        real = real.to(call.query.device)
        blocks = [(a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]
        largest = torch.cat([call.weights.rows(a, b).amax(-1) for a, b in blocks], 2)  # [batch, head, query]
        share = real[:, None, -n:] / real[:, -n:].sum(1)[:, None, None]
        heads = (largest.nan_to_num() * share).sum(-1) if head_weights else torch.ones_like(largest[..., 0])
        rows = [(call.weights.rows(a, b).nan_to_num() * heads[..., None, None]).mean(1) for a, b in blocks]
        layers[call.site.layer] = torch.cat(rows, 1) * real[:, -n:, None]

    with torch.no_grad(), record(model, read):
        model(**inputs)
    whole = torch.stack([layers[layer] for layer in sorted(layers)], 1).double()
    if whole.shape[2] != whole.shape[3] or tokens[0] is None:
        raise ValueError(f"vl_sam needs the whole sequence in one pass, and {type(model).__name__} was read in parts")
    return whole, tokens[0].role("image").to(whole.device), tokens[0].role("real").to(whole.device)
