"""What a command says at its end."""

from __future__ import annotations

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
