"""Attentional vision calibration: what the few image tokens that soak up attention say is taken off the logits.

Woo et al., Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models
(arXiv:2405.17820), by the authors' code; we had the code and the abstract, not the whole text. `alpha` is the 2.5 of
their script for AMBER with LLaVA-1.5; that for POPE has 1 (and 3 in a list), which is the default of their program.
They draw the next token from what is left; here that is up to `generate`.

Layers and blind tokens are found for each row of a batch; the authors' code has batches of one, and pools the layers'
shares over the batch. Image tokens are emptied where they enter the first layer, which for a model that adds learned
positions to them is after these. What the last prompt token looks at is read in a pass of its own over the prompt, as
the one that generates is over when logits are processed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..call import Call, Site
from ..seam import intervene
from ._branch import Branch, Contrasted
from ._method import STACK, image_ids, image_keys


class avisc(Contrasted):
    """Logits contrasted with those that see the blind image tokens only.

    A logits processor: (1 + alpha) times the model's logits, less alpha times those of a second run in which all other
    image tokens are empty. Tokens less likely than `beta` times the likeliest are left out. `alpha` 0 leaves greedy
    decoding as it is.

    inputs: as they go to `generate`; left padding is fine. top_p, deviations: see `blind_tokens`.

    >>> import regard
    >>> from regard.interventions.avisc import avisc
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(2)), ["describe", "describe"])
    >>> method = avisc(model, inputs)
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=8, do_sample=False)
    >>> bool(method.blind.any(1).all())  # some image tokens of each row
    True
    """

    needs = "the blind image tokens of a prompt"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        alpha: float = 2.5,
        beta: float = 0.1,
        top_p: float = 0.5,
        deviations: float = 1.0,
    ) -> None:
        self.alpha, self.beta = alpha, beta
        looking = _look(model, inputs)
        self.blind = looking.blind(top_p, deviations)
        empty = _Emptied(looking.image & ~self.blind)
        self.branch = Branch(model, inputs, partial(intervene, model, empty))

    @classmethod
    def fit(cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, **knobs: Any) -> Self:
        return cls(model, inputs, **knobs)


def blind_tokens(model: nn.Module, inputs: Mapping[str, Any], *, top_p: float = 0.5, deviations: float = 1.0) -> Tensor:
    """Which image tokens the last token of each prompt looks at too much. [batch, token] boolean

    Image attention is the mean over heads. Of the layers, those count that look most at the picture and together hold
    `top_p` of all layers' attention to it. Blind are image tokens whose mean over these layers is at least `deviations`
    standard deviations above the picture's mean. A row without a picture has none.

    Raises ValueError where no row holds image tokens.
    """
    return _look(model, inputs).blind(top_p, deviations)


@torch.no_grad()
def _look(model: nn.Module, inputs: Mapping[str, Any]) -> _Looking:
    image_ids(model, "avisc")
    looking = _Looking()
    with intervene(model, looking):
        model(**inputs)
    if not looking.rows:
        raise ValueError(f"avisc looks at a picture, and {type(model).__name__} is given none here")
    return looking


class _Looking:
    """Reads what the last query of each layer of the language model looks at."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # [batch, key], mean over heads
        self.image: Tensor = torch.zeros(0, dtype=torch.bool)

    def inputs(self, call: Call) -> Call:
        if (image := image_keys(call)) is not None:
            n = call.query.shape[2]
            self.rows.append(call.weights.rows(n - 1, n)[:, :, 0].mean(1))
            self.image = image
        return call

    def blind(self, top_p: float, deviations: float) -> Tensor:
        looks = torch.stack(self.rows, 1).masked_fill(~self.image[:, None], 0)  # [batch, layer, key]
        found = torch.zeros_like(self.image)
        for row, (look, image) in enumerate(zip(looks, self.image)):
            if bool(image.any()):
                share = look.sum(-1) / look.sum()
                best = share.sort(descending=True)
                taken = best.indices[: int((best.values.cumsum(0) < top_p).sum()) + 1]
                mean = look[taken].mean(0)
                limit = mean[image].mean() + deviations * mean[image].std()
                found[row] = image & (mean >= limit)
        return found


class _Emptied:
    """Some tokens of the prompt enter the language model as zeros."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def entering(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack != STACK or site.layer != 0 or hidden.shape[1] != self.tokens.shape[1]:
            return hidden
        return hidden.masked_fill(self.tokens[..., None], 0)
