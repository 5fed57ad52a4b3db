"""Texts that ship with Regard."""

from importlib import resources


def paragraph() -> str:
    """The opening of Dickens, A Tale of Two Cities (1859): it repeats itself, so that induction has something to do."""
    return resources.files(__name__).joinpath("paragraph.txt").read_text(encoding="utf-8").strip()
