"""Prototypes of objects and of the background, given to features that are like them, against attention that is spread.

Remedying Target-Domain Astigmatism for Cross-Domain Few-Shot Object Detection (arXiv:2603.18541, CVPR 2026). In a new
domain a detector's attention reaches further: its distance, `attention_distance`, rises. From the few boxes there are,
`prototypes` takes a mean of features for each class and one of all that is outside; `centre_periphery` gives features
that are like one more of it, and both branches are summed; `alignment` ties each picture's background to a text that
says what it is not. Prototypes act in training and at run time: attention is only measured.

Neither the paper's text nor code of the authors was at hand: formulas are by a reader's note, thresholds, gammas and
softplus by another's code. As written there, a place that is like neither is set to zero, and one that is like both
counts twice; `keep` leaves the former as it is, which is ours. The note's contrastive loss has its temperature above
the fraction only; here it is InfoNCE, mean of rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import sites
from ..call import Site
from ._contrast import both_ways

NAME = "astigmatism"


class astigmatism(nn.Module):
    """An intervention with learned gammas: what a layer gives on, refined by `centre_periphery`.

    foreground [class, width] and background [width]: as `prototypes` finds them, of features that this layer gives;
    made anew where these change. layer, stack: whose output. others: tokens before the patches, which stay as they are.
    The rest as in `centre_periphery`; gammas are trained from the given values on, and stay above 0.

        refine = astigmatism(*prototypes(features, inside), layer=10)
        with regard.intervene(model, refine):
            loss = model(**batch).loss

    ValueError for prototypes that do not fit each other or the layer's states, or with others than a finite length.
    """

    def __init__(
        self,
        foreground: Tensor,
        background: Tensor,
        *,
        layer: int,
        stack: str = "encoder",
        others: int = 1,
        tau_fg: float = 0.75,
        tau_bg: float = 0.75,
        gamma_fg: float = 1.0,
        gamma_bg: float = 0.5,
        temperature: float = 1.0,
        keep: bool = False,
    ) -> None:
        super().__init__()
        _check(foreground, background)
        if gamma_fg <= 0 or gamma_bg <= 0:
            raise ValueError(f"{NAME}: gammas that are learned are above 0, not {gamma_fg} and {gamma_bg}")
        self.foreground, self.background = nn.Buffer(foreground.detach()), nn.Buffer(background.detach())
        self.raw = nn.Parameter(torch.tensor([gamma_fg, gamma_bg]).expm1().log())  # softplus of it are the gammas
        self.layer, self.stack, self.others = layer, stack, others
        self.knobs = {"tau_fg": tau_fg, "tau_bg": tau_bg, "temperature": temperature, "keep": keep}

    def forward(self, features: Tensor) -> Tensor:
        """features: [batch, patch, width]; as these."""
        gamma_fg, gamma_bg = F.softplus(self.raw)
        return centre_periphery(
            features, self.foreground, self.background, gamma_fg=gamma_fg, gamma_bg=gamma_bg, **self.knobs
        )

    def begin(self, model: nn.Module) -> None:
        found = sorted(site.layer for site in sites.find(model).values() if site.stack == self.stack)
        if self.layer not in found:
            raise ValueError(
                f"{NAME}: {type(model).__name__} has no layer {self.layer} in its stack {self.stack!r}; it has {found}"
            )

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack != self.stack or site.layer != self.layer:
            return hidden
        return torch.cat([hidden[:, : self.others], self(hidden[:, self.others :])], 1)


def prototypes(features: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature inside the boxes of each class, and outside all boxes. [class, width], [width]

    features: [batch, token, width]. inside: which tokens lie in a box of each class, as `covered` tells, boolean
    [batch, class, token]. ValueError where a class has none, or nothing is outside.

    >>> import torch
    >>> features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])
    >>> foreground, background = prototypes(features, torch.tensor([[[True, True, False]]]))
    >>> foreground.tolist(), background.tolist()
    ([[2.0, 0.0]], [0.0, 2.0])
    """
    if features.ndim != 3 or inside.ndim != 3 or inside[:, 0].shape != features.shape[:2]:
        raise ValueError(
            f"{NAME}: features are [batch, token, width] and inside [batch, class, token] of the same; got "
            f"{list(features.shape)} and {list(inside.shape)}"
        )
    outside = ~inside.any(1)
    if len(empty := (~inside.any(2).any(0)).nonzero()):
        raise ValueError(f"{NAME}: no token lies in a box of class {int(empty[0])}: leave that class out")
    if not bool(outside.any()):
        raise ValueError(f"{NAME}: all tokens lie in boxes, so there is no background")
    which = inside.to(features)
    foreground = torch.einsum("bct,btw->cw", which, features) / which.sum((0, 2))[:, None]
    return foreground, features[outside].mean(0)


def covered(boxes: Tensor, classes: Tensor, grid: tuple[int, int], n_classes: int) -> Tensor:
    """Which tokens of a picture have their middle in a box of each class. Boolean [class, token]

    boxes: [box, 4], left, top, right and bottom in shares of the picture. classes: [box]. grid: rows and columns.
    """
    down, along = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in grid)
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
    within = ((down >= top) & (down < bottom))[:, :, None] & ((along >= left) & (along < right))[:, None]
    each = F.one_hot(classes, n_classes).bool()
    return (each.mT[..., None] & within.flatten(1)).any(1)


def centre_periphery(
    features: Tensor,
    foreground: Tensor,
    background: Tensor,
    *,
    tau_fg: float = 0.75,
    tau_bg: float = 0.75,
    gamma_fg: float | Tensor = 1.0,
    gamma_bg: float | Tensor = 0.5,
    temperature: float = 1.0,
    keep: bool = False,
) -> Tensor:
    """Features with more of the prototypes that they are like, the rest set to zero. As features.

    features: [..., width]. Where the largest cosine with a class' prototype, foreground [class, width], is above
    `tau_fg`: features plus `gamma_fg` times the prototypes' mean by softmax(cosine / `temperature`). Where that with
    background, [width], is above `tau_bg`: features plus `gamma_bg` times it. Both are summed; places that are like
    neither become zero, or stay with `keep`. Cosines of features after a ReLU are high everywhere: look at the share
    that `like` leaves. ValueError for prototypes of zeros or of other shapes.
    """
    of_class, of_background = like(features, foreground, background)
    shares = (of_class / temperature).softmax(-1)
    centre, periphery = of_class.amax(-1, keepdim=True) > tau_fg, of_background[..., None] > tau_bg
    found = (features + gamma_fg * shares @ foreground) * centre + (features + gamma_bg * background) * periphery
    return torch.where(centre | periphery, found, features) if keep else found


def like(features: Tensor, foreground: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of features with the prototypes, -1 to 1. [..., class] and [...]"""
    _check(foreground, background)
    if features.shape[-1] != len(background):
        raise ValueError(f"{NAME}: features {list(features.shape)} are not as wide as prototypes, {len(background)}")
    unit, classes = F.normalize(features, dim=-1), F.normalize(foreground, dim=-1)
    return unit @ classes.mT, unit @ F.normalize(background, dim=-1)


def alignment(visual: Tensor, text: Tensor, *, tau: float = 0.07) -> Tensor:
    """How badly backgrounds of pictures fit texts of what they are not: InfoNCE, nats, from 0. A scalar, with gradient.

    visual, text: [batch, width], both projected to the same space; row i of one belongs to row i of the other. tau: the
    temperature. The paper adds 1,000 times it to the detector's loss. ValueError for other shapes.
    """
    if visual.ndim != 2 or visual.shape != text.shape:
        raise ValueError(
            f"{NAME}: visual and text are [batch, width] alike; got {list(visual.shape)}, {list(text.shape)}"
        )
    return both_ways(F.normalize(visual, dim=-1) @ F.normalize(text, dim=-1).mT / tau)


def attention_distance(weights: Tensor, grid: tuple[int, int], *, others: int = 1) -> Tensor:
    """Mean distance, in patches, of patches from those that they attend to, over heads. [batch]

    weights: [batch, head, query, key], of this grid's patches after so many other tokens, whose weight is left out.

    >>> import torch
    >>> float(attention_distance(torch.full((1, 1, 2, 2), 0.5), (1, 2), others=0))
    0.5
    """
    rows, columns = grid
    if weights.shape[-1] != rows * columns + others or weights.shape[-2] != weights.shape[-1]:
        raise ValueError(
            f"{NAME}: weights {list(weights.shape)} are not of {rows} x {columns} patches and {others} others"
        )
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(weights)
    apart = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")
    return (weights[..., others:, others:] * apart).sum(-1).mean((1, 2))


def _check(foreground: Tensor, background: Tensor) -> None:
    if foreground.ndim != 2 or background.shape != foreground.shape[1:]:
        raise ValueError(
            f"{NAME}: prototypes are [class, width] and [width]; got {list(foreground.shape)}, {list(background.shape)}"
        )
    lengths = torch.cat([foreground.norm(dim=1), background.norm()[None]])
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise ValueError(f"{NAME}: a prototype of zeros, or one that is not finite, is like nothing")
