"""The catalog: one row a paper, in `catalog/<room>.toml`; statistics by name. Status is computed, never typed in."""

from __future__ import annotations

import difflib
import json
import os
import pkgutil
import sqlite3
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from .extras import needs, shortened
from .files import written_aside

_FOLDER = Path(__file__).parent / "catalog"


@dataclass(frozen=True)
class Row:
    """One paper."""

    key: str
    room: str
    title: str
    link: str  # empty where it could not be established
    about: str
    works: str  # what has to work
    expects: str  # what its claim checks
    tags: tuple[str, ...]
    object: str = ""  # "package.module:name", empty until built
    claim: str = ""

    def load(self) -> Any:
        """The method itself."""
        if not self.object:
            raise NotImplementedError(f"{self.key!r} is in the catalog but not built yet")
        module, _, name = self.object.partition(":")
        return getattr(import_module(module), name)

    @property
    def status(self) -> str:
        """`not built`, `broken`, `built`, or what the last run of its claim on this machine found."""
        if not self.object:
            return "not built"
        try:
            self.load()
        except (ImportError, AttributeError):
            return "broken"
        last = runs().get(self.key)
        if last is None:
            return "built"
        return {True: "held", False: "did not hold", None: "could not tell"}[last["holds"]]


@dataclass(frozen=True)
class Finding:
    """What a run of a claim found. `holds` is None where this scale cannot tell. `seconds` are of processor time.

    draw: draws what was found into a matplotlib `Figure` that it is given; the claim itself needs no matplotlib.
    """

    holds: bool | None
    measured: str
    expected: str
    seed: int
    seconds: float = 0.0
    draw: Callable[[Any], None] | None = field(default=None, compare=False, repr=False)


@cache
def rows() -> dict[str, Row]:
    """All rows by key."""
    found: dict[str, Row] = {}
    for path in sorted(_FOLDER.glob("*.toml")):
        if path.stem != "tags":
            for key, entry in tomllib.loads(path.read_text()).items():
                found[key] = Row(key, path.stem, **{**entry, "tags": tuple(entry["tags"])})
    return found


@cache
def tags() -> dict[str, str]:
    """What each tag means."""
    return tomllib.loads((_FOLDER / "tags.toml").read_text())["tags"]


def tagged(*wanted: str) -> list[Row]:
    """Rows that carry all of these tags."""
    for tag in wanted:
        if tag not in tags():
            raise KeyError(f"no tag {_near(tag, tags())}; `regard papers tags` lists all {len(tags())}")
    return [found for found in rows().values() if set(wanted) <= set(found.tags)]


def row(key: str) -> Row:
    try:
        return rows()[key]
    except KeyError:
        raise KeyError(f"no paper {_near(key, rows())}; `regard papers` lists all {len(rows())}") from None


def search(words: str) -> list[Row]:
    """Rows that hold all words (or words that start so), best first."""
    terms = [f'"{w.replace(chr(34), "")}"*' for w in words.split()]
    if not terms:
        return list(rows().values())
    with sqlite3.connect(":memory:") as base:
        base.execute(
            "create virtual table paper using fts5(key, title, about, works, expects, tags, room, tokenize='porter')"
        )
        fields = ((r.key, r.title, r.about, r.works, r.expects, " ".join(r.tags), r.room) for r in rows().values())
        base.executemany("insert into paper values (?, ?, ?, ?, ?, ?, ?)", fields)
        rank = "bm25(paper, 8, 8, 2, 2, 1, 4, 1)"
        hits = base.execute(f"select key from paper where paper match ? order by {rank}", (" ".join(terms),)).fetchall()
    return [rows()[key] for (key,) in hits]


def methods(room: str) -> list[str]:
    """Names of the methods of a room: its files that hold something of their own name."""
    return [name for name in _files(room) if _namesake(room, name) is not None]


def method(room: str, name: str) -> Any:
    """The method of this name: `name` in `regard/<room>/<name>.py`, whatever else there is left alone."""
    found = _namesake(room, name) if name in _files(room) else None
    if found is None:
        raise KeyError(f"no method {_near(name, methods(room), f' in {room}')}; there are {', '.join(methods(room))}")
    return found


@cache
def statistics() -> list[str]:
    """Names of the statistics that `record` takes: those of the room that have a `spec`.

    The others are analyses, plain functions of a model or of what was recorded.
    """
    return [name for name in methods("statistics") if hasattr(_namesake("statistics", name), "spec")]


def statistic(name: str) -> Callable[..., Tensor | None]:
    """The statistic of this name: function `name` in `regard/statistics/name.py`."""
    found: Any = _namesake("statistics", name) if name in _files("statistics") else None
    if not hasattr(found, "spec"):
        raise KeyError(f"no statistic {_near(name, statistics())}; there are {', '.join(statistics())}")
    return found


def _files(room: str) -> list[str]:
    modules = pkgutil.iter_modules(import_module(f"regard.{room}").__path__)
    return sorted(m.name for m in modules if not (m.ispkg or m.name.startswith("_")))


def _namesake(room: str, name: str) -> Any:
    return getattr(import_module(f"regard.{room}.{name}"), name, None)


def reproduce(key: str, *, scale: str = "small", seed: int = 0, plot: Path | None = None) -> Finding:
    """Run a paper's claim, and remember what came out; `plot` is a picture file to draw it into."""
    found = row(key)
    if not found.claim:
        raise NotImplementedError(f"{key!r} has no claim yet; when built, it will check: {found.expects}")
    began = time.process_time()
    finding: Finding = import_module(found.claim).claim(scale=scale, seed=seed)
    finding = replace(finding, seconds=time.process_time() - began)
    kept = {name: getattr(finding, name) for name in ("holds", "measured", "expected", "seed", "seconds")}
    path = _runs_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as draft:
        draft.write_text(json.dumps({**runs(), key: {**kept, "scale": scale, "when": time.time()}}, indent=1))
    if plot is not None:
        _plot(finding, plot)
    return finding


def _plot(finding: Finding, path: Path) -> None:
    with needs("plots", "claims"):
        from matplotlib.figure import Figure
    if finding.draw is None:
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    finding.draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def claimed() -> list[str]:
    """Keys of the papers that have a claim."""
    return [key for key, found in rows().items() if found.claim]


def remembered(key: str, *, scale: str, seed: int) -> Finding | None:
    """What the last run of a claim on this machine found, if it was at this scale and seed."""
    last = runs().get(key, {})
    if (last.get("scale"), last.get("seed")) != (scale, seed):
        return None
    return Finding(**{name: last[name] for name in ("holds", "measured", "expected", "seed", "seconds")})


def runs() -> dict[str, dict[str, Any]]:
    """The last run of each claim on this machine."""
    try:
        return json.loads(_runs_file().read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _runs_file() -> Path:
    home = os.environ.get("REGARD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"
    return Path(home) / "claims.json"


def _near(name: str, among: Any, where: str = "") -> str:
    """What was given, and what may have been meant."""
    close = difflib.get_close_matches(name, among, n=3)
    return f"{shortened(name)!r}{where}" + (f" (did you mean {' or '.join(close)}?)" if close else "")
