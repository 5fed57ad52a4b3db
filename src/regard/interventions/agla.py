"""Assembly of global and local attention: logits of the picture, and of what in it the prompt is about, are added.

An et al., AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
Attention (arXiv:2406.12718), by the authors' code; the paper's text was not at hand. An image-text matcher says how
relevant each patch is to the prompt, and how well prompt and picture match. The better they match, the more of the
least relevant pixels are blacked out; the logits of a second run on that picture are added to those of the first.

The authors match with BLIP: relevance is its cross attention in layer 6 of 12, times the positive part of the gradient
of the logit "match", mean over heads and words; similarity is the cosine of its projections. Here a matcher is a knob,
any function of picture and prompt; without one, which is ours, relevance is how much more the model itself looks at a
patch under the prompt than under a general instruction (as in `carve`), and similarity is 0.4. The map is laid over the
picture as the model sees it, where the authors stretch the picture to 384 x 384 first. They draw the next token from
what is left; here that is up to `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..extras import needs
from ._branch import Branch, Contrasted
from ._picture import given, seen
from .carve import GENERAL, relevance

# How relevant each patch of a picture [row, column] is to a prompt, and how well both match, -1 to 1.
Match = Callable[[Image.Image, str], tuple[NDArray[Any], float]]

BLUR = 0.02  # of the picture's longer side
SIMILAR = 0.4  # of picture and prompt, where no matcher says so


class agla(Contrasted):
    """Logits with those for a picture of which only what the prompt is about is left.

    A logits processor: the model's logits, and alpha times those of a second run on the masked picture. Tokens less
    likely than `beta` times the likeliest are left out. `alpha` 0 and `beta` 0 leave the logits as they are. `fit`
    finds what is relevant.

    inputs: as they go to `generate`; left padding is fine. masked: the same with masked pictures.

    ValueError where the model reads no image tokens, a row has not one picture, or scipy is missing.

    >>> import regard
    >>> from regard.interventions.agla import agla
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["is there a fork?"])
    >>> method = agla.fit(model, inputs, processor, general="describe")
    >>> ids = model.generate(**inputs, logits_processor=[method], max_new_tokens=1, do_sample=False)
    """

    needs = "what of the picture the prompt is about, by a matcher or the model's own attention"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        masked: Mapping[str, Any],
        alpha: float = 2.0,
        beta: float = 0.5,
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.branch = Branch(model, inputs, prompt=masked)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        match: Match | None = None,
        general: str = GENERAL,
        steps: int = 32,
        **knobs: Any,
    ) -> Self:
        """With pictures masked by a matcher, which is given picture and prompt of each row, or by the model's own
        attention over `steps` of its answer, against that under the instruction `general`.
        """
        pictures = seen(model, inputs, processor, "agla")
        if match is None:
            maps = relevance(model, inputs, processor, general=general, steps=steps, method="agla")
            found = [(one, SIMILAR) for one in maps]
        else:
            texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
            found = [match(picture, text) for picture, text in zip(pictures, texts)]
        new = [masked(picture, *of) for picture, of in zip(pictures, found)]
        return cls(model, inputs, masked=given(model, inputs, processor, new, "agla"), **knobs)

    def joined(self, own: Tensor, other: Tensor) -> Tensor:
        return own + self.alpha * other


def masked(image: Image.Image, relevance: NDArray[Any], similarity: float) -> Image.Image:
    """The picture with its least relevant pixels black. relevance: of patches, [row, column]; see `kept`."""
    stays = kept(relevance, similarity, image.size)
    return Image.fromarray(np.where(stays[..., None], np.asarray(image.convert("RGB")), np.uint8(0)))


def kept(relevance: NDArray[Any], similarity: float, size: tuple[int, int], *, blur: float = BLUR) -> NDArray[np.bool_]:
    """Which pixels of a picture of this width and height stay. [row, column]

    relevance: of patches, [row, column]; laid over the picture by cubic splines, and smoothed. similarity: of picture
    and prompt, 0 to 1; it lets 1 - similarity / 2 of the pixels stay, those of the largest relevance.
    blur: standard deviation of the smoothing, as a share of the longer side.

    ValueError where all patches are as relevant, or scipy is missing.
    """
    with needs("agla", "claims"):
        from scipy import ndimage
    values = np.asarray(relevance, np.float32)
    if not np.ptp(values) > 0:
        raise ValueError("agla: all patches are as relevant, so that none can be blacked out before another")
    values = (values - values.min()) / np.ptp(values)
    factors = [n / old for n, old in zip(size[::-1], values.shape)]
    large = np.asarray(ndimage.zoom(values, factors, order=3, mode="grid-constant", grid_mode=True))
    smooth = ndimage.gaussian_filter(large.clip(0, 1), blur * max(size))  # without what splines overshoot by
    share = min(1 - similarity / 2, 1 - 1e-5)
    last = np.sort(smooth, axis=None)[::-1][int(smooth.size * share)]
    return smooth >= last
