"""Whether patches are where Regard says, in a picture that is not square and not of the configuration's size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import regard

FOLLOWED, SQUARE = "rows and columns", "only in square pictures"
SHAPES = ((1, 1.5), (2, 3), (1, 2), (2, 1), (2, 2), (1, 1))  # rows and columns, as multiples of the configuration's


def places(model: nn.Module, inputs: dict[str, Any]) -> str:
    """What a painted patch shows: nothing where no picture is given, otherwise one of the words of `_judged`.

    One patch of the second picture is painted, or, as patches may overlap, its first pixel. Of the tokens of the first
    layer that have places, the one with the place of that patch must change most.
    """
    if not isinstance(inputs.get("pixel_values"), Tensor) or inputs["pixel_values"].ndim != 4:
        return ""
    found = "takes no other picture"
    for given in wider(model, inputs):
        try:
            found = _judged(model, given)
        except regard.UnreachableAttention:
            raise
        except Exception:  # it takes no picture of this shape
            continue
        if found in (FOLLOWED, SQUARE):  # otherwise in a larger one, where a token does not see all of it
            break
    return found


def wider(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Empty pictures that are not square, or not of the configuration's size."""
    old, takes = inputs["pixel_values"], inspect.signature(model.forward).parameters
    for rows, columns in SHAPES:
        size = int(old.shape[-2] * rows), int(old.shape[-1] * columns)
        new = {**inputs, "pixel_values": torch.zeros(*old.shape[:-2], *size)}
        if "interpolate_pos_encoding" in takes:
            new["interpolate_pos_encoding"] = True
        if "image_sizes" in new:
            new["image_sizes"] = torch.tensor([size] * len(old))
        if "pixel_mask" in new:
            new["pixel_mask"] = torch.ones(len(old), *size, dtype=torch.long)
        yield new


def _judged(model: nn.Module, inputs: dict[str, Any]) -> str:
    calls = _calls(model, inputs)
    call = next(
        (call for call in calls if call.tokens is not None and bool((call.tokens.places[..., 0] >= 0).any())), None
    )
    if call is None or not call.tokens.grids:
        return "places not known"
    rows, columns = call.tokens.grids[-1]
    height, width = inputs["pixel_values"].shape[-2:]
    row, column = rows // 4, columns - 1 - columns // 4  # far from where it would be if the two were exchanged
    high, wide = height // rows, width // columns
    for down, right in ((high, wide), (1, 1)):
        painted = inputs["pixel_values"].clone()
        painted[-1, :, row * high : row * high + down, column * wide : column * wide + right] = 1
        again = next(c for c in _calls(model, {**inputs, "pixel_values": painted}) if c.site == call.site)
        moved = (again.value - call.value).movedim(1, 2).flatten(2).norm(dim=-1)
        moved = moved.masked_fill(call.tokens.places[..., 0] < 0, -1.0)
        found = call.tokens.places.flatten(0, 1)[moved.argmax()].tolist()
        if found[1:3] == [row, column]:
            return SQUARE if height == width else FOLLOWED
    if max(abs(found[1] - row), abs(found[2] - column)) < 2:
        return "patches overlap: one beside the painted one changes more"
    return f"a patch in row {row}, column {column} of {rows} x {columns} is said to be in {found[1:3]}"


@torch.no_grad()
def _calls(model: nn.Module, inputs: dict[str, Any]) -> list[regard.Call]:
    kept: list[regard.Call] = []

    @regard.statistic("batch", title="Calls")
    def keep(call: regard.Call) -> Tensor:
        kept.append(call)
        return torch.zeros(len(call.query))

    with regard.record(model, keep):
        torch.manual_seed(0)
        model(**inputs)
    return kept
