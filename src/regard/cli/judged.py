"""What `regard explain --judge` says of a map: a table, and the curves on the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import xarray as xr
from rich.table import Table

WIDE, HIGH, MARGIN = 300, 180, 34  # of the curves' picture
SAME = 0.1  # how near the probabilities with all and with none of the features leave the curves nothing to tell
CURVES = {"deletion": ("error", "down"), "insertion": ("score", "up")}


class Judged(NamedTuple):
    """One map's judgement, of one sample."""

    heading: str
    found: xr.Dataset


def table(judged: Judged, several: bool) -> Table:
    """Each check of the map, beside the same scores elsewhere."""
    made = Table(box=None, header_style="bold", title=_title(judged, several), title_justify="left")
    for name in _HEADINGS:
        made.add_column(name, justify="left" if name == "check" else "right")
    for row in _rows(judged.found):
        made.add_row(*row)
    return made


def notes(judged: Judged) -> list[str]:
    """Why the curves cannot tell, where they cannot."""
    none, whole = (float(judged.found.insertion[i]) for i in (0, -1))
    if abs(whole - none) >= SAME:
        return []
    return [
        f"{judged.heading}: the probability is {whole:.2f} with all of the input and {none:.2f} with none of it, so "
        f"deletion and insertion can hardly tell maps apart"
    ]


def page(every: Sequence[Judged]) -> str:
    """Tables and curves in HTML."""
    parts = []
    for judged in every:
        head = "".join(f"<th>{escape(name)}</th>" for name in _HEADINGS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(judged.found)
        )
        parts += [f"<h2>{escape(_title(judged, len(every) > 1))}</h2>", f"<table><tr>{head}</tr>{rows}</table>"]
        parts += [_curves(judged.found, name) for name in CURVES]
        parts += [f"<p>{escape(note)}</p>" for note in notes(judged)]
    return "\n".join(parts)


_HEADINGS = "check", "this map", "the same moved", "better than"


def _title(judged: Judged, several: bool) -> str:
    return f"judged: {judged.heading}" if several else "judged"


def _rows(found: xr.Dataset) -> list[tuple[str, ...]]:
    rows = []
    for name, (kind, better) in CURVES.items():
        own, moved = float(found[f"{name}_{kind}"]), found[f"moved_{name}_{kind}"].values
        beaten = int((moved > own).sum() if better == "down" else (moved < own).sum())
        what = f"{name}, {'lower' if better == 'down' else 'higher'} is better"
        rows.append((what, f"{own:.3f}", f"{moved.mean():.3f} ± {moved.std():.3f}", f"{beaten} of {len(moved)}"))
    rows.append(("change where the input hardly changes", f"{float(found.sensitivity_error):.3f}", "", ""))
    for i, alike in enumerate(found.alike.values, 1):
        share = f"{i / len(found.alike):.0%} of its" if i < len(found.alike) else "all"
        rows.append((f"likeness once the model forgets {share} layers", f"{alike:+.2f}", "", ""))
    return rows


def _curves(found: xr.Dataset, name: str) -> str:
    """Probability over the share of the features taken away, or put in."""
    x = MARGIN + found.share.values * (WIDE - 2 * MARGIN)

    def line(values: np.ndarray, style: str) -> str:
        y = HIGH - MARGIN - values * (HIGH - 2 * MARGIN)
        return f'<polyline fill="none" {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))}"/>'

    frame = f'x="{MARGIN}" y="{MARGIN}" width="{WIDE - 2 * MARGIN}" height="{HIGH - 2 * MARGIN}"'
    over = "features taken away, the most important first" if name == "deletion" else "features put in, in that order"
    return "\n".join(
        (
            f'<svg role="img" aria-label="{name}" width="{WIDE}" height="{HIGH}" font-size="11">',
            f'<rect {frame} fill="none" stroke="#d4d4d8"/>',
            line(found[f"moved_{name}"].values, 'stroke="#71717a" stroke-dasharray="4 3"'),
            line(found[name].values, 'stroke="#b25400" stroke-width="2"'),
            f'<text x="{MARGIN}" y="{MARGIN - 8}">{name}: probability (dashed: moved maps)</text>',
            f'<text x="{MARGIN}" y="{HIGH - MARGIN + 16}">{over}</text>',
            f'<text x="{MARGIN - 6}" y="{MARGIN + 8}" text-anchor="end">1</text>',
            f'<text x="{MARGIN - 6}" y="{HIGH - MARGIN}" text-anchor="end">0</text>',
            "</svg>",
        )
    )
