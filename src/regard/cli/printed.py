"""What a command says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass
class Printed:
    tables: list[Table] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def to(self, console: Console) -> None:
        for table in self.tables:
            console.print(table)
        for line in self.lines:
            console.print(f" • {escape(line)}", highlight=False, soft_wrap=True)


def tables(title: str, side: str, rows: Sequence[str], columns: Mapping[str, Sequence[str]], width: int) -> list[Table]:
    """Columns of cells with a name at the side of each row; as many tables as keep every cell whole in `width`."""
    left = max(map(len, (side, *rows))) + 4  # of a column: its cells, a blank on both sides, and a line
    parts: list[list[str]] = []
    free = 0
    for name, cells in columns.items():
        # A heading may break between words, a cell may not.
        needs = max(map(len, (*name.split(), *cells))) + 3
        if not parts or needs > free:
            parts.append([])
            free = width - left
        parts[-1].append(name)
        free -= needs
    made = []
    for part in parts or [[]]:
        title_or_none = None if made else title
        table = Table(title=title_or_none, title_justify="left", header_style="bold", title_style="bold")
        table.add_column(side, justify="right", no_wrap=True)
        whole = left + sum(max(map(len, (name, *columns[name]))) + 3 for name in part)
        for name in part:
            # Where headings have to break, only they do: left to itself, the table would break cells as well.
            fixed = max(map(len, (*name.split(), *columns[name]))) if whole > width else None
            table.add_column(name, justify="right", width=fixed)
        for i, row in enumerate(rows):
            table.add_row(row, *(columns[name][i] for name in part))
        made.append(table)
    return made
