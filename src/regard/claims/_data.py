"""Where claims find public data: lines of books, photographs."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

from PIL import Image, ImageOps


def folder(name: str) -> Path:
    """The folder of this name in the one that the environment variable REGARD_DATA names. ValueError without it."""
    root = os.environ.get("REGARD_DATA")
    if root is None or not (path := Path(root) / name).is_dir():
        what = "is not set" if root is None else f"is {root}, which holds no folder {name}"
        raise ValueError(
            f"public data are needed: REGARD_DATA {what}; set it to the folder that holds {name} "
            f"(what it is, and where it comes from: docs/data.md)"
        )
    return path


def lines(n: int, *, seed: int) -> list[str]:
    """`n` lines of books of 40 characters or more, drawn at random."""
    with gzip.open(folder("text_books") / "children_a.txt.gz", "rt", encoding="utf-8") as file:
        long = [line.strip() for line in file if len(line.strip()) >= 40]
    return random.Random(seed).sample(long, n)


def photographs(size: int = 224) -> dict[str, Image.Image]:
    """The photographs by name, their middles cut square and brought to `size` pixels."""
    found = {}
    for path in sorted(folder("pictures").glob("*.jpg")):
        with Image.open(path) as picture:
            found[path.stem] = ImageOps.fit(picture.convert("RGB"), (size, size))
    return found
