"""Image tokens that matter least leave a model, in three stages; what is cut first is merged into what stays.

Yang et al., VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization
(arXiv:2508.05211), by the authors' code; we had the code and the abstract, not the whole text. A token matters by what
the global patches of the tower's last layer give it: those that receive more than `t` times the mean. `alpha` times a
softmax over the entropy of the patches' pixels may be added; every setting that the authors ship has 0. Before the
language model the least important tokens are merged in windows of `window` patches to a side, by their importance, each
to the place of its most important member; at a third and two thirds of the depth the least important leave, without
trace. Tokens leave in fact: layers and caches after run on fewer.

The settings were found by search: for the first prompts of some, what stays of the last token's state at the last layer
(`tune`). The authors search with a Gaussian process, 300 evaluations; here settings are drawn at random, `calls` of
them, with the budget met by the last stage.

Deviations: positions are those of the whole prompt also after the first stage, where the authors' prompt is shorter
from the start. `window` is a share of the grid's side where it is given so, since the authors' 11.8 to 17.4 patches are
of grids of 27. Pictures of one tile, a token for each patch of a tower without a class token, or with one that is left
out, or for each square of patches. Rows of a batch have importances of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..call import Call, Site
from ..seam import intervene
from ..weights import Weights
from . import _towers
from ._method import STACK, Method, image_ids, layers

GRID = 27  # patches to a side, of the tower that the settings are of
SETTINGS = {  # by the average share of tokens that is kept: t, window in patches of that grid, ratios of the stages
    0.10: (39.26, 17.39, (0.1166, 1.0, 0.601)),
    0.25: (34.76, 15.58, (0.265, 0.983, 0.877)),
    0.50: (28.7, 11.8, (0.723, 0.749, 0.487)),
}
T, WINDOW, RATIOS = SETTINGS[0.25]
STAGES = 0, 9 / 28, 18 / 28  # of the depth
NARROWEST = 3.0  # patches to a side, of a window: the least that the authors search
GRAY = 0.3333  # of each colour


class Importance(NamedTuple):
    """Of each token of a prompt how much it matters, NaN where it is of no picture; and where it stands in which."""

    value: Tensor  # [batch, token]
    places: Tensor  # [batch, token, 3]: number, row and column
    grids: Sequence[tuple[int, int]]  # rows and columns of each picture


@dataclass(kw_only=True)
class vflowopt(Method):
    """Drop the image tokens that matter least: some before the first layer, which are merged, and more on the way.

    importance: as `mattering` finds it for a prompt. ratios: the share of image tokens that is kept at each stage, of
    those before it, 0 to 1; all 1 changes nothing. window: side of the windows in which dropped tokens are merged, as a
    share of the picture's, 0 to 1, and three patches at least; 0 merges none.

    ValueError where the model reads no image tokens, or the prompt is of another batch.

    >>> import regard
    >>> from regard.interventions.vflowopt import mattering, vflowopt
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["describe"])
    >>> with regard.intervene(model, vflowopt(importance=mattering(model, inputs))):
    ...     found = model(**inputs)
    >>> [layer.keys.shape[2] for layer in found.past_key_values.layers]  # of 70 tokens, 64 are patches
    [24, 24, 24, 24, 22, 22]
    """

    off: ClassVar[Mapping[str, Any]] = {"ratios": (1.0, 1.0, 1.0)}
    needs = "which image tokens matter"

    importance: Importance
    ratios: Sequence[float] = RATIOS
    window: float = WINDOW / GRID
    _stages: list[int] = field(default_factory=list, init=False, repr=False)  # the layer of each
    _left: Tensor | None = field(
        default=None, init=False, repr=False
    )  # [batch, token] image tokens, as a prompt is read

    def __post_init__(self) -> None:
        self.ratios = tuple(self.ratios)
        if len(self.ratios) != 3 or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"vflowopt: ratios are three shares, 0 to 1, not {list(self.ratios)}")
        if not 0 <= self.window <= 1:
            raise ValueError(f"vflowopt: window is a share of the picture's side, 0 to 1, not {self.window}")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        t: float = T,
        alpha: float = 0.0,
        **knobs: Any,
    ) -> Self:
        """With what matters in the pictures of `inputs`."""
        found = knobs.pop("importance", None)
        return cls(importance=mattering(model, inputs, t=t, alpha=alpha) if found is None else found, **knobs)

    def begin(self, model: nn.Module) -> None:
        image_ids(model, "vflowopt")
        known = layers(model, "vflowopt")
        self._stages = stages(known)
        self._left = None

    def entering(self, site: Site, hidden: Tensor) -> Tensor:
        """Before the first layer, what leaves there is merged into what takes its place."""
        if site.stack != STACK or site.layer != self._stages[0] or min(self.ratios) == 1 or not self._fits(hidden):
            return hidden
        value = self.importance.value
        hidden, self._left = hidden.clone(), torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for row in range(len(hidden)):
            mine = min(row, len(value) - 1)
            image = ~value[mine].isnan()
            places = self.importance.places[mine, image]
            sides = torch.tensor([max(self.importance.grids[i]) for i in places[:, 0].tolist()])
            windows = (self.window * sides).clamp(min=NARROWEST) if self.window else None
            at = image.nonzero()[:, 0].to(hidden.device)
            kept, merged = recycle(
                hidden[row, at], value[mine, image].to(hidden.device), places, windows, keep=self.ratios[0]
            )
            hidden[row, at], self._left[row, at] = merged, kept
        return hidden

    def keeps(self, site: Site, hidden: Tensor, positions: Tensor) -> Tensor | None:
        if site.stack != STACK or site.layer not in self._stages or min(self.ratios) == 1:
            return None
        whole = site.layer == self._stages[0] and not bool(positions[0, 0])  # later, the first token may have left
        if whole and not self._fits(hidden):
            raise ValueError(
                f"vflowopt was fitted to a prompt {list(self.importance.value.shape)}, and the model reads "
                f"{list(hidden.shape[:2])} tokens: fit it to what is read, and all of it at once"
            )
        if int(positions[0, -1]) >= self.importance.value.shape[1]:
            return None  # nothing leaves while words are generated
        assert self._left is not None
        value = self.importance.value.to(hidden.device).expand(len(hidden), -1)
        for stage, layer in enumerate(self._stages):
            if layer == site.layer and stage:
                self._left = least_out(value, self._left, self.ratios[stage])
        return (self._left | value.isnan()).gather(1, positions)

    def _fits(self, hidden: Tensor) -> bool:
        rows, n = self.importance.value.shape
        return rows in (1, len(hidden)) and n == hidden.shape[1] > 1


def stages(known: Sequence[int]) -> list[int]:
    """The first layer, and those at 9 and 18 of 28, of the layers that there are."""
    return [known[min(round(share * len(known)), len(known) - 1)] for share in STAGES]


def cost(ratios: Sequence[float], depth: int = 28) -> float:
    """Image tokens that a cache holds in all layers, in shares of what it would hold, 0 to 1.

    >>> round(cost((0.265, 0.983, 0.877)), 3)
    0.25
    """
    _, second, third = stages(range(depth))
    first = ratios[0]
    return (second + (third - second) * ratios[1] + (depth - third) * ratios[1] * ratios[2]) * first / depth


def least_out(value: Tensor, left: Tensor, ratio: float) -> Tensor:
    """Of what is left of image tokens [batch, token] the share that matters most, by `value`. [batch, token] boolean"""
    ranks = value.masked_fill(~left, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    many = left.sum(1, keepdim=True)
    return left & (ranks < many - ((1 - ratio) * many).round())


def recycle(
    features: Tensor, importance: Tensor, places: Tensor, windows: Tensor | None, *, keep: float
) -> tuple[Tensor, Tensor]:
    """Which tokens of a prompt's pictures stay, [token] boolean, and what all are then, [token, dim].

    So many of the least important are taken out that a share of `keep` stays, and one more for each window. Of each
    window that loses any, the most important of these gets the mean of them all, by importance, and stays. places:
    picture, row and column, [token, 3]. windows: sides of the windows at each token, whole or not, [token]; None where
    what leaves is lost.

    >>> import torch
    >>> features, importance = torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0.1, 0.3, 0.6])
    >>> places = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    >>> recycle(features, importance, places, torch.full((3,), 1.7), keep=2 / 3)
    (tensor([False,  True,  True]), tensor([[1.0000],
            [2.5000],
            [9.0000]]))
    """
    n = len(features)
    kept, merged = torch.ones(n, dtype=torch.bool, device=features.device), features.clone()
    reduce = round(n * (1 - keep))
    if not reduce:
        return kept, merged
    more = 0 if windows is None else int(windows.square().reciprocal().sum())
    out = importance.argsort(stable=True)[: min(reduce + more, n)]
    kept[out] = False
    if windows is None:
        return kept, merged
    cells = torch.cat([places[:, :1], (places[:, 1:] / windows[:, None]).floor().long()], dim=1)
    cells = cells.unique(dim=0, return_inverse=True)[1].to(out.device)[out]
    for cell in cells.unique().tolist():
        group = out[cells == cell]  # the most important last
        share = importance[group].clamp(min=1e-12)
        merged[group[-1]] = ((share / share.sum())[:, None].to(features) * features[group]).sum(0)
        kept[group[-1]] = True
    return kept, merged


def mattering(model: nn.Module, inputs: Mapping[str, Any], *, t: float = T, alpha: float = 0.0) -> Importance:
    """How much each image token of each prompt matters, in one run of the model; see `importance`.

    t: of a picture of 27 x 27 patches, in proportion of others: what is so many times a mean must be there to receive.

    ValueError where the model reads no image tokens, a row has no picture or padding on the right, or where the entropy
    counts (`alpha` is not 0) and `inputs` hold no pictures in rows and columns of pixels.
    """

    def look(call: Call) -> Tensor:
        assert call.tokens is not None
        patches = call.tokens.role("image")
        return importance(call.weights, patches, t=t * int(patches[0].sum()) / GRID**2)

    layer: Any = getattr(model.config, "vision_feature_layer", -1)
    layer = layer if isinstance(layer, int) else -1
    grids, tokens = _towers.read(
        model, inputs, look, lambda depth: [depth[layer if layer < 0 else layer - 1]], "vflowopt"
    )
    if alpha:
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != len(grids[0]):
            raise ValueError("vflowopt: entropy is of pictures [picture, channel, row, column], one a place; alpha=0")
        for (i, grid), picture in zip(sorted(grids[0].items()), pixels):
            patch = picture.shape[-1] // grid.shape[1]
            bits = patch_entropy((picture * 255).long() % 256, patch)
            grids[0][i] = grid + alpha * bits.softmax(0).view_as(grid)
    value = _towers.at_tokens(grids[0], tokens, "vflowopt")
    return Importance(value, tokens.places[..., :3], tokens.grids)


def importance(weights: Weights, patches: Tensor, *, t: float = T) -> Tensor:
    """What each key gets of the global patches, mean over heads and over these: higher matters more. [batch, key]

    Global are patches [batch, key] that receive more than `t` times the mean of patches; where none does, all of them.
    """
    received = weights.received(by=patches).mean(1)
    mean = (received * patches).sum(1, keepdim=True) / patches.sum(1, keepdim=True)
    chosen = patches & (received > t * mean)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, patches)
    return weights.received(by=chosen).mean(1) / chosen.sum(1, keepdim=True)


def patch_entropy(picture: Tensor, patch: int) -> Tensor:
    """Entropy of the gray of each patch's pixels, bits. picture: bytes [3, row, column]. [patch]

    >>> import torch
    >>> half = torch.zeros(3, 2, 4)
    >>> half[:, 0, :2] = 255
    >>> patch_entropy(half, 2).abs()
    tensor([1., 0.])
    """
    gray = (picture.float() * GRAY).sum(0).round().long()
    blocks = gray.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).flatten(0, 1)
    share = functional.one_hot(blocks, 256).float().mean(1)
    return -(share * (share + 1e-10).log2()).sum(1)


def tune(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: float = 0.25,
    calls: int = 300,
    seed: int = 0,
) -> tuple[dict[str, Any], float]:
    """Settings for `fit` that keep most of the last token's state at the last layer, and how much: mean cosine, to 1.

    inputs: prompts with pictures. target: the share of image tokens that caches hold on average. calls: settings that
    are tried, drawn by `seed` from the authors' ranges, the first being those that they found; each is a run.
    """
    if not 0 < target < 1:
        raise ValueError(f"vflowopt: target is a share of the image tokens, more than 0 and less than 1, not {target}")
    plain, depth = _last(model, inputs), len(layers(model, "vflowopt"))
    rng = torch.Generator().manual_seed(seed)
    tried = []
    if target in SETTINGS:
        t, window, ratios = SETTINGS[target]
        tried.append({"t": t, "window": window / GRID, "ratios": ratios})
    while len(tried) < calls:
        first, second, t, window = torch.rand(4, generator=rng).tolist()
        ratios = budgeted(min(1.0, target * (1 + first / 2)), 0.533 + 0.467 * second, target, depth)
        if ratios is not None:
            tried.append({"t": 50 * t, "window": (3 + 21 * window) / GRID, "ratios": ratios})
    best: tuple[dict[str, Any], float] = {}, -2.0
    for settings in tried:
        with intervene(model, vflowopt.fit(model, inputs, **settings)):
            found = _last(model, inputs)
        score = float(functional.cosine_similarity(plain, found, dim=-1).nan_to_num(0.0).mean())
        best = max(best, (settings, score), key=lambda pair: pair[1])
    return best


def budgeted(first: float, second: float, target: float, depth: int = 28) -> tuple[float, float, float] | None:
    """Ratios with the third such that `cost` is the target; None where none is.

    >>> [round(ratio, 2) for ratio in budgeted(0.3, 0.8, 0.25)]
    [0.3, 0.8, 0.89]
    """
    _, middle, last = stages(range(depth))
    third = (target * depth / first - middle - (last - middle) * second) / ((depth - last) * second)
    return (first, second, third) if 0 <= third <= 1 else None


@torch.no_grad()
def _last(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The last token's state at the last layer of the language model. [batch, dim]"""
    reader = _Last(max(layers(model, "vflowopt")))
    with intervene(model, reader):
        model(**inputs, use_cache=False)
    return reader.state


class _Last:
    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.state: Tensor

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == STACK and site.layer == self.layer:
            self.state = hidden[:, -1].float()
        return hidden
