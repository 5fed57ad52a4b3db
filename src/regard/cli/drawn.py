"""Small drawings in SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import MARK, replaced

INK, FAINT, MANY, FEW = "#222222", "#bbbbbb", "#b2182b", "#2166ac"  # of either sign: red above 0, blue below


class Edge(NamedTuple):
    """From one node to another, by what (`style` names a dash), and how strongly, of either sign."""

    start: str
    end: str
    weight: float
    style: str = ""


def save(path: Path, width: float, height: float, parts: Iterable[str], title: str) -> None:
    """Write a drawing, whole or not at all."""
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="11" role="img">'
        f"<title>{escape(title)}</title><!-- {MARK} -->"
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: float = 11, turn: float = 0, colour: str = INK
) -> str:
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
    return f'<text {place} fill="{colour}"{turned}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, *, colour: str = FAINT, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:.2f}"{dashed}/>'
    )


def shade(value: float, most: float) -> str:
    """Red above 0, blue below, white at 0."""
    share = float(np.clip(abs(value) / most, 0, 1)) if most > 0 and np.isfinite(value) else 0.0
    full = (178, 24, 43) if value > 0 else (33, 102, 172)
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in full)


def graph(
    path: Path,
    nodes: Mapping[str, tuple[int, int, float]],
    edges: Sequence[Edge],
    *,
    layers: Sequence[str],
    columns: int,
    styles: Mapping[str, str],
    title: str,
) -> None:
    """Nodes in rows, the first row at the bottom: name -> (row, column, value), the value as colour."""
    step, left, top, room = 62, 70, 50, 34 + 16 * len(styles)
    width, height = max(left + step * columns + 20, 360), top + step * len(layers) + room
    most = max((abs(value) for *_, value in nodes.values()), default=0)
    thick = max((abs(edge.weight) for edge in edges), default=0)

    def at(name: str) -> tuple[float, float]:
        row, column, _ = nodes[name]
        return left + step * (column + 0.5), top + step * (len(layers) - 1 - row + 0.5)

    parts = [text(width / 2, 22, title, size=14)]
    for row, label in enumerate(layers):
        y = top + step * (len(layers) - 1 - row + 0.5)
        parts.append(text(left - 10, y + 4, label, anchor="end"))
        parts.append(line(left, y, left + step * columns, y, colour="#eeeeee"))
    for edge in sorted(edges, key=lambda edge: abs(edge.weight)):
        (x1, y1), (x2, y2) = at(edge.start), at(edge.end)
        colour = MANY if edge.weight > 0 else FEW
        wide = 0.5 + 4 * abs(edge.weight) / thick
        others = [at(name) for name in nodes if name not in (edge.start, edge.end)]
        mx, my = _bend((x1, y1), (x2, y2), others)
        dash = f' stroke-dasharray="{styles[edge.style]}"' if styles[edge.style] else ""
        parts.append(
            f'<path d="M{x1:.1f},{y1:.1f} Q{mx:.1f},{my:.1f} {x2:.1f},{y2:.1f}" fill="none" stroke="{colour}" '
            f'stroke-width="{wide:.2f}"{dash}/>'
        )
    for name, (*_, value) in nodes.items():
        x, y = at(name)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="17" fill="{shade(value, most)}" stroke="{INK}"/>')
        colour = "white" if most and abs(value) > 0.6 * most else INK
        parts.append(text(x, y + 4, name, size=11 if len(name) < 5 else 9, colour=colour))
    for i, (style, dash) in enumerate(styles.items()):
        y = height - 14 - 16 * i
        parts.append(line(left, y - 4, left + 40, y - 4, colour=INK, width=2, dash=dash))
        parts.append(text(left + 48, y, style, anchor="start"))
    save(path, width, height, parts, title)


def _bend(
    start: tuple[float, float], end: tuple[float, float], others: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """The point that draws an edge aside, so that it passes no node that it is not of; half way where none is near."""
    (x1, y1), (x2, y2) = start, end
    length = float(np.hypot(x2 - x1, y2 - y1)) or 1.0
    across = np.array([y2 - y1, x1 - x2]) / length
    t = np.linspace(0, 1, 33)[:, None]
    best = (-1.0, ((x1 + x2) / 2, (y1 + y2) / 2))
    for aside in (0, 56, -56, 90, -90, 130, -130):
        middle = np.array([x1 + x2, y1 + y2]) / 2 + aside * across
        curve = (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * middle + t**2 * np.array(end)
        near = min((float(np.hypot(*(curve - place).T).min()) for place in others), default=np.inf)
        if near > 21:  # a node's radius, and a little more
            return float(middle[0]), float(middle[1])
        best = max(best, (near, (float(middle[0]), float(middle[1]))))
    return best[1]


def heatmap(path: Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, title: str) -> None:
    """Cells [row, column], red above 0 and blue below; what is not a number stays white."""
    high, wide = 13, max(22, min(60, 900 // max(len(columns), 1)))
    longest = max((len(name) for name in columns), default=0)
    left, top = 14 + 6.5 * max((len(name) for name in rows), default=0), 44
    slanted = longest * 6.2 > wide
    below = 12 + (longest * 6.2 if slanted else 12)
    width, height = left + wide * len(columns) + 20, top + high * len(rows) + below
    most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    parts = [text(max(width, 360) / 2, 20, f"{title} (up to {most:.2f})", size=14)]
    for i, name in enumerate(rows):
        parts.append(text(left - 6, top + high * (i + 0.75), name, anchor="end", size=9))
        for j, value in enumerate(values[i]):
            told = f"<title>{escape(name)}, {escape(columns[j])}: {value:.3f}</title>"
            parts.append(
                f'<rect x="{left + wide * j:.1f}" y="{top + high * i:.1f}" width="{wide:.1f}" height="{high}" '
                f'fill="{shade(float(value), most)}" stroke="#f2f2f2">{told}</rect>'
            )
    for j, name in enumerate(columns):
        x, y = left + wide * (j + 0.5), top + high * len(rows) + 14
        parts.append(text(x + 3, y, name, anchor="end", turn=-90) if slanted else text(x, y, name))
    save(path, max(width, 360), height, parts, title)


def curves(
    path: Path,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    labels: tuple[str, str],
    title: str,
) -> None:
    """Lines over x, and bands between a lower and an upper one; each position of x as far from the next."""
    width, height, left, top, right, bottom = 520.0, 340.0, 60.0, 60.0, 20.0, 50.0
    every = [v for of in series.values() for v in of] + [v for pair in bands.values() for of in pair for v in of]
    low, high = min(0.0, *every), max(1.0, *every)
    inner, deep = width - left - right, height - top - bottom

    def at(i: int, value: float) -> tuple[float, float]:
        return left + inner * i / max(len(x) - 1, 1), top + deep * (high - value) / (high - low)

    parts = [text(width / 2, 20, title, size=14), text(left + inner / 2, height - 10, labels[0])]
    parts.append(text(16, top + deep / 2, labels[1], turn=-90))
    for value in (0.0, 0.5, 1.0):
        y = at(0, value)[1]
        parts += [line(left, y, width - right, y, colour="#eeeeee"), text(left - 6, y + 4, f"{value:g}", anchor="end")]
    parts += [text(at(i, 0)[0], height - bottom + 18, f"{value:g}") for i, value in enumerate(x)]
    for lower, upper in bands.values():
        corners = [at(i, v) for i, v in enumerate(upper)] + [at(i, v) for i, v in reversed(list(enumerate(lower)))]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        parts.append(f'<polygon points="{points}" fill="{FAINT}" opacity="0.5"/>')
    for number, (name, values) in enumerate(series.items()):
        colour = (MANY, FEW, INK)[number % 3]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(i, v) for i, v in enumerate(values)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        begin = left + (width - left - right) * number / len(series)
        parts.append(line(begin, 38, begin + 24, 38, colour=colour, width=2))
        parts.append(text(begin + 30, 42, name, anchor="start"))
    save(path, width, height, parts, title)
