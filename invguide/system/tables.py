"""A small table that prints as aligned Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
    """Return an aligned Markdown table; the columns in `left` are flush left, the others flush right."""
    columns = zip(head, *rows, strict=True)
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]
    sides = [str.ljust if i in left else str.rjust for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (side(c, w) for side, c, w in zip(sides, cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


@dataclass(frozen=True)
class Table:
    """Cells as text for people, and the figures behind them for programs.

    Attributes:
        head: Names of the columns.
        rows: Cells; the first of each row is its name.
        notes: Lines printed below the table.
        figures: The numbers, ready for JSON.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([markdown(self.head, self.rows), *(f"\n{note}" for note in self.notes)])
