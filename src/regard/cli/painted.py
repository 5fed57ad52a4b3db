"""`regard explain` of a model that paints: where its words act, in a picture that it is given, or that it paints."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import torch
import xarray as xr
from PIL import Image

from .. import catalog
from ..attribution import attribute
from ..loading import Loaded
from .inputs import InputError


def methods() -> list[str]:
    """Methods that read a pipeline."""
    return [name for name in catalog.methods("attribution") if reads_pipelines(name)]


def reads_pipelines(method: str) -> bool:
    return next(iter(signature(catalog.method("attribution", method)).parameters)) == "pipeline"


def painted(
    loaded: Loaded, method: str, text: str | None, picture: Image.Image | None
) -> list[tuple[str, xr.DataArray, Image.Image]]:
    """Maps, with what each is of, and the picture that it lies on, of one text."""
    model: Any
    model, pipeline = loaded
    kind = type(model).__name__
    if not reads_pipelines(method):
        raise InputError(f"{kind} paints, and predicts no class or token: --method is one of {', '.join(methods())}")
    if text is None:
        raise InputError(f"{kind} paints what a text says: give one with --text")
    inputs: dict[str, Any] = {"text": text}
    if picture is not None:
        side = model.config.sample_size * getattr(pipeline, "vae_scale_factor", 1)
        inputs["pixel_values"] = pipeline.image_processor.preprocess(picture.convert("RGB"), side, side)
    pipeline.set_progress_bar_config(disable=True)
    try:
        found = attribute(pipeline, inputs, method=method)[0]
    except ValueError as error:
        if picture is None and "pixel_values" in str(error):
            raise InputError(f"{method} looks at a picture: give one with --image") from error
        raise
    if found.ndim == 2:
        assert picture is not None
        return [(text, found, picture)]
    if picture is not None:
        raise InputError(f"{method} reads the picture that is painted: leave out --image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = pipeline(text, generator=torch.Generator().manual_seed(0)).images[0]  # as the method has it
    return [(str(one.text.item()), one, made) for one in found]
