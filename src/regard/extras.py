"""Packages that only some uses need, and how errors quote what was given."""

from __future__ import annotations

from collections.abc import Iterable


class needs:
    """Around the imports of an extra: where a package is missing, ValueError says what needs it and how to get it.

    >>> with needs("attention flow", "claims"):
    ...     from scipy.sparse.csgraph import maximum_flow
    """

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImportError):
            package = (error.name or str(error)).partition(".")[0]
            raise ValueError(
                f'{self.what}: the package {package} is missing; pip install "regard[{self.extra}]"'
            ) from error


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most + 1 else ""
    return ", ".join(names[:most] if more else names) + more


def shortened(given: object, most: int = 80) -> str:
    """What was given as an error may quote it: of a long text the beginning, the end, and how long it is."""
    text = str(given)
    if len(text) <= most:
        return text
    return f"{text[: most - 30]}...{text[-10:]} ({len(text):,} characters)"
