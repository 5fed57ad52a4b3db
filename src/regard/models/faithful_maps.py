"""Finds the parts of what is shown, then sees only them: what lies outside the map cannot reach the answer.

Aniraj et al., Inherently Faithful Attention Maps for Vision Transformers (arXiv:2506.08915), with the details of the
authors' code (ananthu-aniraj/ifam). A first vision transformer assigns each patch to one of some part prototypes or to
background; the union of parts, made binary, hides the other patches from a second one: they are no keys in any layer.

Both are models of transformers with a class token, as they are. Deviations: training follows the paper, weights being
exp(score) m / sum exp(score) m with a straight-through m, where the code casts m to boolean and so cuts its gradient;
Gumbel noise is drawn in training only, where the code draws it always; of parts, features are compared part against
part, where the code's trainer swaps the axes. `without` and `least`, changes at run time, are ours in form.
Hidden patches still run as queries that nobody reads, where the code takes them out: the same values at more cost. The
code's concentration loss, whose weight is 0, is left out, and its optimiser is left to any trainer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..call import Call
from ..seam import intervene
from ._parts import background, entropy, inverse, moved, orthogonality, presence, total_variation, turns

WEIGHTS: Mapping[str, float] = {"background": 2.0}  # of losses that do not count once


class Found(NamedTuple):
    """What the first stage makes of pictures."""

    maps: Tensor  # of each patch over parts, background last [batch, part + 1, row, column]
    logits: Tensor  # their logarithms but for a constant, the same shape
    features: Tensor  # of parts and background, normed together [batch, dim, part + 1]
    scores: Tensor  # of classes, by each part [batch, class, part]


class Choice(NamedTuple):
    """Which patches are seen."""

    mask: Tensor  # boolean [batch, row, column]
    shares: Tensor  # 0 to 1, of each patch's likeliest part and of background [batch, 2, row, column]
    whole: Tensor  # of all parts, through which the first stage learns [batch, row, column]


class Faithful(NamedTuple):
    """An answer, and what it was made from."""

    logits: Tensor  # of the second stage [batch, class]
    first_logits: Tensor  # of the first, the mean over parts [batch, class]
    mask: Tensor  # the patches that the second stage sees, boolean [batch, row, column]
    maps: Tensor  # as in `Found`
    features: Tensor


def _base(vit: nn.Module, asked_by: str) -> Any:
    base: Any = getattr(vit, "base_model", vit)
    embeddings = getattr(base, "embeddings", None)
    if not isinstance(getattr(embeddings, "cls_token", None), nn.Parameter) or not hasattr(base.config, "patch_size"):
        raise TypeError(
            f"{asked_by}: takes a vision transformer of transformers with a class token, such as ViTModel or "
            f"Dinov2Model; got {type(vit).__name__}"
        )
    return base


def _grid(base: Any, pictures: Tensor) -> tuple[int, int]:
    size = base.config.patch_size
    if pictures.ndim != 4 or pictures.shape[-2] % size or pictures.shape[-1] % size:
        raise ValueError(
            f"faithful_maps: pictures are [batch, channel, row, column], of whole patches of {size} pixels; got "
            f"{list(pictures.shape)}"
        )
    return pictures.shape[-2] // size, pictures.shape[-1] // size


class PartFinder(nn.Module):
    """The first stage: which part each patch belongs to, and what the parts say of the class.

    parts: how many prototypes, with one more for background; drop: the chance that a part says nothing of the class in
    training. `regard.record` sees the layers of `vit`. TypeError for a model without a class token.

    >>> import torch
    >>> from regard import zoo
    >>> from regard.models.faithful_maps import PartFinder
    >>> PartFinder(zoo.load("viewer")[0], parts=3, classes=2)(torch.zeros(1, 3, 64, 64)).maps.shape
    torch.Size([1, 4, 8, 8])
    """

    def __init__(self, vit: nn.Module, *, classes: int, parts: int = 8, drop: float = 0.3) -> None:
        super().__init__()
        if parts < 1 or classes < 1 or not 0 <= drop < 1:
            raise ValueError(
                f"PartFinder: parts and classes are 1 or more, drop 0 or more and below 1; got {parts}, {classes}, "
                f"{drop}"
            )
        self.vit = _base(vit, "PartFinder")
        dim = self.vit.config.hidden_size
        self.prototypes = nn.Parameter(torch.empty(parts + 1, dim))
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))
        self.norm = nn.LayerNorm([dim, parts + 1])
        self.dropout, self.read = nn.Dropout1d(drop), nn.Linear(dim, classes, bias=False)

    def patches(self, pictures: Tensor) -> Tensor:
        """What the backbone gives of pictures [batch, channel, row, column]. [batch, row, column, dim]"""
        grid = _grid(self.vit, pictures)
        return self.vit(pictures).last_hidden_state[:, -grid[0] * grid[1] :].unflatten(1, grid)

    def forward(self, pictures: Tensor, *, patches: Tensor | None = None) -> Found:
        """pictures: [batch, channel, row, column]; patches: of `patches`, where a frozen backbone ran before.

        In training maps are drawn with Gumbel noise, as torch's seed says.
        """
        seen = self.patches(pictures) if patches is None else patches
        if seen.ndim != 4 or len(seen) != len(pictures) or seen.shape[-1] != self.prototypes.shape[1]:
            raise ValueError(
                f"PartFinder: patches of {len(pictures)} pictures are [{len(pictures)}, row, column, "
                f"{self.prototypes.shape[1]}]; got {list(seen.shape)}"
            )
        logits = 2 * seen @ self.prototypes.T - seen.square().sum(-1, keepdim=True) - self.prototypes.square().sum(-1)
        logits = logits.movedim(-1, 1)
        maps = F.gumbel_softmax(logits, dim=1) if self.training else logits.softmax(1)
        features = self.norm(torch.einsum("brcd,bprc->bdp", seen, maps) / (seen.shape[1] * seen.shape[2]))
        scores = self.read(self.dropout(features[..., :-1].mT)).mT
        return Found(maps, logits, features, scores)


def chosen(logits: Tensor, *, noise: Tensor | None = None, tau: float = 1.0, drop: float = 0.0) -> Choice:
    """Which patches are seen: those whose likeliest part is no less likely than the background.

    logits: of parts, the background last [batch, part + 1, row, column]; noise: added to them; tau: temperature of
    their softmax, above 0; drop: the chance that a part of a picture counts for nothing, as torch's seed says.

    >>> import torch
    >>> from regard.models.faithful_maps import chosen
    >>> found = chosen(torch.tensor([[0.0, -2.0, -1.0], [-2.0, -2.0, 0.0]]).view(2, 3, 1, 1))
    >>> found.mask.flatten().tolist()
    [True, False]
    """
    if tau <= 0:
        raise ValueError(f"faithful_maps: tau is above 0; got {tau}")
    shares = ((logits if noise is None else logits + noise) / tau).softmax(1)
    parts, background = shares[:, :-1], shares[:, -1]
    if drop:
        parts = parts * (torch.rand(parts.shape[:2], device=parts.device) >= drop)[..., None, None]
    best = parts.amax(1)
    return Choice(best >= background, torch.stack([best, background], 1), parts.sum(1))


class _Hidden:
    """Keys that no query sees."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen  # boolean [batch, key]

    def inputs(self, call: Call) -> Call:
        return call.but(mask=self.seen[:, None, None])


class _Weighed:
    """Weights times the share of each key, and rows that sum to one again: this passes a gradient to the shares."""

    def __init__(self, share: Tensor) -> None:
        self.share = share  # [batch, key]

    def weights(self, call: Call, weights: Tensor, rows: range) -> Tensor:
        weights = weights * self.share[:, None, None].to(weights)
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


class MaskedViT(nn.Module):
    """The second stage: classes, from the patches that a mask shows. `regard.record` sees what is left of the weights.

    >>> import torch
    >>> from regard import zoo
    >>> from regard.models.faithful_maps import MaskedViT
    >>> second = MaskedViT(zoo.load("viewer")[0], classes=2).eval()
    >>> mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    >>> one, other = (second(torch.full((1, 3, 64, 64), x), mask) for x in (0.0, 1.0))
    >>> torch.equal(one, other)
    True
    """

    def __init__(self, vit: nn.Module, *, classes: int) -> None:
        super().__init__()
        self.vit = _base(vit, "MaskedViT")
        dim = self.vit.config.hidden_size
        self.norm = nn.LayerNorm(dim, eps=self.vit.config.layer_norm_eps)
        self.read = nn.Linear(dim, classes, bias=False)

    def forward(self, pictures: Tensor, mask: Tensor) -> Tensor:
        """Scores of classes. [batch, class]

        mask: [batch, row, column] of patches. Boolean: True is seen, and the rest is no key in any layer. Of floats, 0
        to 1: each weight is multiplied by its key's value, and rows sum to one again; the mask gets a gradient. The
        class token and registers are always seen.
        """
        rows, columns = _grid(self.vit, pictures)
        known = mask.dtype == torch.bool or (mask.is_floating_point() and bool((mask >= 0).all()))
        if mask.shape != (len(pictures), rows, columns) or not known:
            raise ValueError(
                f"MaskedViT: a mask of these pictures is boolean, or floats from 0 to 1, of shape "
                f"{[len(pictures), rows, columns]}; got {mask.dtype} {list(mask.shape)}"
            )
        always = 1 + getattr(self.vit.config, "num_register_tokens", 0)
        keys = F.pad(mask.flatten(1), (always, 0), value=1)
        with intervene(self.vit, _Hidden(keys) if mask.dtype == torch.bool else _Weighed(keys)):
            hidden = self.vit(pictures).last_hidden_state
        return self.read(self.norm(hidden[:, 0]))


class FaithfulMaps(nn.Module, PyTorchModelHubMixin):
    """Both stages: an answer from the parts that were found, and from nothing else.

    first, second: vision transformers of transformers, of patches of the same size; they may be trained, and share
    nothing. `from_pretrained(folder, first=..., second=...)` reads what `save_pretrained` wrote.

    >>> import torch
    >>> from regard import zoo
    >>> from regard.models.faithful_maps import faithful_maps
    >>> model = faithful_maps(zoo.load("viewer")[0], classes=2, parts=3).eval()
    >>> found = model(torch.zeros(1, 3, 64, 64))
    >>> found.logits.shape, found.mask.shape
    (torch.Size([1, 2]), torch.Size([1, 8, 8]))
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        *,
        classes: int,
        parts: int = 8,
        tau: float = 1.0,
        drop: float = 0.3,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"FaithfulMaps: tau is above 0; got {tau}")
        self.first = PartFinder(first, classes=classes, parts=parts, drop=drop)
        self.second = MaskedViT(second, classes=classes)
        sizes = [stage.vit.config.patch_size for stage in (self.first, self.second)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"FaithfulMaps: both stages have patches of one size; got {sizes[0]} and {sizes[1]}")
        self.tau, self.drop = tau, drop

    def forward(
        self,
        pictures: Tensor,
        *,
        patches: Tensor | None = None,
        without: Collection[int] = (),
        least: float | None = None,
    ) -> Faithful:
        """pictures: [batch, channel, row, column]; patches: of `first.patches`, where its backbone ran before.

        without: parts whose patches are hidden as background is; least: so are patches whose likeliest part has a logit
        (minus a squared distance) below it. In training noise is drawn and parts are dropped, as torch's seed says, and
        the first stage learns through the mask. ValueError for a part that there is not.
        """
        found = self.first(pictures, patches=patches)
        parts = found.logits.shape[1] - 1
        if any(not 0 <= part < parts for part in without):
            raise ValueError(f"FaithfulMaps: parts are 0 to {parts - 1}; got without={list(without)}")
        noise = -torch.empty_like(found.logits).exponential_().log() if self.training else None
        drop = self.drop if self.training else 0.0
        mask, _, whole = chosen(found.logits, noise=noise, tau=self.tau, drop=drop)
        best, part = found.logits[:, :-1].max(1)
        for gone in without:
            mask = mask & (part != gone)
        if least is not None:
            mask = mask & (best >= least)
        seen = mask + (whole - whole.detach()) if self.training else mask  # 0 or 1, with the gradient of `whole`
        return Faithful(self.second(pictures, seen), found.scores.mean(-1), mask, found.maps, found.features)

    def losses(
        self,
        pictures: Tensor,
        labels: Tensor,
        *,
        patches: Tensor | None = None,
        again: tuple[Tensor, Tensor] | None = None,
        turned: float = 0.2,
    ) -> dict[str, Tensor]:
        """Every term that training makes small, by name; `total` is their sum with `WEIGHTS`.

        turned: how far the equivariance term turns (in half turns), shifts and scales the pictures at most, at random
        as torch's seed says. patches, again: where the first backbone is frozen and ran before, its patches of the
        pictures, and those of `moved(pictures, turn)` with that `turn`.
        """
        found = self(pictures, patches=patches)
        if again is None:
            turn = turns(len(pictures), most=turned).to(pictures)
            other = self.first(moved(pictures, turn)).maps
        else:
            turn = again[1]
            other = self.first(pictures, patches=again[0]).maps
        back = moved(other, inverse(turn))
        terms = {
            "second": F.cross_entropy(found.logits, labels),
            "first": F.cross_entropy(found.first_logits, labels),
            "presence": presence(found.maps),
            "equivariance": 1 - F.cosine_similarity(found.maps[:, :-1].flatten(1), back[:, :-1].flatten(1)).mean(),
            "total_variation": total_variation(found.maps),
            "background": background(found.maps),
            "entropy": entropy(found.maps),
            "orthogonality": orthogonality(found.features),
        }
        return {**terms, "total": torch.stack([WEIGHTS.get(name, 1.0) * term for name, term in terms.items()]).sum()}


def faithful_maps(vit: nn.Module, **sizes: Any) -> FaithfulMaps:
    """Both stages from copies of one model, its own weights untouched; the first copy is frozen, as in the paper.

    sizes: those of `FaithfulMaps`. What is new in the first stage trains: prototypes, norm and the reading of classes.
    """
    model = FaithfulMaps(copy.deepcopy(vit), copy.deepcopy(vit), **sizes)
    model.first.vit.requires_grad_(False)
    return model
