"""What a denoising model of diffusers looks at, of the words that it paints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import sites
from ..call import Call

BLOCK = 1024  # queries whose dense weights are in memory at once


class Word(NamedTuple):
    """A stretch of a text."""

    text: str
    start: int
    end: int


def denoiser(pipeline: Any, method: str) -> nn.Module:
    """The part that looks at words. ValueError, which names the method, where this is no pipeline, or it has none."""
    model = next((m for part in ("transformer", "unet") if (m := getattr(pipeline, part, None)) is not None), None)
    if not isinstance(model, nn.Module) or not hasattr(pipeline, "scheduler"):
        raise ValueError(
            f"{method} reads a diffusers pipeline, the second that regard.load gives of one; {type(pipeline).__name__} "
            f"is none"
        )
    if not any(site.cross for site in sites.find(model).values()):
        raise ValueError(
            f"{method}: {type(model).__name__} has no cross attention to words; where they stand among the patches, "
            f"their weights are not shares of all words"
        )
    return model


def texts(inputs: Any, method: str) -> list[str]:
    """The texts of `inputs`. ValueError, which names the method, where there are none."""
    found = inputs.get("text") if hasattr(inputs, "get") else None
    found = [found] if isinstance(found, str) else found
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{method}: inputs hold `text`, one or several that are not empty; got {found!r}")
    return list(found)


def positions(pipeline: Any, given: Sequence[str], spans: Sequence[Sequence[Word]]) -> list[list[list[int]]]:
    """Which tokens of each text spell each of these stretches of it. ValueError where they are cut off."""
    tokenizer = pipeline.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens stand; load its fast kind")
    limit = getattr(tokenizer, "model_max_length", None)
    found = []
    for text, words in zip(given, spans):
        offsets = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=limit)["offset_mapping"]
        places = [[i for i, (a, b) in enumerate(offsets) if a < word.end and b > word.start] for word in words]
        for word, some in zip(words, places):
            if not some:
                raise ValueError(f"{word.text!r} stands behind the {len(offsets)} tokens that are read of {text!r}")
        found.append(places)
    return found


def on_words(call: Call, batch: int) -> Tensor:
    """Mean over heads of the weights of a cross-attention call, of what is painted by the words. [batch, query, key]

    Of a guided batch, that is its second half. ValueError where there are other numbers.
    """
    rows, n = call.query.shape[0], call.query.shape[2]
    if rows not in (batch, 2 * batch):
        raise ValueError(f"{call.site} ran on a batch of {rows}, which is neither {batch} texts nor twice as many")
    parts = [call.weights.rows(a, min(a + BLOCK, n))[-batch:].mean(1) for a in range(0, n, BLOCK)]
    return torch.cat(parts, 1)


def grid_of(call: Call) -> tuple[int, int]:
    """Rows and columns of what looks at words. ValueError where they are not known."""
    grids = set(call.query_tokens.grids) if call.query_tokens is not None else set()
    n = call.query.shape[2]
    if len(grids) == 1 and (grid := grids.pop())[0] * grid[1] == n:
        return grid
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{call.site}: {n} patches are no square, and their rows and columns are not known")
    return side, side
