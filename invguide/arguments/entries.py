"""Public methods check what they are given, as functions and constructors do; what calls them inside of a run does not.

A class names its methods in `entries`. Called from outside, their arguments are checked by their annotations
(`invguide.arguments.checks`) and by `check_given`, their answer by `check_answer`, and what torch or Python raise in
between is said in words. Under `unchecked`, as in every run, and in what an entry calls itself, none of this happens.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from invguide.arguments.rules import shown
from invguide.errors import InputError, InvguideError, ShapeError

_INSIDE: ContextVar[bool] = ContextVar("inside of an entry or a run", default=False)
_RAW = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_BELOW = frozenset(("invguide", "torch", "numpy", "scipy", "deepinv", "kornia", "PIL"))
_OURS = (InvguideError, torch.OutOfMemoryError)


class Entries:
    """A class whose public methods check what they are given.

    Attributes:
        entries: Names of these methods, for the classes of this package; of others they are taken as they are.
    """

    entries: ClassVar[tuple[str, ...]] = ()

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        """Raise InputError where arguments of the right kinds do not go together."""

    def check_answer(self, method: str, given: dict[str, Any], answer: Any) -> None:
        """Raise InputError where an answer shows that the arguments did not fit, such as by broadcasting."""


@contextmanager
def unchecked() -> Generator[None]:
    """Take what entries are given as it is, in this thread."""
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def entry(method: Callable[..., Any], bind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that checks its arguments.

    Args:
        method: As written.
        bind: Called with its name, and all its arguments; returns them converted (`inspect.BoundArguments`).
    """

    @wraps(method)
    def outer(self: Entries, *args: Any, **kwargs: Any) -> Any:
        if _INSIDE.get():
            return method(self, *args, **kwargs)
        who = f"{type(self).__name__}.{method.__name__}"
        with unchecked():
            bound = bind(who, (self, *args), kwargs)
            given = {n: v for n, v in bound.arguments.items() if n != "self"}
            try:
                self.check_given(method.__name__, given)
                answer = method(*bound.args, **bound.kwargs)
                self.check_answer(method.__name__, given, answer)
            except _OURS:
                raise
            except _RAW as error:
                if _of_the_user(error):
                    raise
                raise InputError(_words(who, given, error)) from error
        return answer

    return outer


def _of_the_user(error: Exception) -> bool:
    """Whether code of neither ours nor of the libraries below was running: its errors have to reach their author."""
    frames = traceback.walk_tb(error.__traceback__)
    roots = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames}
    return not roots <= _BELOW | sys.stdlib_module_names


def _words(who: str, given: dict[str, Any], error: Exception) -> str:
    told = ", ".join(f"{name} = {shown(value)}" for name, value in given.items())
    text = " ".join(str(error).split())[:200]
    return f"{who} cannot take {told or 'this'} ({type(error).__name__}: {text}); expected what its docstring asks for"


# ---- what contracts have in common


def check_signals(
    who: str, name: str, x: Tensor, shape: tuple[int | None, ...] | None = None
) -> None:
    """Raise unless x is a batch of numbers with fractions, (B, *shape), None in a shape being any size."""
    wanted = "(B, ...)" if shape is None else f"(B, {', '.join(str(n or 'any') for n in shape)})"
    if not (x.is_floating_point() or x.is_complex()):
        raise InputError(
            f"{who}: {name} has {x.dtype} values; expected floating point, such as {name}.float(), or / 255 of pictures"
        )
    if not x.numel():
        raise ShapeError(f"{who}: {name} is an empty batch, {tuple(x.shape)}")
    fits = x.ndim > 0
    if shape is not None:
        fits = x.ndim == len(shape) + 1 and all(
            n in (None, m) for n, m in zip(shape, x.shape[1:], strict=True)
        )
    if not fits:
        raise ShapeError(f"{who} takes {name} of shape {wanted}, got {tuple(x.shape)}")


def check_per_sample(
    who: str, name: str, value: Tensor | float, rows: int, positive: bool = True
) -> None:
    """Raise unless a value is real, finite and above 0 (or at least 0), one for all or one for each of the rows."""
    level = torch.as_tensor(value)
    if level.ndim > 1 or (level.ndim == 1 and len(level) not in (1, rows)):
        raise ShapeError(
            f"{who}: {name} is {shown(level)}; expected a number, or one per row ({rows},)"
        )
    check_size(who, name, level, positive)


def check_size(who: str, name: str, value: Tensor, positive: bool = True) -> None:
    """Raise unless all of a tensor is real, finite and above 0, or at least 0."""
    sign = ">" if positive else ">="
    if value.is_complex() or not bool(value.isfinite().all()):
        raise InputError(f"{who}: {name} is {shown(value)}; expected finite numbers {sign} 0")
    if not bool(((value > 0) if positive else (value >= 0)).all()):
        raise InputError(f"{who}: {name} is {value.min().item():g}; expected numbers {sign} 0")
