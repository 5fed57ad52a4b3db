"""What commands take: texts, pictures, folders to write to; and what a model makes of them."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from rich.console import Console
from torch import Tensor, nn

from ..data import media, paragraph
from ..data.loaders.files import unreadable
from ..files import MARK, refuse_foreign
from ..loading import Loaded, parameters, positions
from ..tokens import chat_roles
from .sound import Sound

SOUNDS = (".wav", ".wave")
SAME = 8.0  # of 255: how far a picture may be on average from what its processor made of it


class InputError(ValueError):
    """What was given to look at cannot be looked at."""


def read_text(text: str | None, file: Path | None, option: str = "--file") -> str | None:
    if text is not None and file is not None:
        raise InputError("--text and --file: give one of them")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"{option} {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{option} {file} is not UTF-8 text (byte {error.start}); convert it first") from error
    if text is not None and not text.strip():
        raise InputError("the text is empty")
    if text is not None and (why := unreadable(text)):
        raise InputError(f"the text {why}")
    return text


def placed(path: Path | None, options: dict[str, Path | None]) -> dict[str, Path | None]:
    """The options `file`, `image` and `audio` with a file that was given without one, by the end of its name."""
    if path is None:
        return options
    end = path.suffix.lower()
    option = "audio" if end in SOUNDS else "image" if end in Image.registered_extensions() else "file"
    if options[option] is not None:
        raise InputError(f"{path} and --{option} {options[option]}: give one of them")
    return {**options, option: path}


def open_picture(image: Path | None, console: Console | None = None) -> Image.Image | None:
    """The picture, in red, green and blue; `console` is told what of it is shown otherwise."""
    if image is None:
        return None
    picture = media.picture(image, f"--image {image}")
    if console is not None and "note" in picture.info:
        console.print(f"--image {image}: {picture.info['note']}", style="yellow", markup=False, highlight=False)
    return picture


def writable(out: Path, *names: str) -> None:
    """Raise unless a folder can be written to, or made, and files of these names in it are none or Regard's."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".", suffix=".part"):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written to: {error.strerror}; choose another folder") from error
    refuse_foreign(*(out / name for name in names))


def png(image: Image.Image) -> bytes:
    """A picture as a file that says that Regard wrote it."""
    held, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    image.save(held, "png", pnginfo=info)
    return held.getvalue()


def prepare(
    loaded: Loaded, name: str, text: str | None, picture: Image.Image | None, truncate: bool, generate: int
) -> tuple[dict[str, Any], list[str] | None]:
    """The model's inputs for a text, a picture or both, and the roles of tokens where a chat template gave them."""
    model, processor = loaded
    wanted = model.main_input_name
    sees = any("pixel_values" in parameters(m) for m in model.modules() if hasattr(m, "config"))
    if wanted not in ("input_ids", "pixel_values"):
        raise InputError(
            f"{type(model).__name__} takes {wanted}; from Python: regard.record(model, ...) around your own call"
        )
    if processor is None:
        raise InputError(f"{name} has no tokenizer or image processor beside it; save one into the folder")
    if picture is not None and not sees:
        raise InputError(f"--image: {type(model).__name__} reads text only")
    if picture is None and wanted == "pixel_values":
        raise InputError(f"{type(model).__name__} looks at pictures: give one with --image")
    if wanted == "pixel_values":
        if text is not None:
            raise InputError(f"--text: {type(model).__name__} looks at pictures only")
        return dict(processor(images=picture, return_tensors="pt")), None
    if text is None:
        text = "What is in this picture?" if picture else paragraph()
    inputs, roles = _words(model, processor, text, picture)
    limit = positions(model)
    n = inputs["input_ids"].shape[1]
    if limit is not None and n + generate > limit:
        room = limit - generate
        if not truncate or picture is not None or room < 1:
            raise InputError(
                f"the text has {n} tokens{f' and {generate} are to be generated' if generate else ''}, but {name} has "
                f"{limit} positions; shorten it, or cut it with --truncate"
            )
        inputs = {k: v[:, :room] if isinstance(v, Tensor) and v.shape[:2] == (1, n) else v for k, v in inputs.items()}
    return inputs, roles


def drawn(processor: Any, pixels: Any) -> list[Image.Image]:
    """The pictures that a model is given, cut and scaled; none where pixels are no pictures."""
    if not isinstance(pixels, Tensor) or pixels.ndim < 4 or pixels.shape[-3] not in (1, 3):
        return []
    maker = getattr(processor, "image_processor", processor)
    mean, std = (getattr(maker, f"image_{name}", None) for name in ("mean", "std"))
    values = pixels.detach().cpu().double().flatten(0, -4)
    if mean is not None and std is not None and getattr(maker, "do_normalize", True):
        values = values * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    values = (255 * values.clamp(0, 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in values]


def seen(processor: Any, inputs: Mapping[str, Any], picture: Image.Image) -> list[Image.Image]:
    """The picture as the model is given it, in parts where it is; where that shows the whole, itself."""
    shown = drawn(processor, inputs.get("pixel_values"))
    return [picture if _alike(picture, one) else one for one in shown] or [picture]


def _alike(picture: Image.Image, shown: Image.Image) -> bool:
    """Whether it shows the whole picture in its own shape."""
    small, (wide, high) = picture.convert("RGB").resize(shown.size, Image.Resampling.BICUBIC), shown.size
    if abs(math.log(picture.width * high / (picture.height * wide))) > 0.02:
        return False
    return float(np.abs(np.asarray(small, float) - np.asarray(shown, float)).mean()) < SAME


def hear(loaded: Loaded, name: str, heard: Sound | None, more: bool) -> dict[str, Any]:
    """The model's inputs for a sound."""
    model, extractor = loaded.model, getattr(loaded.processor, "feature_extractor", loaded.processor)
    kind = type(model).__name__
    if model.main_input_name != "input_features":
        raise InputError(f"--audio: {kind} takes {model.main_input_name}, and no sound")
    if heard is None:
        raise InputError(f"{kind} listens: give it a sound, a WAV file, with --audio")
    if more:
        raise InputError(f"{kind} listens only: leave out --text, --file and --image")
    if not hasattr(extractor, "sampling_rate"):
        raise InputError(f"{name} has no feature extractor beside it; save one into the folder")
    limit = getattr(extractor, "chunk_length", None)
    if limit is not None and heard.seconds > limit:
        raise InputError(f"the sound lasts {heard.seconds:.1f} s, but {name} listens to {limit} s at once; cut it")
    rate = extractor.sampling_rate
    inputs = extractor(heard.at(rate), sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    return {k: v for k, v in inputs.items() if k in parameters(model)}


def _words(
    model: nn.Module, processor: Any, text: str, picture: Image.Image | None
) -> tuple[dict[str, Any], list[str] | None]:
    if picture is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        inputs = dict(tokenizer(text, return_tensors="pt", verbose=False))
        if inputs["input_ids"].numel() == 0:
            raise InputError("the text has no tokens")
        return {k: v for k, v in inputs.items() if k in parameters(model)}, None
    chat = getattr(processor, "chat_template", None)
    marker = getattr(processor, "image_token", None)
    if chat:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = dict(processor(text=prompt, images=picture, return_tensors="pt"))
        return inputs, _with_pictures(processor, messages, inputs["input_ids"])
    prompt = f"{marker}\n{text}" if marker and marker not in text else text
    return dict(processor(text=prompt, images=picture, return_tensors="pt")), None


def _with_pictures(processor: Any, messages: list[dict[str, Any]], ids: Tensor) -> list[str] | None:
    """Roles of a chat in which each image token has been repeated for every patch."""
    roles = chat_roles(processor, messages, add_generation_prompt=True)
    image = getattr(processor, "image_token_id", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    spread, at = [], 0
    for i in ids[0].tolist():
        if not spread and i == tokenizer.bos_token_id != plain[0]:  # the tokenizer's, not the template's
            spread.append("bos")
            continue
        if i == image and spread and spread[-1] == "image":
            spread.append("image")
            continue
        while at < len(plain) and plain[at] == image and i != image:
            at += 1
        if at >= len(plain) or plain[at] != i:
            return None  # the processor adds more than patches: leave roles to what ids tell
        spread.append("image" if i == image else roles[at])
        at += 1
    return spread


class Written(NamedTuple):
    """ids: of the one row, [token], with what the model was given before; scores: what each new token was chosen by."""

    ids: Tensor
    scores: Tensor  # [new token, vocabulary]

    @property
    def start(self) -> int:
        """Where the first new token stands."""
        return len(self.ids) - len(self.scores)


def written(loaded: Loaded, inputs: dict[str, Any], steps: int, **options: Any) -> Written:
    """What `generate` gives, each token the likeliest next one."""
    model, processor = loaded
    pad = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    usual: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "num_beams": 1}
    usual |= {"pad_token_id": end if pad is None else pad, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, **{**usual, **options})
    return Written(found.sequences[0], torch.stack(found.scores)[:, 0])
