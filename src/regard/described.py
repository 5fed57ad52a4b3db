"""What a recording says of itself at a prompt and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import xarray as xr

from .extras import listed
from .padding import real

MOST_RUNS = 3
COLUMNS = ("run", "stack", "attention", "layers × heads", "rows", "tokens", "statistics")


def as_text(trees: Sequence[xr.DataTree]) -> str:
    """A line for the whole, and one for each stack of the first runs."""
    lines = [_title(trees)]
    for run, stack, kind, size, rows, tokens, statistics in _stacks(trees):
        which = f"run {run}, " if len(trees) > 1 else ""
        several = "row" if rows == "1" else "rows"
        lines.append(f"  {which}{stack}: {kind}, {size} heads, {rows} {several}, {tokens} tokens; {statistics}")
    return "\n".join([*lines, *(f"  {words}" for words in _more(trees))])


def as_html(trees: Sequence[xr.DataTree]) -> str:
    """The same as a table."""
    keep = range(len(COLUMNS)) if len(trees) > 1 else range(1, len(COLUMNS))
    head = "".join(f"<th>{COLUMNS[i]}</th>" for i in keep)
    body = "".join(f"<tr>{''.join(f'<td>{escape(row[i])}</td>' for i in keep)}</tr>" for row in _stacks(trees))
    more = "".join(f"<p>{escape(words)}</p>" for words in _more(trees))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p><b>{escape(_title(trees))}</b></p>{table}{more}"


def _title(trees: Sequence[xr.DataTree]) -> str:
    if not trees:
        return "Recording: nothing in it"
    attrs = trees[0].attrs
    names = [str(attrs[name]) for name in ("model", "architecture") if attrs.get(name)]
    of = f" of {names[0]}{f' ({names[1]})' if len(names) > 1 else ''}" if names else ""
    runs = f", {len(trees)} runs" if len(trees) > 1 else ""
    partial = ", partial: interrupted before the model was done" if any(t.attrs.get("partial") for t in trees) else ""
    return f"Recording{of}{runs}{partial}"


def _stacks(trees: Sequence[xr.DataTree]) -> list[tuple[str, ...]]:
    found = []
    for run, tree in enumerate(trees[:MOST_RUNS]):
        for stack, node in tree.children.items():
            data = node.to_dataset()
            cross = data.attrs.get("kind") == "cross"
            kind = "cross attention" if cross else f"{'causal ' if data.attrs.get('causal') else ''}self attention"
            lengths = [_length(data, axis) for axis in (("query", "key") if cross else ("key",))]
            size = f"{data.sizes.get('layer', 1)} × {data.sizes.get('head', 1)}"
            rows, names = str(data.sizes.get("batch", 1)), listed(map(str, data.data_vars), 12)
            found.append((str(run), stack, kind, size, rows, " on ".join(lengths), names))
    return found


def _length(data: xr.Dataset, axis: str) -> str:
    """How many positions there are without padding: of the shortest and of the longest row."""
    if axis not in data.sizes:
        axis = {"query": "key", "key": "query"}[axis]
    if axis not in data.sizes:
        return "no"
    counts = real(data, axis).sum(axis)
    low, high = int(counts.min()), int(counts.max())
    return str(high) if low == high else f"{low} to {high}"


def _more(trees: Sequence[xr.DataTree]) -> list[str]:
    return [f"and {len(trees) - MOST_RUNS} more runs"] if len(trees) > MOST_RUNS else []
