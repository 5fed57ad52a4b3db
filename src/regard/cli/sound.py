"""Sound from a WAV file, as a model takes it."""

from __future__ import annotations

from pathlib import Path

from ..data import media
from ..data.media import Sound

__all__ = ["Sound", "read"]


def read(path: Path) -> Sound:
    return media.sound(path, f"--audio {path}")
