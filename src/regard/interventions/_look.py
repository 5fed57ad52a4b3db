"""Where a model looks in its picture while it answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call
from ..seam import intervene
from ..tokens import Tokens
from ._method import STACK, image_keys


@torch.no_grad()
def looks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    method: str,
    *,
    steps: int,
    among: Collection[int],
    within: bool = False,
) -> list[Tensor]:
    """Weights of the newest token on each patch, mean over heads, while the model answers greedily.

    Of each row [step, layer, row, column], in steps up to the one that ends the answer, `steps` at most; of the layers
    `among` of the language model, in order. within: of each head, weights as if there were the picture alone, which
    sum to 1. ValueError, which names the method, where a layer does not see the whole
    picture, or where in it the image tokens are is not known.
    """
    watching = _Watching(among, method, within)
    with intervene(model, watching):
        found = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=steps, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
    made = found.sequences[:, inputs["input_ids"].shape[1] :]
    tokens = watching.tokens
    assert tokens is not None
    rows = torch.stack([torch.stack(watching.rows[layer]) for layer in sorted(watching.rows)], 2)
    each = []
    for i, (n, image) in enumerate(zip(lengths(model, made), tokens.role("image"))):
        places = tokens.places[i, image]
        if not len(places) or bool((places[:, 1:3] < 0).any()):
            raise ValueError(f"{method}: where image tokens of {type(model).__name__} are in the picture is not known")
        row, column = places[:, 1], places[:, 2]
        grid = rows.new_zeros(n, rows.shape[2], int(row.max()) + 1, int(column.max()) + 1)
        grid[:, :, row, column] = rows[:n, i][..., : image.shape[0]][..., image.to(rows.device)]
        each.append(grid)
    return each


def lengths(model: nn.Module, made: Tensor) -> list[int]:
    """How many tokens each row [batch, token] has up to its end."""
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = torch.isin(made, made.new_tensor([] if end is None else end))
    after = ends.long().cumsum(1) - ends.long()
    return (after == 0).sum(1).tolist()


class _Watching:
    """Keeps what the last query of each call of some layers looks at."""

    def __init__(self, among: Collection[int], method: str, within: bool) -> None:
        self.among, self.method, self.within = among, method, within
        self.rows: dict[int, list[Tensor]] = {layer: [] for layer in among}  # [batch, key], of the prompt's keys
        self.tokens: Tokens | None = None

    def inputs(self, call: Call) -> Call:
        if call.site.stack != STACK or call.site.layer not in self.among:
            return call
        n = call.query.shape[2]
        if self.tokens is None:
            self.tokens = call.tokens
        image = image_keys(call)
        if image is None or self.tokens is None or int(image.sum()) != int(self.tokens.role("image").sum()):
            raise ValueError(f"{self.method} asks how {call.site} looks at the picture, and it does not see all of it")
        heads = call.weights.rows(n - 1, n)[:, :, 0].float()  # [batch, head, key]
        heads = of_picture(heads, image) if self.within else heads
        self.rows[call.site.layer].append(heads.mean(1)[:, : len(self.tokens)])
        return call


def of_picture(weights: Tensor, image: Tensor) -> Tensor:
    """Weights [batch, head, key] as if the keys of the picture [batch, key] were all: they sum to 1."""
    picture = weights * image[:, None].to(weights)
    return picture / picture.sum(-1, keepdim=True).clamp(min=torch.finfo(picture.dtype).tiny)
