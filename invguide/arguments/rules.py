"""What an argument may be: the rules that annotations of `invguide.arguments.checks` stand for."""

from __future__ import annotations

import collections.abc
import inspect
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.arrays import Refused, as_tensor
from invguide.errors import suggest

MOST = 10_000_000  # of anything that is counted: more is a slip, and would run for days or fill the memory
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Rule:
    """What an argument may be. `take` returns it as the code wants it, or raises Refused; `expected` says what fits."""

    expected: str

    def take(self, value: Any) -> Any:
        raise NotImplementedError


def shown(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(
        value, (str, bytes, numbers.Number, type(None), tuple, list, np.generic, Tensor)
    ):
        text = repr(value.item() if isinstance(value, (np.generic, Tensor)) else value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Number(Rule):
    """A number from `low` to `high`, or above and below them where `open_low`, `open_high`; Python's, numpy's, 0-d."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    nonzero: bool = False
    infinite: bool = False  # whether infinity is one
    unit: str = ""

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        bounded = math.isfinite(self.high) and self.high != MOST
        finite = "" if self.whole or self.infinite or bounded else "finite "
        kind = f"a {'whole ' if self.whole else finite}number"
        kind += f" of {self.unit}" if self.unit else ""
        kind += " other than 0" if self.nonzero else ""
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        if bounded and math.isfinite(self.low) and not (self.open_low or self.open_high):
            return f"{kind} from {low} to {high}"
        parts = []
        if math.isfinite(self.low):
            parts.append(f"above {low}" if self.open_low else f"of at least {low}")
        if bounded:
            parts.append(f"below {high}" if self.open_high else f"at most {high}")
        return " ".join([kind, " and ".join(parts)]).strip()

    def take(self, value: Any) -> int | float:
        if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
            value = as_tensor(value).item()
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise Refused("")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        inside = (number > self.low if self.open_low else number >= self.low) and (
            number < self.high if self.open_high else number <= self.high
        )
        if self.high == MOST and number > MOST:
            raise Refused(f"expected at most {MOST:,}: more of anything is taken for a slip")
        if (
            not inside
            or (self.nonzero and number == 0)
            or (math.isinf(number) and not self.infinite)
        ):
            raise Refused("")
        if not self.whole:
            if number != 0 and not SMALLEST <= abs(number) <= LARGEST and math.isfinite(number):
                raise Refused(
                    f"expected a number that single precision holds, {SMALLEST:.1e} to {LARGEST:.1e}"
                )
            return number
        whole = int(value)  # pyright: ignore[reportArgumentType]
        if number != whole:
            raise Refused("")
        return whole


@dataclass(frozen=True)
class OneOf(Rule):
    """One of some strings, in this spelling."""

    options: tuple[str, ...]

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return " or ".join(map(repr, self.options))

    def take(self, value: Any) -> str:
        if isinstance(value, str) and value in self.options:
            return value
        raise Refused(suggest(value, self.options) if isinstance(value, str) else "")


@dataclass(frozen=True)
class Instance(Rule):
    """An instance of one of these classes."""

    kinds: tuple[type, ...]

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return " or ".join(_named(kind) for kind in self.kinds)

    def take(self, value: Any) -> Any:
        if isinstance(value, self.kinds):
            return value
        if isinstance(value, type) and issubclass(value, self.kinds):
            raise Refused(f"pass an instance, {value.__name__}(...)")
        raise Refused("")


def _named(kind: type) -> str:
    plain = {str: "a string", dict: "a dict", os.PathLike: "a path"}
    name = "Mapping" if kind is collections.abc.Mapping else kind.__name__
    return plain.get(kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


class Flag(Rule):
    expected = "True or False"

    def take(self, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise Refused("")
        return bool(value)


class Nothing(Rule):
    expected = "None"

    def take(self, value: Any) -> None:
        if value is not None:
            raise Refused("")


@dataclass(frozen=True)
class Function(Rule):
    """A callable, of so many arguments where that is known."""

    count: int | None = None

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        many = "" if self.count == 1 else "s"
        return "a callable" + ("" if self.count is None else f" of {self.count} argument{many}")

    def take(self, value: Any) -> Any:
        if isinstance(value, type):
            raise Refused(f"pass an instance, {value.__name__}(...)")
        if not callable(value):
            raise Refused("")
        try:
            if self.count is not None:
                inspect.signature(value).bind(*range(self.count))
        except TypeError:
            raise Refused("") from None
        except ValueError:  # of a builtin, which does not tell
            pass
        return value


@dataclass(frozen=True)
class Array(Rule):
    """A tensor, or what `invguide.arguments.arrays.as_tensor` makes one of; numbers are none.

    `batch`: a PIL picture is a batch of one, and a masked array stays one, for who obeys the mask.
    """

    batch: bool = False
    expected = "a tensor or array"

    def take(self, value: Any) -> Tensor:
        if isinstance(value, (numbers.Number, bool, np.generic)):
            raise Refused("")
        if self.batch and isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            return value  # pyright: ignore[reportReturnType]
        tensor = as_tensor(value)
        if self.batch and isinstance(value, (list, tuple)) and tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())  # as torch makes of them
        return tensor[None] if self.batch and type(value).__module__.startswith("PIL.") else tensor


class Dtype(Rule):
    """A floating-point type: torch's, numpy's, or its name."""

    expected = "a floating-point type, such as torch.float32 or 'float64'"

    def take(self, value: Any) -> torch.dtype:
        if isinstance(value, str):
            value = getattr(torch, value.removeprefix("torch."), None)
        elif isinstance(value, (type, np.dtype)) and not isinstance(value, torch.dtype):
            try:
                value = getattr(torch, np.dtype(value).name, None)
            except TypeError:
                raise Refused("") from None
        if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
            raise Refused("")
        return value


@dataclass(frozen=True)
class Items(Rule):
    """A sequence whose items fit a rule, as a tuple; `rules` are those of each position, where the length is fixed."""

    rules: tuple[Rule, ...]
    fixed: bool = False
    least: int = 0
    most: float = math.inf  # product of whole numbers
    of: str = ""  # what the items are

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.fixed and self.of:
            return f"{self.of}, each {self.rules[0].expected}"
        if self.fixed:
            return f"({', '.join(rule.expected for rule in self.rules)})"
        several = f"at least {self.least}, " if self.least > 1 else ""
        bound = f", of at most {self.most:.3g} values" if math.isfinite(self.most) else ""
        return f"a tuple {self.of or '(...)'}, {several}each {self.rules[0].expected}{bound}"

    def take(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, (np.ndarray, Tensor)) and value.ndim > 0:
            value = as_tensor(value).tolist()
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise Refused("")
        try:
            value = tuple(value)
        except TypeError:  # a class, an array of no axes
            raise Refused("") from None
        if len(value) < self.least or (self.fixed and len(value) != len(self.rules)):
            raise Refused("")
        rules = self.rules if self.fixed else self.rules * len(value)
        taken = tuple(rule.take(item) for rule, item in zip(rules, value, strict=True))
        if math.isfinite(self.most) and math.prod(item or 1 for item in taken) > self.most:
            raise Refused("")
        return taken


@dataclass(frozen=True)
class Entries(Rule):
    """A mapping from names, whose values fit a rule."""

    rule: Rule | None

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"a dict of names{'' if self.rule is None else f', each {self.rule.expected}'}"

    def take(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise Refused("")
        if self.rule is None:
            return dict(value)
        return {name: self.rule.take(entry) for name, entry in value.items()}


@dataclass(frozen=True)
class AnyOf(Rule):
    """What one of several rules takes; the first that does."""

    rules: tuple[Rule, ...]

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        told = dict.fromkeys(rule.expected for rule in self.rules)  # in order, each once
        return ", or ".join(told)

    def take(self, value: Any) -> Any:
        reasons = []
        for rule in self.rules:
            try:
                return rule.take(value)
            except Refused as refused:
                reasons.append(str(refused))
        raise Refused(next(filter(None, reasons), ""))


# ---- the annotations of settings

Count = Annotated[int, Number(1, MOST, whole=True)]
Several = Annotated[int, Number(2, MOST, whole=True)]
CountOrNone = Annotated[int, Number(0, MOST, whole=True)]  # 0: none of them
Positive = Annotated[float, Number(0, open_low=True)]
NonNegative = Annotated[float, Number(0)]
Fraction = Annotated[float, Number(0, 1)]
PositiveFraction = Annotated[float, Number(0, 1, open_low=True)]
AtLeastOne = Annotated[float, Number(1)]
PositiveOrInfinite = Annotated[float, Number(0, open_low=True, infinite=True)]
FloatType = Annotated[torch.dtype, Dtype()]
Batch = Annotated[Tensor | np.ndarray, Array(batch=True)]
Shape = Annotated[tuple[int, ...], Items((Number(1, whole=True),), least=1, most=2**40)]
SmallShape = Annotated[tuple[int, ...], Items((Number(1, whole=True),), least=1, most=2**28)]
FreeShape = Annotated[
    tuple[int | None, ...],
    Items((AnyOf((Number(1, whole=True), Nothing())),), least=1, most=2**40),
]
Size = Annotated[
    tuple[int, int], Items((Number(1, MOST, whole=True),) * 2, fixed=True, of="(height, width)")
]
Scale = Annotated[float, Number(nonzero=True)]  # of data = scale * normalised + shift
Colours = Annotated[
    tuple[tuple[float, ...], ...],
    Items((Items((Number(),), least=1, of="of C channels"),), least=1, of="(K, C)"),
]
