"""Attention prompting: the picture is dimmed where the question is not about it, and asked again.

Yu et al., Attention Prompting on Image for Large Vision-Language Models (arXiv:2409.17143, ECCV 2024), by the authors'
code; the paper's text was not at hand. Another model, CLIP, or the model itself says which patches belong to the
question; the map, sharpened and smoothed, multiplies the pixels, and the model sees only that picture.

CLIP's map is made of two (`heat`): what each patch gives the class token in one of its last layers (`by_clip`), and how
little the patch itself is like the text there, which is low on what the question is about and turned round on purpose.
The model's own map is the weights of its newest tokens in one layer, on the picture alone; the authors' layer 20 is of
32 (0-based), here at the same part of the depth. `strength`, which lets a part of the picture through everywhere, is
ours. The picture that is dimmed is the one that the model sees, unless `images` gives it before it was scaled. `gray`
is the 0 of their command line; their function for LLaVA's map has 200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize, pad

from ..call import Call, Site
from ..seam import intervene
from ._look import looks
from ._method import layers
from ._picture import Redrawn, finer, given, seen

Source = Callable[[Image.Image, str], Tensor]  # how much each patch of a picture stays, 0 to 1, for a prompt

DEPTH = 20 / 32


class attention_prompting(Redrawn):
    """Dim what the question is not about, and ask again.

    `fit` makes it: `attention_prompting.fit(model, inputs, processor)`. Inside the block the model is given the dimmed
    pictures.

    source: gives of a picture and a prompt how much each patch stays, 0 to 1 [row, column], such as one that calls
    `by_clip`; None for the model's own attention. strength: of the dimming, 0 to 1; 0 changes nothing. coe: how sharply
    the map rises around its mean. kernel: side of the square of patches that it is smoothed over. gray: what shows
    where the picture does not, 0 to 255. steps: tokens of the answer that own attention is taken from. layer: of the
    language model; None for the paper's, see above. images: the pictures before the processor, one a row, where they
    are finer than the model sees them.

    ValueError where the model reads no image tokens, a row has not one picture, or a map is the same everywhere.

    >>> import regard
    >>> from regard.interventions.attention_prompting import attention_prompting
    >>> from regard.zoo.recipes.describer import asked, pictures, tempting
    >>> model, processor = regard.load("describer")
    >>> inputs = asked(processor, pictures(tempting(1)), ["is there a fork?"])
    >>> with regard.intervene(model, attention_prompting.fit(model, inputs, processor)):
    ...     ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    """

    off: ClassVar[Mapping[str, Any]] = {"strength": 0.0}
    needs = "a map of what the question is about"

    @classmethod
    def fit(  # type: ignore[override] - all of its knobs are known
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        processor: Any = None,
        *,
        source: Source | None = None,
        strength: float = 1.0,
        coe: float = 5.0,
        kernel: int = 3,
        gray: int = 0,
        steps: int = 20,
        layer: int | None = None,
        images: Sequence[Image.Image] | None = None,
    ) -> Self:
        if not 0 <= strength <= 1:
            raise ValueError(f"attention-prompting: strength is a share, 0 to 1, not {strength}")
        shown = seen(model, inputs, processor, "attention-prompting")
        if source is None:
            known = layers(model, "attention-prompting")
            among = [known[min(round(DEPTH * len(known)), len(known) - 1)] if layer is None else layer]
            own = looks(model, inputs, "attention-prompting", steps=steps, among=among, within=True)
            masks = [soften(one[:, 0].mean(0).cpu(), coe=coe, kernel=kernel) for one in own]
        else:
            texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
            masks = [source(picture, text) for picture, text in zip(shown, texts)]
        new: list[Image.Image | None] = []
        kept = [1 - strength * (1 - mask) for mask in masks]
        for fine, picture, much in zip(finer(shown, images, "attention-prompting"), shown, kept):
            dimmed = overlay(fine, much, gray=gray)
            new.append(None if strength == 0 else dimmed.resize(picture.size, Image.Resampling.LANCZOS))
        return cls(inputs, given(model, inputs, processor, new, "attention-prompting"), kept)


def heat(class_map: Tensor, patch_map: Tensor, *, coe: float = 5.0, kernel: int = 3) -> Tensor:
    """How much each patch stays, 0 to 1, by CLIP's two maps of it. [row, column]

    class_map: what each patch gives the class token towards the text; high ones stay. patch_map: how like the text each
    patch is; low ones stay. Either is enough.
    """
    given = soften(class_map, coe=coe, kernel=kernel)
    unlike = _smoothed(1 - _stretched(patch_map), kernel)
    return _stretched(given + unlike - given * unlike)


def soften(values: Tensor, *, coe: float = 5.0, kernel: int = 3) -> Tensor:
    """The map sharpened around its mean and smoothed, 0 to 1. [row, column]

    Of the values in standard deviations above the mean, times `coe`, the logistic function; then the mean over squares
    of `kernel` patches, edges repeated. ValueError where the map is the same everywhere.
    """
    stretched = _stretched(values)
    return _smoothed((coe * (stretched - stretched.mean()) / stretched.std()).sigmoid(), kernel)


def _stretched(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    if not high > low:
        raise ValueError("attention-prompting: the map is the same everywhere, so that it points at nothing")
    return (values - low) / (high - low)


def _smoothed(values: Tensor, kernel: int) -> Tensor:
    if kernel % 2 != 1:
        raise ValueError(f"attention-prompting: kernel={kernel} has no middle; give an odd number of patches")
    return avg_pool2d(pad(values[None, None], [kernel // 2] * 4, mode="replicate"), kernel, stride=1)[0, 0]


def overlay(image: Image.Image, mask: Tensor, *, gray: int = 0) -> Image.Image:
    """The picture where the mask is 1, gray where it is 0. mask: of patches, [row, column], 0 to 1."""
    small = Image.fromarray((mask.clamp(0, 1) * 255).to(torch.uint8).numpy(force=True))
    return blended(image, np.asarray(small.resize(image.size, Image.Resampling.LANCZOS)), gray=gray)


def blended(image: Image.Image, mask: NDArray[np.uint8], *, gray: int = 0) -> Image.Image:
    """The same by a mask of each pixel, [row, column], 0 to 255."""
    share = (mask.astype(np.float32) / np.float32(255))[..., None]
    shown = np.asarray(image.convert("RGB"), np.float32) * share + (1 - share) * np.float64(gray)
    return Image.fromarray(shown.astype(np.uint8))


@torch.no_grad()
def by_clip(model: nn.Module, processor: Any, image: Image.Image, text: str, *, layer: int = -2) -> Tensor:
    """How much each patch of a picture stays for a text, by transformers' CLIP. [row, column], 0 to 1

    layer: of the vision model, the last but one of ViT-L/14. ValueError where the model is no CLIP.
    """
    vision, project = getattr(model, "vision_model", None), getattr(model, "visual_projection", None)
    norm = getattr(vision, "post_layernorm", None)
    if vision is None or project is None or norm is None:
        raise ValueError(f"attention-prompting takes CLIP's two maps, and {type(model).__name__} is no CLIP")
    inputs = processor(text=[text], images=[image], padding=True, return_tensors="pt")
    blocks = vision.encoder.layers
    reading = _Reading(range(len(blocks))[layer], blocks[layer].self_attn.out_proj)
    with intervene(model, reading):
        out = model(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
        )
    last = out.vision_model_output.last_hidden_state[:, 0]
    centre = last.mean(-1, keepdim=True), (last.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    length = project(norm(last)).norm(dim=-1)
    how = {"mean": centre[0], "std": centre[1], "norm": norm, "projection": project.weight.T, "length": length}
    terms = 2 * len(blocks) - 1
    n = reading.parts.shape[1]
    parts = (
        projected(reading.parts, terms=terms * n, **how)[:, 1:],
        projected(reading.states[:, 1:], terms=terms, **how),
    )
    words = normalize(out.text_embeds, dim=-1)
    side = round((n - 1) ** 0.5)
    return heat(*((part @ words[:, :, None])[0, :, 0].unflatten(0, (side, side)) for part in parts))


def projected(
    states: Tensor, *, mean: Tensor, std: Tensor, norm: Any, projection: Tensor, length: Tensor, terms: int
) -> Tensor:
    """What parts of a class token say in CLIP's joint space, the last norm taken as linear. [batch, token, dim]

    states: [batch, token, width], each one of so many `terms` that the class token is the sum of. mean, std: of the
    class token at the norm, [batch, 1]. norm: its `weight` and `bias`. projection: [width, dim]. length: of the
    picture's embedding, [batch].
    """
    centred = (states - mean[:, None] / terms) * norm.weight / std[:, None] + norm.bias / terms
    return centred @ projection / length[:, None, None]


class _Reading:
    """Keeps what each token gives the class token in one layer of the vision model, and the states that leave it."""

    def __init__(self, layer: int, write: Any) -> None:
        self.layer, self.write = layer, write
        self.parts = self.states = torch.zeros(0)

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack == "vision_model" and call.site.layer == self.layer:
            row = call.weights.rows(0, 1)[:, :, 0, :, None]  # [batch, head, key, 1]
            each = (row * call.value).transpose(1, 2).flatten(2)  # [batch, key, width]
            self.parts = to_class(each @ self.write.weight.T, self.write.bias)
        return output

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack == "vision_model" and site.layer == self.layer:
            self.states = hidden
        return hidden


def to_class(terms: Tensor, bias: Tensor) -> Tensor:
    """What each token gives the class token, the bias shared out. [batch, token, width]"""
    return terms + bias / terms.shape[1]
