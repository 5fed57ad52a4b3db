"""Made when the site is built: a page for each room, and the report on the home page."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path
from pkgutil import iter_modules

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import regard
from regard import catalog, mechanisms

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"
NOT_ROOMS = {"adapters", "claims", "cli", "compare", "data", "kernels", "profile", "zoo"}


def rooms() -> list[str]:
    """The packages that hold methods."""
    packages = (m.name for m in iter_modules(regard.__path__) if m.ispkg and m.name not in NOT_ROOMS)
    return [room for room in packages if files(room)]


def files(room: str) -> list[str]:
    folder = Path(regard.__file__).parent / room
    return [p.stem for p in sorted(folder.glob("*.py")) if not p.stem.startswith("_")]


def page(room: str) -> str:
    """Markdown of a room."""
    papers = {row.object.partition(":")[0]: row for row in catalog.rows().values() if row.object}
    parts = [f"# {room.capitalize()}", _docstrings(f"regard.{room}", "members: false")]
    if room == "mechanisms":
        parts.append(choices())
    for name in files(room):
        parts.append(f"## {name}")
        if row := papers.get(f"regard.{room}.{name}"):
            parts.append(
                f"[{row.title}]({row.link}) · [how it is called, and what its claim found](../papers/{row.key}.md)"
            )
        parts.append(_docstrings(f"regard.{room}.{name}"))
    return "\n\n".join(parts) + "\n"


def choices() -> str:
    """A table of what mechanisms declare: operators, then layers and blocks."""
    converted = mechanisms.conversions()
    takes = {"heads": "query, key, value", "hidden": "the layer's input", "map": "a map of rows and columns"}
    lines = ["| mechanism | takes | attention | masks | operations grow as | converts models |", "| --- " * 6 + "|"]
    for name, operator in mechanisms.operators().items():
        spec = operator.spec
        told = (
            "query, key, value",
            ", ".join(spec.patterns),
            spec.mask,
            _growth(spec),
            "yes" if name in converted else "",
        )
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(told)} |")
    for name, kind in mechanisms.modules().items():
        spec, file = kind.declared, name.partition(".")[0]
        told = (takes[spec.takes], ", ".join(spec.patterns), "", "", "yes" if file in converted else "")
        lines.append(f"| [`{kind.__name__}`](#{file}) | {' | '.join(told)} |")
    return "\n".join(lines)


def _growth(spec: mechanisms.Spec) -> str:
    """The power of the length that the operations of a head follow from 32k to 64k keys, at its own knobs."""
    counts = [spec.cost(n, n, 64, causal="causal" in spec.patterns).operations for n in (32768, 65536)]
    return f"n^{math.log2(counts[1] / counts[0]):.2f}"


def _docstrings(of: str, *options: str) -> str:
    lines = "".join(f"\n      {o}" for o in ("show_root_heading: false", "show_root_toc_entry: false", *options))
    return f"::: {of}\n    options:{lines}"


def on_config(config: MkDocsConfig) -> None:
    pages = [{room.capitalize(): f"rooms/{room}.md"} for room in rooms()]
    titles = [next(iter(entry)) for entry in config.nav]
    config.nav.insert(titles.index("Reference") + 1, {"Rooms": pages})


def report() -> str:
    """What `regard look` writes of the bundled reader and a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "regard", "look", "reader", "--text", TEXT, "--out", folder]
        subprocess.run(command, check=True, capture_output=True)
        return (Path(folder) / "report.html").read_text(encoding="utf-8")


def on_files(files: Files, config: MkDocsConfig) -> None:
    files.append(File.generated(config, "assets/reader.html", content=report()))
    for room in rooms():
        files.append(File.generated(config, f"rooms/{room}.md", content=page(room)))
