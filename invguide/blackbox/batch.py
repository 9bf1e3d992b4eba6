"""The samples of one call of a black box, and what has become of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invguide.blackbox.ledger import Member
from invguide.errors import InputError, ShapeError

REAL = {torch.float64: np.float64, torch.float16: np.float16}
HINT = "raise an exception, or return NaN, where a call has failed"


class Unit(NamedTuple):
    """What one call of the function gets."""

    rows: range
    x: np.ndarray

    def singles(self) -> list[Unit]:
        """Its samples as batches of one."""
        return [Unit(self.rows[i : i + 1], self.x[i : i + 1]) for i in range(len(self.rows))]


class Batch:
    """Collects answers and states, row by row.

    Args:
        x: The samples, (B, *shape).
        name: Of the function.
        y_shape: Shape of one answer, where one has been seen before.
        complex: Whether answers are complex, where one has been seen before.
    """

    def __init__(
        self, x: Tensor, name: str, y_shape: tuple[int, ...] | None, complex: bool | None = None
    ) -> None:
        values = x.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        self.inputs = np.array(values.resolve_conj().numpy(), order="C")
        self.dtype = x.dtype if x.dtype.is_floating_point else torch.float32
        self.device = x.device
        self.name, self.y_shape, self.complex = name, y_shape, complex
        self.shown: int | None = None  # the row that y_shape comes from
        self.values: list[np.ndarray | None] = [None] * len(x)
        self.found: list[Member | None] = [None] * len(x)

    def units(self, chunk: int | None) -> list[Unit]:
        """Cut into calls: of one sample without batch axis, or of chunks."""
        count = len(self.inputs)
        if chunk is None:
            return [Unit(range(i, i + 1), self.inputs[i, ...]) for i in range(count)]
        cuts = [range(i, min(i + chunk, count)) for i in range(0, count, chunk)]
        return [Unit(rows, self.inputs[rows.start : rows.stop]) for rows in cuts]

    def accept(self, unit: Unit, value: np.ndarray, member: Member, batched: bool) -> bool:
        """Store an answer; return whether all of it is finite."""
        count = len(unit.rows)
        if batched and value.shape[:1] != (count,):
            raise ShapeError(
                f"{self.name} returned shape {value.shape} for a batch of {count} samples; expected ({count}, ...)"
            )
        parts = value if batched else value[None]
        good = [self._place(row, parts[i, ...], member) for i, row in enumerate(unit.rows)]
        return all(good)

    def _place(self, row: int, value: np.ndarray, member: Member) -> bool:
        if self.y_shape is None:
            self.y_shape, self.shown = value.shape, row
        if value.shape != self.y_shape:
            other = "samples before" if self.shown is None else f"sample {self.shown}"
            raise ShapeError(
                f"{self.name} returned shape {value.shape} for sample {row} and {self.y_shape} for {other}; expected "
                f"one shape for all; {HINT}"
            )
        kind, is_complex = REAL.get(self.dtype, np.float32), value.dtype.kind == "c"
        if is_complex:
            kind = np.complex128 if kind == np.float64 else np.complex64
        with np.errstate(all="ignore"):
            value = value.astype(kind)
        bad = int(value.size - np.isfinite(value).sum())
        if bad:
            text = f"{bad} of {value.size} numbers are NaN or infinite"
            self.found[row] = member._replace(state="non-finite", detail=text)
        else:
            self._check_kind(row, is_complex)
            self.found[row], self.values[row] = member, value
        return not bad

    def _check_kind(self, row: int, is_complex: bool) -> None:
        if self.complex is None:
            self.complex = is_complex
        if self.complex != is_complex:
            words = ("real", "complex")
            raise InputError(
                f"{self.name} returned {words[is_complex]} numbers for sample {row} and {words[self.complex]} ones for "
                f"others; expected one kind for all; {HINT}"
            )

    def fail(self, unit: Unit, member: Member) -> None:
        for row in unit.rows:
            self.found[row] = member

    @property
    def failures(self) -> int:
        return sum(member is not None and member.failed for member in self.found)

    def members(self) -> tuple[Member, ...]:
        stopped = Member("stopped", "the batch was given up before this call ended", 0)
        return tuple(stopped if member is None else member for member in self.found)

    def tensor(self) -> Tensor:
        """(B, *y_shape), NaN where there is no answer."""
        assert self.y_shape is not None
        known = [value for value in self.values if value is not None]
        kind = np.result_type(*known) if known else REAL.get(self.dtype, np.float32)
        out = np.full((len(self.values), *self.y_shape), np.nan, kind)
        for row, value in enumerate(self.values):
            if value is not None:
                out[row] = value
        y = torch.from_numpy(out).to(self.device)
        return y if y.is_complex() else y.to(self.dtype)
