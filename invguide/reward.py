"""A value to increase, in place of a likelihood or beside it: r(x) of clean signals in data units."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from invguide.errors import InputError, RunError, ShapeError
from invguide.forward_operator import Operator

if TYPE_CHECKING:
    from invguide.certificate import Certificate


class Reward(ABC):
    """Higher is better; the target is p(x) exp(r(x)). Must neither change x nor couple rows.

    A sample that cannot be scored is NaN. Rewards add up: `0.5 * a + 2 * b`, `-a`, `sum([a, b])`.
    """

    differentiable: bool = True
    __array_ufunc__ = None  # so that numpy leaves `np.float64(2) * reward` to us

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(B, *shape), data units -> (B,)."""

    def operators(self) -> list[Operator]:
        """Return the operators inside, such as black boxes, whose calls the driver counts and keeps."""
        return []

    def changes_input(self, x: Tensor) -> bool:
        """Return whether scoring x (B, *shape) in place changes what is scored; x itself stays as it is."""
        given = x.clone()
        self(given)
        return not torch.equal(given, x)

    def check(
        self,
        shape: tuple[int, ...] | None = None,
        x: Tensor | None = None,
        *,
        seed: int = 0,
        quiet: bool = False,
    ) -> Certificate:
        """Examine the reward on clean signals x (B, *shape), or random ones of `shape`; print and return a table."""
        from invguide.reward_certificate import certify_reward

        certificate = certify_reward(self, shape=shape, x=x, seed=seed)
        if not quiet:
            print(certificate)  # noqa: T201
        return certificate

    def __mul__(self, weight: float | Tensor) -> Weighted:
        return Weighted(tuple((float(weight) * w, part) for w, part in _terms(self)))

    __rmul__ = __mul__

    def __neg__(self) -> Weighted:
        return -1 * self

    def __add__(self, other: Reward | int) -> Reward:
        if isinstance(other, Reward):
            return Weighted(_terms(self) + _terms(other))
        if other == 0:  # where sum([...]) starts
            return self
        raise InputError(
            f"a reward cannot be added to {other!r}; wrap a function as as_reward(function); leave constants out, "
            f"they do not change what is sampled"
        )

    __radd__ = __add__

    def __sub__(self, other: Reward) -> Reward:
        return self + -other


@dataclass(frozen=True, repr=False)
class Weighted(Reward):
    """Sum of weight * reward, as `0.5 * a + 2 * b` makes it; differentiable only where every part is.

    Raises:
        InputError: A weight that is not finite.
    """

    parts: tuple[tuple[float, Reward], ...]

    def __post_init__(self) -> None:
        for weight, part in self.parts:
            if not math.isfinite(weight):
                raise InputError(f"the weight of {part!r} is {weight}; expected a finite number")

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(part.differentiable for _, part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for weight, part in self.parts:
            total = total + weight * part(x)
        return total

    def operators(self) -> list[Operator]:
        return [operator for _, part in self.parts for operator in part.operators()]

    def changes_input(self, x: Tensor) -> bool:
        return any(part.changes_input(x) for _, part in self.parts)

    def __repr__(self) -> str:
        first, *others = (f"{w:g} * {r!r}".removeprefix("1 * ") for w, r in self.parts)
        signed = (f" - {text[1:]}" if text[0] == "-" else f" + {text}" for text in others)
        return first + "".join(signed)


def _terms(reward: Reward) -> tuple[tuple[float, Reward], ...]:
    return reward.parts if isinstance(reward, Weighted) else ((1.0, reward),)


def as_reward(value: Any, differentiable: bool | None = None) -> Reward:
    """Return anything that scores samples as a reward.

    Args:
        value: A Reward (returned as it is), an Operator with one number per sample such as a BlackBox, or a callable
            (N, *shape) -> (N,) on torch tensors or numpy arrays, data units.
        differentiable: Whether gradients may be taken of a callable; by default its first call finds out.

    Raises:
        InputError: Nothing that scores samples.

    Example:
        >>> import torch
        >>> as_reward(lambda x: -x.square().mean((1, 2, 3)))(torch.ones(2, 1, 4, 4))
        tensor([-1., -1.])
    """
    if isinstance(value, (Reward, Operator)):
        if differentiable not in (None, value.differentiable):
            raise InputError(
                f"differentiable={differentiable}, but {value!r} says {value.differentiable}; leave the argument out"
            )
        return value if isinstance(value, Reward) else OperatorReward(value)
    if inspect.isclass(value):
        raise InputError(
            f"the reward is the class {value.__name__}; pass an instance, {value.__name__}(...)"
        )
    if not callable(value):
        raise InputError(
            f"the reward is a {type(value).__name__}; expected a Reward, a BlackBox or a callable (N, *shape) -> (N,)"
        )
    return FunctionReward(value, differentiable)


class OperatorReward(Reward):
    """An operator with one number per sample, such as a BlackBox, as a reward; its NaN rows stay NaN."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operator.differentiable

    def __call__(self, x: Tensor) -> Tensor:
        return _scores(self.operator.to(x.device)(x.clone()), x, repr(self))

    def operators(self) -> list[Operator]:
        return [self.operator]

    def changes_input(self, x: Tensor) -> bool:
        given = x.clone()
        self.operator.to(x.device)(given)
        return not torch.equal(given, x)

    def __repr__(self) -> str:
        return f"as_reward({type(self.operator).__name__}({self.operator.extra_repr()}))"


@dataclass
class Failures:
    """What went wrong in a black-box reward so far.

    Attributes:
        count: Samples that raised on their own, and are NaN.
        batches: Calls with a batch that raised, after which the rows were asked one by one.
        first: The first exception's text.
    """

    count: int = 0
    batches: int = 0
    first: str = ""


# How a function may be called, in the order that the first call tries. A tensor that wants gradients comes first: numpy
# functions refuse it, instead of half understanding it.
GRADIENT, ARRAY, TENSOR = "a tensor with gradients", "an array", "a tensor"


class FunctionReward(Reward):
    """A callable (B, *shape) -> (B,) on torch tensors or numpy arrays, given a copy of x each time.

    The first call finds out which, and whether gradients reach x; until then `differentiable` is True, unless it was
    declared. A black box that raises for a batch is asked row by row: rows that raise are NaN, and are counted in
    `failures`. The exceptions of a differentiable one pass.

    Raises:
        InputError: Neither a tensor nor an array can be passed, something else than numbers is returned, or a gradient
            is wanted where there is none or where the function changes its input in place.
        ShapeError: Not one value per sample.
        RunError: A black box raised for every row of a batch.
    """

    def __init__(self, function: Callable[[Any], Any], differentiable: bool | None = None) -> None:
        self.function, self.declared = function, differentiable
        self.differentiable = differentiable is not False
        self.failures = Failures()
        self._way = GRADIENT if differentiable else None

    def __call__(self, x: Tensor) -> Tensor:
        way = self._way_for(x)
        if way == GRADIENT:
            return _scores(self._open_call(x), x, repr(self))
        try:
            value = self._closed_call(x, way)
        except Exception as error:
            return self._row_by_row(x, way, error)
        return _scores(value, x, repr(self))

    def _way_for(self, x: Tensor) -> str:
        """Find out, once, how the function wants to be called: by the first row, else the batch or any row."""
        if isinstance(self.function, nn.Module):
            self.function.to(x.device)
        if self._way is not None:
            return self._way
        errors: dict[str, Exception] = {}
        with torch.inference_mode(False), torch.enable_grad():
            probe = x.detach().clone().requires_grad_()
            for rows in (probe[:1], probe, *_single_rows(probe)[1:]):
                for way in (GRADIENT, ARRAY, TENSOR):
                    try:
                        value = self.function(_copy(rows, way))
                    except Exception as error:
                        errors.setdefault(way, error)
                        continue
                    reached = isinstance(value, Tensor) and value.requires_grad
                    if way == GRADIENT and (self.declared is False or not reached):
                        way = TENSOR
                    self._way, self.differentiable = way, way == GRADIENT
                    return way
        first, second = errors[GRADIENT], errors[ARRAY]
        raise InputError(
            f"{self!r} takes neither a tensor of shape {tuple(x.shape)} ({_text(first)}) nor an array "
            f"({_text(second)}), nor a single row; expected (N, *shape) -> (N,). What takes one sample at a time, "
            f"a Command too, can be given as BlackBox(...)"
        ) from first

    def _open_call(self, x: Tensor) -> Any:
        """Call the function so that gradients may pass."""
        given = _copy(x, GRADIENT)
        try:
            value = self.function(given)
        except Exception as error:
            note = (
                f"raised by {self!r}, given {tuple(x.shape)}; to have samples that raise left out, declare it a black "
                f"box: as_reward(function, differentiable=False)"
            )
            getattr(error, "add_note", str)(note)  # Python 3.10 has no notes
            raise
        if given.requires_grad:
            # Left alone, this fails much later, in the backward pass, where nothing names the reward.
            if given._version > 0:
                raise InputError(
                    f"{self!r} changes its input in place, where gradients are taken; write x = x * 2, not x *= 2, "
                    f"and clamp, not clamp_"
                )
            if self.declared and not (isinstance(value, Tensor) and value.requires_grad):
                raise InputError(
                    f"{self!r} was declared differentiable, but its gradient does not reach x; use torch operations "
                    f"only, without detach, or declare differentiable=False"
                )
        return value

    def _closed_call(self, x: Tensor, way: str) -> Any:
        with torch.no_grad():
            return self.function(_copy(x, way))

    def _row_by_row(self, x: Tensor, way: str, error: Exception) -> Tensor:
        self.failures.batches += 1
        self.failures.first = self.failures.first or _text(error)
        scores: list[Tensor] = []
        failed = 0
        for row in _single_rows(x):
            try:
                value = self._closed_call(row, way)
            except Exception:
                failed += 1
                value = np.full(1, np.nan)
            scores.append(_scores(value, row, repr(self)))
        self.failures.count += failed
        if failed == len(x):
            raise RunError(
                f"{self!r} raised for every one of {len(x)} samples: {_text(error)}"
            ) from error
        return torch.cat(scores)

    def changes_input(self, x: Tensor) -> bool:
        given = _copy(x, self._way_for(x))
        self.function(given)
        return not torch.equal(torch.as_tensor(given, device=x.device), x)

    def __repr__(self) -> str:
        return f"as_reward({getattr(self.function, '__name__', type(self.function).__name__)})"


def _single_rows(x: Tensor) -> list[Tensor]:
    return [x[i : i + 1] for i in range(len(x))]


def _copy(x: Tensor, way: str) -> Any:
    """Return what the function is given: always a copy, so that ours cannot change."""
    if way == ARRAY:
        return np.array(x.detach().cpu().numpy())
    return x.clone() if way == GRADIENT else x.detach().clone()


def _scores(value: Any, x: Tensor, name: str) -> Tensor:
    """Return what a reward gave as a tensor (B,) like x."""
    try:
        scores = torch.as_tensor(value if isinstance(value, Tensor) else np.array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} returned a {type(value).__name__} ({error}); expected a tensor or array of {len(x)} numbers"
        ) from error
    if scores.shape != (len(x),):
        raise ShapeError(
            f"{name} returned shape {tuple(scores.shape)} for {len(x)} samples; expected ({len(x)},), one value each. "
            f"A function of a single sample can be given as BlackBox(function)"
        )
    if scores.is_complex():
        raise InputError(f"{name} returned complex numbers; expected real ones")
    return scores.to(x)


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
