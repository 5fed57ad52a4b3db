"""READ: where the last states of a picture's tokens are like that of a query, as points for a mask decoder.

Qian, Yin and Dou, Reasoning to Attend: Try to Understand How <SEG> Token Works (arXiv:2412.17741), and the authors'
code. A language model is tuned to write a token whose last state prompts a mask decoder; its inner product with the
last states of the picture's tokens is high at the object that is meant ("similarity as points"). Points are the cells
of the similarity, scaled from 0 to 1, that are high (positive), low (negative), and in between (neutral), in this
order, as many as are wanted; `soft_points` makes them differentiable, as means of pixels by nearness and similarity.

Their code weights several queries, of which READ has one; this is left out. They crop the middle of the picture; so
does `crop`, which is off here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from .. import hooks
from ..call import Call
from ..prediction import Target, predict
from ..recording import statistic
from ..seam import record
from ._attention import of_word

POSITIVE, NEGATIVE, NEUTRAL, NONE = 1, 0, -1, -10  # as transformers' SAM has them: -1 is "not a point", -10 padding


def seg_token(
    model: nn.Module, inputs: Mapping[str, Any], target: Target = None, *, centred: bool = False
) -> xr.DataArray:
    """Inner product of the last state at the query with those of the patches. [batch, token]

    inputs: of a model whose patches are tokens among its words, such as LLaVA. The query is the last token, or that at
    position `at`; tokens that are no patches have 0. The same for every target. Only a model that was tuned to prompt a
    mask from the query's state is known to show the object so.

    centred: whether the mean over patches is taken away, which moves no point. ValueError where the model has no
    patches among its words.

    >>> import regard
    >>> from regard.zoo.recipes.describer import pictures, plain
    >>> model, processor = regard.load("describer")
    >>> inputs = processor(text="user: <image> describe assistant:", images=pictures(plain(1)), return_tensors="pt")
    >>> found = regard.attribute(model, inputs, method="seg_token", processor=processor)
    >>> found.dims, int((found != 0).sum())
    (('batch', 'token'), 64)
    """
    with predict(model, inputs, target) as prediction:
        kind = type(model).__name__
        stack, at = of_word(prediction, f"seg_token compares a token with the picture's, and {kind} writes none")
        states, image = _last_states(prediction.model, prediction.inputs, stack)
        if not image.any(1).all():
            raise ValueError(f"seg_token: {kind} was given no picture whose patches are tokens among its words")
        found = similarity(states, states[torch.arange(len(states)), at.to(states.device)])
        if centred:
            found = found - (found * image).sum(1, keepdim=True) / image.sum(1, keepdim=True)
        return prediction.labelled(found.masked_fill(~image, 0), "seg_token").assign_attrs(knows_target=False)


def similarity(states: Tensor, query: Tensor) -> Tensor:
    """Inner products, not made to length 1. states: [batch, token, dim]; query: [batch, dim]. [batch, token]

    >>> similarity(torch.tensor([[[1.0, 0], [0, 1], [2, 0], [-1, 0]]]), torch.tensor([[1.0, 0.5]])).tolist()
    [[1.0, 0.5, 2.0, -1.0]]
    """
    return torch.einsum("btd,bd->bt", states, query)


def similarity_map(found: Tensor, shape: tuple[int, int], *, crop: int | None = None) -> Tensor:
    """Similarity from 0 to 1, in pixels. found: [batch, row, column]; shape: rows and columns of the picture.

    crop: the side of the square that was cut out of the picture's middle, after its shorter side was scaled to that;
    outside of it there is 0. None where the model saw the whole picture. Of even similarity all is 0.
    """
    scaled = _scaled(found)
    if crop is not None:
        _square(found)
        scaled = pad(_resized(scaled, (crop, crop)), _margins(shape, crop), value=0.0)
    return _resized(scaled, shape)


def similarity_points(
    found: Tensor,
    shape: tuple[int, int],
    *,
    points: int = 30,
    positive: float = 0.8,
    negative: float = 0.2,
    down: int = 2,
    crop: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Points for a mask decoder, x before y in whole pixels [batch, point, 2], and their labels [batch, point]

    found: similarity [batch, row, column]; shape: rows and columns of the picture. On a grid `down` times as coarse,
    from 0 to 1: cells of `positive` or more are labelled 1, from the highest on; of `negative` or less 0, from the
    lowest on; those in between -1, "not a point"; and the first `points` of all are kept. Rows with fewer end in labels
    -10, as transformers' SAM has them. crop: see `similarity_map`; no point lies outside of it.
    """
    if not negative < positive or points < 1:
        raise ValueError(f"similarity_points: positive={positive} is above negative={negative}, and points 1 or more")
    rows, columns = found.shape[1] // down, found.shape[2] // down
    if not rows or not columns:
        raise ValueError(f"similarity_points(down={down}): of {list(found.shape[1:])} tokens no cell is left")
    cells = _scaled(_resized(found, (rows, columns)))
    if crop is not None:
        _square(found)
        cells = pad(cells, _margins(shape, rows), value=-1.0)
    rows, columns = cells.shape[1:]
    most = min(points, rows * columns)
    places = torch.zeros(len(cells), most, 2)
    labels = torch.full((len(cells), most), NONE)
    for i, flat in enumerate(cells.flatten(1)):
        inside = (flat >= 0).nonzero()[:, 0]
        value = flat[inside]
        high, low = inside[value >= positive], inside[value <= negative]
        between = inside[(value > negative) & (value < positive)]
        order = (high[flat[high].argsort(descending=True, stable=True)], low[flat[low].argsort(stable=True)], between)
        chosen = torch.cat(order)[:most]
        kinds = [torch.full((len(some),), kind) for some, kind in zip(order, (POSITIVE, NEGATIVE, NEUTRAL))]
        labels[i, : len(chosen)] = torch.cat(kinds)[:most]
        for axis, (at, size, n) in enumerate(
            ((chosen % columns, shape[1], columns), (chosen // columns, shape[0], rows))
        ):
            places[i, : len(chosen), axis] = ((at + 0.5) * size / n).clamp(max=size - 1).floor().cpu()
    return places.to(found.device), labels.to(found.device)


def soft_points(found: Tensor, points: Tensor) -> Tensor:
    """Points with a gradient: means of pixels, by how near and how similar they are. [batch, point, 2]

    found: a `similarity_map` [batch, row, column]; points: [batch, point, 2], x before y. A pixel counts by
    exp(-squared distance) times the softmax of the map over all pixels.
    """
    rows, columns = found.shape[1:]
    x, y = (torch.arange(n, device=found.device, dtype=found.dtype) for n in (columns, rows))
    away = [(p[..., None] - along).square() for p, along in zip(points.unbind(-1), (x, y))]
    logits = found[:, None] - away[0][:, :, None, :] - away[1][:, :, :, None]  # [batch, point, row, column]
    weights = logits.flatten(2).softmax(-1).view_as(logits)
    return torch.stack([(weights.sum(2) * x).sum(-1), (weights.sum(3) * y).sum(-1)], -1)


def _scaled(found: Tensor) -> Tensor:
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    return (found - low) / torch.where(high > low, high - low, 1.0)


def _resized(found: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(found[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _square(found: Tensor) -> None:
    if found.shape[1] != found.shape[2]:
        raise ValueError(f"crop is a square, and similarity is {list(found.shape[1:])}; give crop=None")


def _margins(shape: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """What was cut off on the left, right, top and bottom, where the shorter side is as long as `side`."""
    across, down = ((int(n * side / min(shape)) - side) // 2 for n in (shape[1], shape[0]))
    return across, across, down, down


def _last_states(model: nn.Module, inputs: Mapping[str, Any], stack: str) -> tuple[Tensor, Tensor]:
    """What the language model gives behind its last norm [batch, token, dim], and which tokens are patches."""
    tokens: list[Any] = []

    @statistic("batch", title="Tokens")
    def keep(call: Call) -> None:
        if call.site.stack == stack and not tokens:
            tokens.append(call.tokens)

    seen: list[Tensor] = []
    reads: Any = model.get_output_embeddings()  # type: ignore[operator]
    with ExitStack() as undo:  # asked for hidden states, transformers would leave hooks of its own
        undo.enter_context(torch.no_grad())
        hooks.attach(undo, reads.register_forward_pre_hook, lambda module, args: seen.append(args[0]))
        undo.enter_context(record(model, keep))
        model(**inputs)
    states = seen[-1]
    none = torch.zeros(states.shape[:2], dtype=torch.bool)
    return states, (none if tokens[0] is None else tokens[0].role("image")).to(states.device)
