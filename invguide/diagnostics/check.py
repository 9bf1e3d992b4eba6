"""The outcome of a check: one line for each property that was tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

OK, NOTE, FAILS = "ok", "note", "FAILS"


class Property(NamedTuple):
    """One property: what was measured, and whether a solver can live with it."""

    name: str
    value: str
    verdict: str


@dataclass
class OperatorCheck:
    """What `Operator.check` found; `ok` unless a row FAILS, and `print` shows the table."""

    operator: str
    rows: list[Property] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(row.verdict != FAILS for row in self.rows)

    def __getitem__(self, name: str) -> Property:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the certificate has {', '.join(row.name for row in self.rows)}")

    def __str__(self) -> str:
        wide = max(len(row.name) for row in self.rows)
        lines = [f"  {row.name:<{wide}}  {row.verdict:<5}  {row.value}" for row in self.rows]
        return "\n".join(
            [f"{self.operator}: {'fit for use' if self.ok else 'NOT fit for use'}", *lines]
        )
