"""Contrastive attention refinement: what the question looks at more than a general one does is cut out and asked again.

Ge et al., Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning (arXiv:2509.06461), sections 3 and 4, by
the paper's text and the authors' code. The model answers the question and a general instruction; its weights on the
picture under the one, over those under the other, say which pixels the question is about. All else is blacked out, the
rest cut out, enlarged, and the question asked again, of the refined picture alone, as in algorithm 1.

Deviations. The picture that is cut is the one that the model sees, unless `images` gives it before it was scaled; only
then does enlarging bring detail. The refined picture is as large as the one before: the box is widened to its shape,
where the authors' code enlarges it to whatever size that makes (`refine` does), and gives the model both pictures,
which most models were not trained on. Their layers 20 to 25 of 28 (0-based) are here the same part of the depth. The
prompt is used as it is; theirs ends with "Answer the question using a single word or phrase."
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..extras import needs
from ._look import looks
from ._method import layers
from ._picture import Box, Redrawn, asking, cropped, finer, given, one_picture, seen, spread

Strategy = Literal["attention_sum", "size", "remove_small"]
Steps = Literal["all", "first", "equal"]

GENERAL = "Write a general description of the image."
DEPTH = 20 / 28, 25 / 28  # of the first and the last layer
SMALL = 0.001  # share of the kept pixels


class Refined(NamedTuple):
    """A picture refined. mask: the pixels that stay, boolean [row, column]; box: left, top, right, bottom."""

    mask: NDArray[np.bool_]
    masked: Image.Image
    box: tuple[int, int, int, int]
    crop: Image.Image


class carve(Redrawn):
    """Ask again of what the question, and no general instruction, looks at.

    `fit` makes it: `carve.fit(model, inputs, processor)`. Inside the block the model is given the refined pictures.

    top: share of the pixels that are kept, before small regions are dropped; 1 leaves the picture as it is. regions:
    how many connected regions stay at least. lam: added to the general weights that divide. steps: of the answer, at
    most. among: layers of the language model; None for the paper's, see above. general: the general instruction;
    None for the question's weights without a contrast.
    images: the pictures before the processor, one a row, where they are finer than the model sees them.

    ValueError where the model reads no image tokens, a row has not one picture, the question looks where the general
    instruction looks, or scipy is missing.

    >>> import regard
    >>> from regard.interventions.carve import carve
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["is there a fork?"])
    >>> with regard.intervene(model, carve.fit(model, inputs, processor, general="describe")):
    ...     ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"top": 1.0}
    needs = "what the question looks at more than a general one does"

    @classmethod
    def fit(  # type: ignore[override] - all of its knobs are known
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        top: float = 0.2,
        regions: int = 3,
        lam: float = 1e-8,
        steps: int = 32,
        among: Collection[int] | None = None,
        general: str | None = GENERAL,
        images: Sequence[Image.Image] | None = None,
    ) -> Self:
        maps = relevance(model, inputs, processor, lam=lam, steps=steps, among=among, general=general)
        shown = seen(model, inputs, processor, "carve")
        new: list[Image.Image | None] = []
        kept: list[Tensor] = []
        for i, (picture, values) in enumerate(zip(finer(shown, images, "carve"), maps)):
            fused = spread(values, picture.size).astype(np.float64)
            if top < 1 and np.ptp(fused) <= 1e-6 * abs(fused).max():
                raise ValueError(f"carve: the question of row {i} looks where {general!r} does; ask about something")
            refined = refine(picture, fused, top=top, regions=regions)
            box = Box(*(edge / side for edge, side in zip(refined.box, picture.size * 2))).grown()
            new.append(None if refined.mask.all() else cropped(refined.masked, box, shown[i].size))
            kept.append(torch.from_numpy(refined.mask).float())
        return cls(inputs, given(model, inputs, processor, new, "carve"), kept)


def relevance(
    model: nn.Module,
    inputs: Mapping[str, Any],
    processor: Any,
    *,
    lam: float = 1e-8,
    steps: int = 32,
    among: Collection[int] | None = None,
    general: str | None = GENERAL,
    weighting: Steps = "all",
    method: str = "carve",
) -> list[NDArray[np.float32]]:
    """How much more the answer to each prompt looks at each patch than that to a general instruction. [row, column]

    Of each row of the inputs, summed over steps (later ones count more) and layers. general: None for the weights of
    the prompt alone. method: that errors name. The rest as in `carve`.
    """
    one_picture(model, inputs, method)
    among = depth(layers(model, method)) if among is None else sorted(among)
    task = looks(model, inputs, method, steps=steps, among=among)
    if general is None:
        return [summed(one, weighting).numpy(force=True) for one in task]
    other = asking(model, inputs, processor, [general] * len(task), method)
    both = zip(task, looks(model, other, method, steps=steps, among=among))
    return [summed(contrast(one, two, lam=lam), weighting).numpy(force=True) for one, two in both]


def depth(known: Sequence[int]) -> list[int]:
    """The layers at the same depth as 20 to 25 of 28."""
    first, last = (min(round(share * len(known)), len(known) - 1) for share in DEPTH)
    return list(known[first : last + 1])


def contrast(task: Tensor, general: Tensor, *, lam: float = 1e-8) -> Tensor:
    """Weights under the question over those under the general instruction, 0 and up. [step, layer, ...]

    Steps are paired by number, as many as the shorter answer has.
    """
    n = min(len(task), len(general))
    return task[:n] / (general[:n] + lam)


def summed(contrasts: Tensor, weighting: Steps = "all") -> Tensor:
    """The sum over steps and layers. [...]

    contrasts: [step, layer, ...]. weighting: "all" counts step t (from 0) t + 1 times, "first" the first alone, "equal"
    all alike.
    """
    n = len(contrasts)
    weights = {"all": torch.arange(n) + 1, "first": torch.arange(n) == 0, "equal": torch.ones(n)}[weighting]
    return torch.einsum("t,tl...->...", weights.to(contrasts.device, torch.float64), contrasts.double())


def refine(
    image: Image.Image, fused: NDArray[Any], *, top: float = 0.2, regions: int = 3, strategy: Strategy = "attention_sum"
) -> Refined:
    """What of a picture stays, alone and enlarged.

    fused: how much each pixel matters, [row, column]. top: share of the pixels that are kept. Of the connected regions
    that they make (by edges, not corners) the `regions` first stay, or the share `top` of them where that is more: by
    strategy, those of the largest sum ("attention_sum"), or the largest ("size"); "remove_small" drops those of less
    than a thousandth of the kept pixels instead. The box around them, cut out of the masked picture, is enlarged until
    it fills the picture's width and height.
    """
    with needs("carve", "claims"):
        from scipy import ndimage
    stays = fused >= np.percentile(fused, 100 * (1 - top))
    labels, n = ndimage.label(stays)  # type: ignore[misc]
    index = np.arange(1, n + 1)
    size = ndimage.sum_labels(stays, labels, index)
    score = ndimage.sum_labels(fused, labels, index) if strategy == "attention_sum" else size
    best = index[np.argsort(-score, kind="stable")][: max(regions, int(n * top))]
    if strategy == "remove_small":
        best = index[size >= int(SMALL * stays.sum())]
    mask = np.isin(labels, best)
    masked = Image.fromarray(np.asarray(image) * mask[..., None].astype(np.uint8))
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = (0, 0, *image.size)
    if len(rows):
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    wide, high = box[2] - box[0], box[3] - box[1]
    scale = max(image.width / wide, image.height / high)
    large = masked.crop(box).resize((int(wide * scale), int(high * scale)), Image.Resampling.LANCZOS)
    return Refined(mask, masked, box, large)
