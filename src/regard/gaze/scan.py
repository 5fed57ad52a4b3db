"""Where a vision or a vision-language model looks in a picture of yours, one fixation after another.

`regard.gaze.nevaclip` on whole pictures and models by name; what it is, and where it comes from, is said there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..data.loaders import Scanpath
from ..prediction import evaluating
from .encoder import encoder
from .nevaclip import nevaclip

AUTHORS = 224  # pixels of a picture that the paper's blur is for


def scan(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    about: str | Image.Image | None = None,
    *,
    fixations: int = 10,
    iterations: int = 20,
    seed: int = 0,
    **knobs: Any,
) -> Scanpath:
    """A scanpath over a picture, in its pixels, as `nevaclip` finds it; the metrics of `regard.gaze` take it.

    model, processor: as from `regard.load`: CLIP or SigLIP, or any vision model of transformers. about: what is looked
    for, in words (only with a text tower) or as a picture; None for the picture itself: which places, sharp, give the
    model most of what the whole gives. The picture is seen as a square; the blur is 10 pixels of 224, as in the paper,
    and grows with the size that the model reads. knobs: those of `nevaclip`. Takes fixations times iterations passes,
    forwards and backwards. The model is left as it was.

    There is no claim that people look there: compare with their fixations, and with places about the middle.

        model, processor = regard.load("openai/clip-vit-base-patch32")
        path = scan(model, processor, Image.open("kitchen.jpg"), "a kettle")
        draw_scanpath(path, Image.open("kitchen.jpg"), "kettle.html")
    """
    with evaluating(model):
        see = encoder(model, processor)
        pixels = see.pixels(picture)
        blurred = {"blur_window": 2 * round(20 * see.size / AUTHORS) + 1, "blur_sigma": 10 * see.size / AUTHORS}
        (path,) = nevaclip(
            see,
            pixels,
            see.target(picture if about is None else about),
            fixations=fixations,
            iterations=iterations,
            seed=seed,
            **{**blurred, **knobs},
        )
    places = path.places * np.array(picture.size) / see.size
    return Scanpath(places, picture.size)
