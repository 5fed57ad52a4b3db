"""Dive into attention: what the outlier tokens of the picture alone suggest is taken off the logits.

Gong et al., DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination (arXiv:2410.04514, EMNLP
2024), by the authors' code; the paper's text was not at hand. The first token of the vision tower attends to few
patches of the background, and the language model to the same ones. A second run, which is given these alone, says what
they suggest.

Of the layer whose output the language model is given, query and key count as one head each, as the authors take them
for LLaVA (`heads="joint"`); for InstructBLIP they take the mean of the heads' weights (`"mean"`). Kept tokens stand in
the order of attention, most first, and what follows them is that much closer to the beginning; the others stay where
they are, hidden. `alpha` 2 and 10 patches of 576 are the defaults of their program; their scripts have 0.5 and 4 for
POPE, 1.5 and 4 for CHAIR. They draw the next token from what is left; here that is up to `generate`. LLaVA-NeXT, whose
pictures are in parts, and InstructBLIP, whose pictures are not tokens among words, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..call import Call, Site
from ..seam import intervene
from ._branch import Branch, Contrasted
from ._method import STACK
from ._picture import one_picture

Heads = Literal["joint", "mean"]

SHARE = 10 / 576  # of the patches


class damro(Contrasted):
    """Logits contrasted with those that see only the patches that the tower's first token attends to most.

    A logits processor: (1 + alpha) times the model's logits, less alpha times those of a second run whose picture is
    the `topk` outlier patches. Tokens less likely than `beta` times the likeliest are left out. `alpha` 0 and `beta` 0
    leave the logits as they are.

    inputs: as they go to `generate`; left padding is fine. topk: how many patches, None for 10 of 576, and one at
    least. heads: see above.

    ValueError where the model reads no image tokens, a row has not one picture, the tower has no first token beside
    the patches, or the image tokens are not its patches.

    >>> import regard
    >>> from regard.interventions.damro import damro
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(2)), ["describe", "describe"])
    >>> method = damro(model, inputs, topk=4)
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=8, do_sample=False)
    >>> method.kept.shape
    torch.Size([2, 4])
    """

    needs = "the tower's outlier patches"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        alpha: float = 2.0,
        beta: float = 0.1,
        topk: int | None = None,
        heads: Heads = "joint",
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.kept = outliers(model, inputs, topk=topk, heads=heads)
        self.branch = only(model, inputs, self.kept)

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        return cls(model, inputs, **knobs)


@torch.no_grad()
def outliers(model: nn.Module, inputs: Mapping[str, Any], *, topk: int | None = None, heads: Heads = "joint") -> Tensor:
    """The patches of each row's picture that the tower's first token attends to most, most first. [batch, topk]

    Numbers count the patches as they are read, from 0. See `damro`.
    """
    image = one_picture(model, inputs, "damro")
    looking = _Looking(_fed(model))
    with intervene(model, looking):
        model(**inputs)
    call = looking.call
    places = None if call is None or call.tokens is None else call.tokens.places[0, :, 1]
    if call is None or places is None or bool(places[0] >= 0) or bool((places[1:] < 0).any()):
        raise ValueError(
            f"damro asks which patches the first token of a vision tower attends to, and that of "
            f"{type(model).__name__} has none"
        )
    n = call.key.shape[2] - 1
    if bool((image.sum(1) != n).any()):
        raise ValueError(f"damro: {type(model).__name__} reads {int(image[0].sum())} tokens of {n} patches, not each")
    count = max(1, round(SHARE * n)) if topk is None else topk
    if not 0 < count <= n:
        raise ValueError(f"damro: topk={topk} of {n} patches; give 1 to {n}")
    return first_row(call.query, call.key, call.scale, heads=heads).topk(count).indices


def first_row(query: Tensor, key: Tensor, scale: float, *, heads: Heads = "joint") -> Tensor:
    """How much the first token attends to each of the others, up to an order. [batch, patch]

    query, key: [batch, head, token, dim], the first token and the patches. heads: "joint" takes all heads as one, whose
    scores are the sum of theirs; "mean" the mean of their weights.
    """
    scores = (query[:, :, :1] @ key.mT)[:, :, 0].float()  # [batch, head, token]
    found = scores.sum(1) if heads == "joint" else (scale * scores).softmax(-1).mean(1)
    return found[:, 1:]


def only(model: nn.Module, inputs: Mapping[str, Any], kept: Tensor) -> Branch:
    """A run whose pictures are these patches of each row, in this order. [batch, patch]"""
    image = one_picture(model, inputs, "damro")
    rank = image.long().cumsum(1) - 1  # of each image token
    hidden = image & (rank >= kept.shape[1])
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    prompt = {**inputs, "attention_mask": mask.masked_fill(hidden, 0)}
    return Branch(model, inputs, partial(intervene, model, _Gathered(image, kept)), prompt=prompt)


def _fed(model: nn.Module) -> int | None:
    """The last layer of the tower whose output the language model is given, from the end where it is negative."""
    chosen = getattr(model.config, "vision_feature_layer", -1)
    tower = getattr(model.config, "vision_config", None)
    n = getattr(tower, "num_hidden_layers", 0)
    every = [chosen] if isinstance(chosen, int) else list(chosen or [-1])
    return max(at - 1 if at > 0 else n + at for at in every)


class _Looking:
    """Keeps the call of one layer of the vision tower."""

    def __init__(self, layer: int | None) -> None:
        self.layer, self.call = layer, None

    def inputs(self, call: Call) -> Call:
        if call.site.stack != STACK and call.site.layer == self.layer and not call.site.cross:
            self.call = call
        return call


class _Gathered:
    """Some tokens of each picture [batch, token] enter the language model first of all: `kept` [batch, patch]."""

    def __init__(self, image: Tensor, kept: Tensor) -> None:
        self.image, self.kept = image, kept

    def entering(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack != STACK or site.layer != 0 or hidden.shape[1] != self.image.shape[1]:
            return hidden
        changed = hidden.clone()
        for row, image, kept in zip(range(len(hidden)), self.image, self.kept):
            at = image.nonzero()[:, 0]
            changed[row, at[: len(kept)]] = hidden[row, at[kept]]
        return changed
