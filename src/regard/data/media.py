"""Pictures and sounds, from files or bytes, with errors that say what is wrong with them."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..extras import needs
from ._common import DataError

LARGEST_PICTURE = 2**26  # pixels; a small file must not unpack to fill the memory
RATES = (1_000, 768_000)  # samples a second
MOST_CHANNELS = 64
_WAV = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "u1", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
_TIFF_BITS, _TIFF_WHITE = 258, 262  # tags: bits of a sample; 0 where white is 0


def picture(source: Path | bytes | Image.Image, where: str) -> Image.Image:
    """A picture in red, green and blue, as `opened` takes it; what is transparent becomes white.

    `info["note"]` of the result says so where it did. where: what messages call it.
    """
    image, note = opened(source, where), {}
    try:
        if image.has_transparency_data and (clear := image.convert("RGBA")).getextrema()[3][0] < 255:
            image = Image.new("RGBA", image.size, "white")
            image.alpha_composite(clear)
            note = {"note": "what is transparent in it is shown as white"}
        image = image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{where}: a picture of mode {image.mode} has no red, green and blue; convert it") from error
    image.info = note
    return image


def opened(source: Path | bytes | Image.Image, where: str) -> Image.Image:
    """A whole picture, turned upright as its EXIF says, of at most 8 bits a sample.

    Grey of 9 to 16 bits keeps its highest 8. DataError where it is damaged, larger than `LARGEST_PICTURE`, several
    pictures in one file, or of numbers whose black and white nothing tells (32 bits, floats).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _upright(source, where)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
                if getattr(file, "is_animated", False) and file.format != "MPO":  # whose first is the photograph
                    raise DataError(f"{where}: {_frames(file)} pictures in one file; save the one that you mean alone")
                return _upright(file, where)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(_too_large(where)) from error
    except UnidentifiedImageError:
        raise DataError(f"{where}: not a whole picture (it is not a picture that Pillow can read)") from None
    except FileNotFoundError:
        raise DataError(f"{where}: No such file or directory") from None
    except Exception as error:  # Pillow's readers fail in any way on broken files
        why = (isinstance(error, OSError) and error.strerror) or error or type(error).__name__
        raise DataError(f"{where}: not a whole picture ({why})") from error


def _upright(image: Image.Image, where: str) -> Image.Image:
    width, height = image.size
    if width * height > LARGEST_PICTURE:
        raise DataError(_too_large(where))
    kind, tags = image.format, getattr(image, "tag_v2", {})
    image.load()
    return _eight_bits(ImageOps.exif_transpose(image), kind, tags, where)


def _eight_bits(image: Image.Image, kind: str | None, tags: Mapping[int, Any], where: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int64) >> tags.get(_TIFF_BITS, (16,))[0] - 8
        return Image.fromarray((255 - grey if tags.get(_TIFF_WHITE) == 0 else grey).astype(np.uint8))
    if image.mode in ("I", "F"):
        what = "whole numbers of 32 bits" if image.mode == "I" else "floats"
        raise DataError(f"{where}: its pixels are {what}, whose black and white nothing tells; save it with 8 bits")
    return image


def _too_large(where: str) -> str:
    return f"{where}: more than {LARGEST_PICTURE:,} pixels; make it smaller"


def _frames(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1)


class Sound(NamedTuple):
    """wave: float32 [sample], -1 to 1, the mean of all channels; rate: samples a second; bits: of a sample's number."""

    wave: NDArray[np.float32]
    rate: int
    channels: int = 1
    bits: int = 32

    @property
    def seconds(self) -> float:
        return len(self.wave) / self.rate

    def at(self, rate: int) -> NDArray[np.float32]:
        """The wave at another rate, low-pass filtered where that is lower."""
        if rate == self.rate:
            return self.wave
        with needs("sound at another rate", "claims"):
            signal = import_module("scipy.signal")
        return signal.resample_poly(self.wave, rate, self.rate).astype(np.float32)


def sound(source: Path | bytes, where: str) -> Sound:
    """A WAV file of whole numbers or floats. where: what messages call it.

    DataError where it is another format, cut short, empty, of no or more than `MOST_CHANNELS` channels, of a rate
    beyond `RATES`, or holds values that are not finite.
    """
    try:
        raw = source if isinstance(source, bytes) else source.read_bytes()
        kind, data = _chunks(raw)
        code, channels, rate, _, block, bits = struct.unpack("<HHIIHH", kind[:16])
        if code == 0xFFFE:  # told further on
            (code,) = struct.unpack("<H", kind[24:26])
        if (code, bits) not in _WAV:
            raise ValueError(f"format {code} with {bits} bits; whole numbers of 8 to 32 or floats are read")
        if not 1 <= channels <= MOST_CHANNELS or not RATES[0] <= rate <= RATES[1]:
            raise ValueError(
                f"{channels} channels of {rate:,} samples a second; 1 to {MOST_CHANNELS} of {RATES[0]:,} to "
                f"{RATES[1]:,} are read"
            )
        if block != channels * bits // 8 or len(data) % block:
            raise ValueError(f"{len(data):,} bytes in blocks of {block} are no whole samples of {channels} channels")
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise DataError(
            f"{where}: not a whole WAV file, or not a WAV file that can be read ({error}); convert it first"
        ) from error
    if not data:
        raise DataError(f"{where} holds no sound: it has 0 samples")
    wave = _numbers(data, code, bits).reshape(-1, channels).mean(1).astype(np.float32)
    if not np.isfinite(wave).all():
        raise DataError(f"{where} holds values that are not finite")
    return Sound(wave, rate, channels, bits)


def _chunks(raw: bytes) -> tuple[bytes, bytes]:
    """What says the format of the samples, and the samples."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        raise ValueError("it does not begin as one")
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(raw) and b"data" not in found:
        name, size = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "little")
        found[name] = raw[at + 8 : at + 8 + size]
        if len(found[name]) < size:
            raise ValueError(f"it ends {size - len(found[name]):,} bytes too early")
        at += 8 + size + size % 2
    if missing := [name.decode() for name in (b"fmt ", b"data") if name not in found]:
        raise ValueError(f"it has no part {missing[0]!r}")
    return found[b"fmt "], found[b"data"]


def _numbers(data: bytes, code: int, bits: int) -> NDArray[np.float64]:
    """-1 to 1."""
    read = np.frombuffer(data, _WAV[code, bits])
    if code == 3:
        return read.astype(np.float64)
    if bits == 8:  # counts from 0, with silence in the middle
        return read / 128 - 1.0
    if bits == 24:
        wide = np.zeros((len(read) // 3, 4), np.uint8)
        wide[:, 1:] = read.reshape(-1, 3)
        read, bits = wide.view("<i4")[:, 0], 32
    return read / 2.0 ** (bits - 1)
