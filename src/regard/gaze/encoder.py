"""Pictures and words as vectors of one model, for scanpaths that a model makes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..loading import parameters


class Encoder(NamedTuple):
    """What `encoder` makes. `model` is called with pixels as its processor would give them, at `size` pixels a side."""

    model: nn.Module
    processor: Any
    size: int
    mean: Tensor
    std: Tensor

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture, pressed into a square, so that its places stay shares of its sides. [1, 3, row, column]"""
        square = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self.normed(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255)

    def normed(self, pictures: Tensor) -> Tensor:
        """Pictures from 0 to 1 [batch, 3, row, column], of any size, as the model is to see them."""
        device = next(self.model.parameters()).device
        if pictures.shape[-2:] != (self.size, self.size):
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True)
        return (pictures.to(device) - self.mean.to(device)) / self.std.to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embeddings of pixels, differentiable. [batch, 3, row, column] -> [batch, dim]"""
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            return _vector(model.get_image_features(pixel_values=pixels))
        return _vector(getattr(model, "base_model", model)(pixel_values=pixels))  # without a classifier's last layer

    @torch.no_grad()
    def words(self, text: str) -> Tensor:
        """The embedding of a text, in the space of pictures. [dim] ValueError for a model that reads none."""
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"{type(self.model).__name__} reads no words: give a picture of what is looked for, or a model that "
                f"reads both, such as openai/clip-vit-base-patch32"
            )
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if not callable(tokenizer) or not hasattr(tokenizer, "pad_token_id"):
            raise ValueError(f"{type(self.model).__name__} came without its tokenizer: load a folder that has it")
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        device = next(self.model.parameters()).device
        given = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask") if name in inputs}
        return _vector(self.model.get_text_features(**given))[0]

    @torch.no_grad()
    def target(self, about: str | Image.Image) -> Tensor:
        """The embedding of words, or of a picture. [dim]"""
        return self.words(about) if isinstance(about, str) else self(self.pixels(about))[0]


def encoder(model: nn.Module, processor: Any) -> Encoder:
    """A model of pictures as a function from pixels to vectors: `encoder(*regard.load("facebook/dinov2-small"))`.

    Of a model with a text tower (CLIP, SigLIP) the vectors are those that words have too; of any other vision model of
    transformers, what its pooler gives, or the first token; of a classifier, what it classifies. Size, mean and
    deviation are the image processor's. ValueError where there is none, and for models that read words and pictures
    together, or no pictures.
    """
    kind = type(model).__name__
    pairs = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    if not pairs and getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        sees = any("pixel_values" in parameters(part) for part in model.modules() if hasattr(part, "config"))
        raise ValueError(
            f"{kind} reads a picture among words, and makes no vector of it: give a vision model, or CLIP"
            if sees
            else f"{kind} sees no pictures: give a vision model, or CLIP"
        )
    images = getattr(processor, "image_processor", processor)
    mean, std = (getattr(images, f"image_{of}", None) for of in ("mean", "std"))
    sizes = getattr(images, "crop_size", None), getattr(images, "size", None)
    size = next((s["height"] for s in sizes if s is not None and "height" in s), None)
    if mean is None or std is None or size is None:
        raise ValueError(
            f"{kind} came with {type(processor).__name__}, which does not say how pictures are "
            f"prepared: give an image processor with a square size"
        )
    return Encoder(model.eval(), processor, int(size), *(torch.tensor(of)[:, None, None] for of in (mean, std)))


def _vector(output: Any) -> Tensor:
    """[batch, dim] of what a model gives."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return pooled if pooled is not None else output.last_hidden_state[:, 0]
