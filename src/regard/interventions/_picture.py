"""Pictures that a vision-language model is given, as it sees them, and others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ._method import Method, image_ids, image_tokens, padded_left

ALIKE = 8.0  # of 255: how far a picture may be, on average, from what the model sees of it


class Box(NamedTuple):
    """A part of a picture, in shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Of a picture of this width and height, all pixels that it touches; one at least."""
        (wide, high), slack = size, 1e-6
        left, top = min(int(self.left * wide + slack), wide - 1), min(int(self.top * high + slack), high - 1)
        right, bottom = int(np.ceil(self.right * wide - slack)), int(np.ceil(self.bottom * high - slack))
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def grown(self, times: float = 1.0, least: float = 0.0) -> Box:
        """The square box (of a picture stretched to a square) around it that is so many times its longer side, moved
        to lie inside of the picture.
        """
        side = min(1.0, max(times * max(self.right - self.left, self.bottom - self.top), least))
        left = min(max((self.left + self.right - side) / 2, 0.0), 1 - side)
        top = min(max((self.top + self.bottom - side) / 2, 0.0), 1 - side)
        return Box(left, top, left + side, top + side)


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def one_picture(model: nn.Module, inputs: Mapping[str, Any], method: str) -> Tensor:
    """Which tokens of the prompts are of its picture. [batch, token] boolean

    ValueError, which names the method, unless each row has one picture, in one part, and is not padded on the right.
    """
    image_ids(model, method)  # a model that reads none is told so, whatever it is given
    tokens = inputs.get("input_ids")
    if inputs.get("pixel_values") is None or tokens is None:
        raise ValueError(f"{method} looks at a picture, and {type(model).__name__} is given none here")
    image = image_tokens(model, tokens, method)
    parts = _n_pictures(inputs)
    if parts != len(tokens) or not bool(image.any(1).all()):
        raise ValueError(
            f"{method} takes one picture a row, in one part: {type(model).__name__} is given {parts} pictures or parts "
            f"of some for {len(tokens)} rows; have the processor leave pictures whole, and split the rows"
        )
    padded_left(inputs, method)
    return image


def _n_pictures(inputs: Mapping[str, Any]) -> int:
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    if grid is not None:
        return int(grid[:, 0].sum())  # each frame is one
    return int(np.prod(pixels.shape[:-3]))


def seen(model: nn.Module, inputs: Mapping[str, Any], processor: Any, method: str) -> list[Image.Image]:
    """The picture of each row as the model is given it: cut, and scaled to its resolution.

    ValueError, which names the method, where `one_picture` raises, or there is no processor that says how colours
    became numbers.
    """
    one_picture(model, inputs, method)
    maker = maker_of(processor, method, model)
    pixels = inputs["pixel_values"].detach().cpu().double()
    if (grid := inputs.get("image_grid_thw")) is not None:
        pictures = [
            _unpatched(part, maker, rows, columns)
            for part, (_, rows, columns) in zip(_split(pixels, inputs), grid.tolist())
        ]
    else:
        pictures = list(pixels.flatten(0, -4))
    mean, std = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    if getattr(maker, "do_normalize", True):
        mean, std = (torch.tensor(getattr(maker, f"image_{name}"), dtype=torch.float64) for name in ("mean", "std"))
    found = []
    for one in pictures:
        values = one * std[:, None, None] + mean[:, None, None]
        values = (255 * values.clamp(0, 1)).round().to(torch.uint8)
        found.append(Image.fromarray(values.permute(1, 2, 0).numpy()))
    return found


def maker_of(processor: Any, method: str, model: nn.Module) -> Any:
    """What makes pixels of pictures; ValueError, which names the method, where nothing does."""
    maker = getattr(processor, "image_processor", None)
    if maker is None:
        raise ValueError(
            f"{method} changes pictures, so it needs the processor of {type(model).__name__}: "
            f"fit(model, inputs, processor)"
        )
    return maker


def _split(pixels: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Of each picture, its part of the pixels."""
    if (grid := inputs.get("image_grid_thw")) is not None:
        return list(pixels.split(grid.prod(1).tolist()))
    return list(pixels.split(len(pixels) // _n_pictures(inputs) or 1))


def _unpatched(patches: Tensor, maker: Any, rows: int, columns: int) -> Tensor:
    """A picture [channel, row, column] whose patches [patch, value] come in squares that are merged, as Qwen-VL's do.

    Of frames that stand for one picture, the first.
    """
    merge, side, frames = maker.merge_size, maker.patch_size, maker.temporal_patch_size
    parts = patches.reshape(rows // merge, columns // merge, merge, merge, -1, frames, side, side)[..., 0, :, :]
    return parts.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * side, columns * side)


def given(
    model: nn.Module, inputs: Mapping[str, Any], processor: Any, pictures: Sequence[Image.Image | None], method: str
) -> dict[str, Any]:
    """The inputs with another picture in each row, made to pixels by the processor; None leaves a row's as it is.

    ValueError, which names the method, where the processor cuts a picture to other parts than the one before.
    """
    maker = maker_of(processor, method, model)
    pixels = inputs["pixel_values"]
    parts = _split(pixels, inputs)
    for i, picture in enumerate(pictures):
        if picture is None:
            continue
        made = maker(images=[picture], return_tensors="pt")
        new, grid = made["pixel_values"], made.get("image_grid_thw")
        if grid is None:
            same = new.flatten(0, -4).shape == parts[i].flatten(0, -4).shape
        else:
            same = torch.equal(grid[0].cpu(), inputs["image_grid_thw"][i].cpu())
        if not same:
            raise ValueError(
                f"{method}: the processor makes pixels {list(new.shape)} of a picture of {picture.width} x "
                f"{picture.height}, and {type(model).__name__} was given {list(parts[i].shape)}; give it pictures that "
                f"the processor does not cut or scale otherwise"
            )
        parts[i] = new.reshape(parts[i].shape).to(pixels)
    return {**inputs, "pixel_values": torch.cat(parts)}


def asking(
    model: nn.Module, inputs: Mapping[str, Any], processor: Any, texts: Sequence[str], method: str
) -> dict[str, Any]:
    """Inputs that ask each row's picture another text, by the processor's chat template where it has one."""
    pictures = seen(model, inputs, processor, method)
    prompts = [chat(processor, text) for text in texts]
    made = processor(text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    names = [name for name in made if name in inputs or name == "attention_mask"]
    return {name: made[name].to(inputs["input_ids"].device) for name in names} | {
        "pixel_values": inputs["pixel_values"]
    }


def row_of(inputs: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The inputs of one row alone, its padding kept."""
    found = {
        name: value[i : i + 1] if isinstance(value, Tensor) and len(value) == len(inputs["input_ids"]) else value
        for name, value in inputs.items()
    }
    return found | {"pixel_values": _split(inputs["pixel_values"], inputs)[i]}


def chat(processor: Any, text: str) -> str:
    """What a text and a picture are to the processor."""
    if getattr(processor, "chat_template", None):
        said = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return processor.apply_chat_template([said], tokenize=False, add_generation_prompt=True)
    return f"{processor.image_token}{text}"


def finer(pictures: Sequence[Image.Image], images: Sequence[Image.Image] | None, method: str) -> list[Image.Image]:
    """The pictures before the processor, `images`, where they are given: ValueError where a picture does not show the
    whole of one.
    """
    if images is None:
        return list(pictures)
    if len(images) != len(pictures):
        raise ValueError(f"{method}: {len(images)} images for {len(pictures)} rows; give one for each")
    for i, (image, picture) in enumerate(zip(images, pictures)):
        small = image.convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
        if np.abs(np.asarray(small, float) - np.asarray(picture, float)).mean() > ALIKE:
            raise ValueError(
                f"{method}: image {i}, {image.width} x {image.height}, is another than the model is given, or cut: "
                f"give one of the shape of {picture.width} x {picture.height}, or leave images out"
            )
    return [image.convert("RGB") for image in images]


def cropped(picture: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A part of a picture, scaled to this width and height."""
    return picture.crop(box.pixels(picture.size)).resize(size, Image.Resampling.LANCZOS)


def spread(values: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """A map of patches [row, column] laid over a picture of this width and height, bilinearly. [row, column]"""
    drawn = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.array(drawn.resize(size, Image.Resampling.BILINEAR))


class Redrawn(Method):
    """What methods are that show the model another picture and ask again: inside the block, it is given the new one.

    The picture is exchanged before the model reads it, for one of the same size, so that whatever else looks on or
    changes the model sees the new one. `fit` makes them, for one batch.

    kept: how much of each place of each row's picture the new one shows, 0 to 1, [row, column] of patches or of pixels.
    """

    def __init__(self, before: Mapping[str, Any], after: Mapping[str, Any], kept: Sequence[Tensor]) -> None:
        self.before, self.after = (_split(inputs["pixel_values"], inputs) for inputs in (before, after))
        self.kept = list(kept)

    def given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if (pixels := inputs.get("pixel_values")) is None:
            return inputs
        beams = len(pixels) // max(1, sum(map(len, self.before)))
        before, after = (
            torch.cat([one for one in some for _ in range(beams)] or [pixels[:0]]).to(pixels)
            for some in (self.before, self.after)
        )
        if not torch.equal(before, pixels):
            raise ValueError(
                f"{type(self).__name__.replace('_', '-')} was made for other pictures than the model is given: fit it "
                f"to these"
            )
        return {**inputs, "pixel_values": after}
