"""Pictures and sounds as they lie about: of every depth and mode, or broken."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from regard.data import DataError, media
from regard.data.media import picture, sound


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def pixels(source, where: str = "a.png") -> np.ndarray:
    image = picture(source, where)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = (np.arange(65536).reshape(256, 256)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_grey_of_16_bits_keeps_its_highest_8(kind):
    found = pixels(saved(Image.fromarray(RAMP), kind))
    assert (found == (RAMP >> 8)[..., None]).all()
    assert (pixels(Image.fromarray(RAMP)) == found).all()


def test_grey_of_16_bits_whose_white_is_0():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    found = pixels(saved(Image.fromarray(RAMP), "tiff", tiffinfo=tags))
    assert (found == 255 - (RAMP >> 8)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_black_and_white_are_refused(dtype):
    image = Image.fromarray(np.ones((4, 4), dtype))
    for source in (image, saved(image, "tiff")):
        with pytest.raises(DataError, match=r"a\.tif: its pixels are .* nothing tells"):
            picture(source, "a.tif")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_exif_says_what_is_up(turn, kind):
    """A picture with a white corner, laid down as each orientation has it, comes out upright."""
    upright = np.zeros((32, 64), np.uint8)
    upright[:16, :16] = 255
    laid = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    laid |= {5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = turn
    found = pixels(saved(Image.fromarray(np.ascontiguousarray(laid[turn])), kind, exif=exif))
    assert (abs(found[..., 0].astype(int) - upright) < 60).all()


def test_what_is_transparent_is_white_and_said():
    red, clear = (200, 0, 0, 255), (0, 0, 0, 0)
    image = Image.new("RGBA", (2, 1), red)
    image.putpixel((1, 0), clear)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for source in (image, saved(image), saved(palette, transparency=1), saved(palette, "gif", transparency=1)):
        found = picture(source, "a")
        assert np.asarray(found).tolist() == [[[200, 0, 0], [255, 255, 255]]]
        assert "white" in found.info["note"]
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (0, 128))
    assert pixels(saved(grey))[0, :, 0].tolist() == [100, 127]
    opaque = picture(saved(Image.new("RGBA", (2, 1), red)), "a")
    assert np.asarray(opaque)[0, 0].tolist() == [200, 0, 0]
    assert not opaque.info


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_the_same_colours(mode):
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 4, 8))
    kind = {"CMYK": "jpeg", "YCbCr": "jpeg"}.get(mode, "png")
    found = pixels(saved(image.convert(mode), kind)).astype(int)
    assert (abs(found - np.asarray(image)) < 40).all()


def test_several_pictures_in_a_file_are_refused():
    frames = [Image.new("L", (4, 4), i * 90) for i in range(3)]
    for kind in ("gif", "tiff", "png", "webp"):
        with pytest.raises(DataError, match="a: 3 pictures in one file"):
            picture(saved(frames[0], kind, save_all=True, append_images=frames[1:]), "a")
        assert pixels(saved(frames[1], kind)).shape == (4, 4, 3)


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 8_000), (12_000, 9_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_they_are_unpacked(size):
    with pytest.raises(DataError, match=r"a\.png: more than 67,108,864 pixels"):
        picture(bomb(*size), "a.png")
    assert media.LARGEST_PICTURE == 67_108_864


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_broken_files_are_one_error(kind):
    """Cut anywhere, or with bytes turned: a picture of the same size, or DataError with its name."""
    draw = np.random.default_rng(0)
    whole = saved(Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)), kind)
    said = []
    for at in np.linspace(0, len(whole) - 1, 40).astype(int):
        for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            try:
                assert picture(broken, "a picture").size
            except DataError as error:
                said.append(str(error))
    assert said
    assert all(message.startswith("a picture: ") for message in said)
    with pytest.raises(DataError, match="not a whole picture"):
        picture(whole[: len(whole) // 2], "a picture")


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(DataError, match=r"a\.png: .*not a picture"):
        picture(tmp_path / "a.png", "a.png")
    with pytest.raises(DataError, match=r"^none\.png: No such file"):
        picture(tmp_path / "none.png", "none.png")
    with pytest.raises(DataError, match="directory"):
        picture(tmp_path, "a folder")


# --------------------------------------------------------------------------------------------------------------- sounds


def wav(data: bytes, *, code=1, channels=1, rate=8000, bits=16, block=None, size=None) -> bytes:
    block = channels * bits // 8 if block is None else block
    form = struct.pack("<HHIIHH", code, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_samples_by_hand():
    assert sound(wav(struct.pack("<4h", 0, 16384, -32768, 1)), "a").wave.tolist() == [0, 0.5, -1, 2**-15]
    assert sound(wav(bytes([128, 192, 0]), bits=8), "a").wave.tolist() == [0, 0.5, -1]
    assert sound(wav(b"\0\0\x40\0\0\x80", bits=24), "a").wave.tolist() == [0.5, -1]
    assert sound(wav(struct.pack("<2i", 2**30, -(2**31)), bits=32), "a").wave.tolist() == [0.5, -1]
    assert sound(wav(struct.pack("<2f", 0.25, -1), code=3, bits=32), "a").wave.tolist() == [0.25, -1]
    assert sound(wav(struct.pack("<2d", 0.25, -1), code=3, bits=64), "a").wave.tolist() == [0.25, -1]
    mixed = sound(wav(struct.pack("<4h", 16384, 0, -16384, -16384), channels=2), "a")
    assert mixed.wave.tolist() == [0.25, -0.5]
    assert (mixed.rate, mixed.channels, mixed.bits) == (8000, 2, 16)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"channels": 0}, "0 channels"),
        ({"channels": 0, "block": 2}, "0 channels"),
        ({"channels": 65535, "block": 2}, "65535 channels"),
        ({"rate": 0}, "0 samples a second"),
        ({"rate": 1}, "1 samples a second"),
        ({"rate": 2**32 - 1, "block": 0}, "4,294,967,295 samples a second"),
        ({"block": 0}, "blocks of 0"),
        ({"block": 4}, "blocks of 4"),
        ({"bits": 12, "block": 2}, "12 bits"),
        ({"code": 6, "bits": 8, "block": 1}, "format 6"),
        ({"size": 4000}, "too early"),
        ({"size": 2**32 - 1}, "too early"),
    ],
)
def test_formats_that_cannot_be_are_refused(broken, why):
    with pytest.raises(DataError, match=f"s.wav: not a whole WAV file.*{why}"):
        sound(wav(bytes(8), **broken), "s.wav")


def test_a_sound_cut_anywhere_is_one_error():
    whole = wav(bytes(range(64)))
    assert len(sound(whole, "a").wave) == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at in range(len(whole)):
            with pytest.raises(DataError, match="a sound"):
                sound(whole[:at], "a sound")
    with pytest.raises(DataError, match="blocks of 2"):
        sound(wav(bytes(7)), "a sound")
    with pytest.raises(DataError, match="0 samples"):
        sound(wav(b""), "a sound")
