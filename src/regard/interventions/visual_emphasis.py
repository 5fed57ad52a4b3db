"""Image tokens that the vision tower finds salient early, and its outliers, get higher scores from the last query.

Arif et al., Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model
(arXiv:2501.12206), by the authors' code; of the paper we had the abstract. Two sets of patches come from what the
tower's class token looks at, summed over heads: of the first layer the quarter with most, of the last layer but one the
outliers, which lie above the upper quartile by more than 1.5 times the distance of the quartiles. Those of the first
set that are no outliers get `alpha`, outliers get `beta` times the size of their score more, whatever its sign: scores
above 0 grow, scores below 0 come closer to it. It is done in all heads, from the third of 32 layers on.

Deviations: the paper has a second stream of spatially significant patches, which its code draws from sums that are 1
for every patch and takes none of; and a factor for each head by how much it sees, which its code has not. Neither is
here. Where several patches make one image token, as in InternVL, what they get
is averaged. In models of other depths the
first layer is 1/16 down.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..call import Call
from . import _towers
from ._method import STACK, Method, at_last, at_prompt, image_ids, image_keys, layers, scores

RATIO, FIRST = 0.25, 1 / 16
FENCE = 1.5  # distances of the quartiles


class Emphasis(NamedTuple):
    """Which tokens of a prompt are salient patches, and which are outliers. [batch, token] boolean"""

    top: Tensor
    bottom: Tensor


@dataclass(kw_only=True)
class visual_emphasis(Method):
    """Raise the last query's scores of salient patches by `alpha` times their size, and those of outliers by `beta`.

    tokens: as `emphasised` finds them for a prompt. alpha, beta: 0 and up; both 0 change nothing. among: layers; None
    for the paper's.

    The last query of each call is changed: of a prompt that is read in pieces, each piece's.

    ValueError where the model reads no image tokens, has not these layers, or the prompt is of another batch; where a
    method that edits weights comes before it, which leaves no scores.

    >>> import regard
    >>> from regard.interventions.visual_emphasis import emphasised, visual_emphasis
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["describe"])
    >>> tokens = emphasised(model, inputs)
    >>> int(tokens.top.sum()), int(tokens.bottom.sum())
    (16, 12)
    >>> with regard.intervene(model, visual_emphasis(tokens=tokens)):
    ...     ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"alpha": 0.0, "beta": 0.0}
    needs = "patches that the tower finds salient"

    tokens: Emphasis
    alpha: float = 0.7
    beta: float = 0.3
    among: Collection[int] | None = None
    _layers: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta) < 0:
            raise ValueError(f"visual-emphasis: alpha and beta are 0 or more, not {self.alpha} and {self.beta}")

    @classmethod
    def fit(
        cls, model: nn.Module, inputs: Mapping[str, Any], processor: Any = None, *, ratio: float = RATIO, **knobs: Any
    ) -> Self:
        """With the patches that the model's tower finds salient in `inputs`."""
        tokens = knobs.pop("tokens", None)
        return cls(tokens=emphasised(model, inputs, ratio=ratio) if tokens is None else tokens, **knobs)

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "visual-emphasis")
        known = layers(model, "visual-emphasis")
        self._layers = set(known[max(1, round(FIRST * len(known))) :] if self.among is None else self.among)
        if missing := self._layers - set(known):
            raise ValueError(f"visual-emphasis: {type(model).__name__} has no layer {min(missing)}")

    def inputs(self, call: Call) -> Call:
        chosen = call.site.stack == STACK and call.site.layer in self._layers
        if not chosen or not (self.alpha or self.beta) or image_keys(call) is None:
            return call
        top, bottom = (at_prompt(call, some, "visual-emphasis") for some in self.tokens)
        share = self.alpha * (top & ~bottom) + self.beta * bottom
        return at_last(call, share[:, None] * scores(call, call.query.shape[2] - 1, "visual-emphasis").abs())


def emphasised(model: nn.Module, inputs: Mapping[str, Any], *, ratio: float = RATIO) -> Emphasis:
    """Which image tokens of each prompt the tower finds salient, and which are outliers, in one run of it.

    ratio: share of the patches that are salient, 0 to 1.

    ValueError where the model reads no image tokens, its tower has no class token, or they are not as many as patches,
    or as one for each square of some.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"visual-emphasis: ratio is a share of the patches, more than 0 and at most 1, not {ratio}")

    def of_class_token(call: Call) -> Tensor:
        assert call.tokens is not None
        if not call.tokens.role("special")[:, 0].all():
            raise ValueError(
                f"visual-emphasis reads what a tower's class token looks at, and {type(model).__name__}'s has none"
            )
        return call.weights.rows(0, 1)[:, :, 0].sum(1)

    grids, tokens = _towers.read(
        model, inputs, of_class_token, lambda depth: (depth[0], depth[max(0, len(depth) - 2)]), "visual-emphasis"
    )
    early, late = (_towers.at_tokens(some, tokens, "visual-emphasis") for some in grids)
    pictures, ids = tokens.places[..., 0], inputs["input_ids"]
    top, bottom = torch.zeros(2, *ids.shape, dtype=torch.bool)
    for i in pictures[tokens.role("image")].unique().tolist():
        here = tokens.role("image") & (pictures == i)
        top[here], bottom[here] = salient(early[here][None], ratio)[0], outliers(late[here][None])[0]
    return Emphasis(top.to(ids.device), bottom.to(ids.device))


def salient(looks: Tensor, ratio: float = RATIO) -> Tensor:
    """The patches of each picture that are looked at most. [picture, patch] boolean"""
    best = looks.topk(int(looks.shape[1] * ratio), dim=1).indices
    return torch.zeros_like(looks, dtype=torch.bool).scatter_(1, best, True)


def outliers(looks: Tensor) -> Tensor:
    """The patches of each picture above its upper quartile by 1.5 distances of the quartiles. [picture, patch] boolean

    >>> import torch
    >>> outliers(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 9]])).sum().item()
    1
    """
    low, high = torch.quantile(looks, torch.tensor([0.25, 0.75], device=looks.device), dim=1)
    return looks > (high + FENCE * (high - low))[:, None]
