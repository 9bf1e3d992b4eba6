"""A value to increase, in place of a likelihood or beside it: r(x) of clean signals in data units."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.checks import Checked, check, checked
from invguide.arguments.entries import Entries, check_signals
from invguide.arguments.rules import Number
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import Operator
from invguide.numerics.trial import RAISES, gradient_fault

if TYPE_CHECKING:
    from invguide.diagnostics.check import OperatorCheck


class Reward(Entries, metaclass=Checked):
    """Higher is better; the target is p(x) exp(r(x)). Must neither change x nor couple rows.

    A sample that cannot be scored is NaN. Rewards add up: `0.5 * a + 2 * b`, `-a`, `sum([a, b])`.
    """

    entries = ("__call__", "changes_input", "check")
    differentiable: bool = True
    __array_ufunc__ = None  # so that numpy leaves `np.float64(2) * reward` to us

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """(B, *shape), data units -> (B,)."""

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        if given.get("x") is not None:
            check_signals(repr(self), "x", given["x"])

    def check_answer(self, method: str, given: dict[str, Any], answer: Any) -> None:
        if method == "__call__":
            as_scores(answer, given["x"], repr(self))

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
    ) -> OperatorCheck:
        """Examine the reward on clean signals x (B, *shape), or random ones of `shape`; print and return a table."""
        from invguide.diagnostics.reward import certify_reward

        certificate = certify_reward(self, shape=shape, x=x, seed=seed)
        if not quiet:
            print(certificate)  # noqa: T201
        return certificate

    def __mul__(self, weight: float | Tensor) -> Weighted:
        if isinstance(weight, Reward):
            return NotImplemented
        factor: float = check(repr(self), "the weight", weight, Number())
        return Weighted(tuple((factor * w, part) for w, part in terms(self)))

    __rmul__ = __mul__

    def __neg__(self) -> Weighted:
        return -1 * self

    def __add__(self, other: Reward | int) -> Reward:
        if isinstance(other, Reward):
            return Weighted(terms(self) + terms(other))
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

    Args:
        parts: (weight, reward) of each term; weights are finite, of any sign.

    Raises:
        InputError: A weight that is not finite.
    """

    parts: tuple[tuple[float, Reward], ...]

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


def terms(reward: Reward) -> tuple[tuple[float, Reward], ...]:
    """Return (weight, reward) of each term of a sum; of any other reward, itself with weight 1."""
    return reward.parts if isinstance(reward, Weighted) else ((1.0, reward),)


@checked
def as_reward(value: Any, differentiable: bool | None = None) -> Reward:
    """Return anything that scores samples as a reward.

    Args:
        value: A Reward (returned as it is), an Operator with one number per sample such as a BlackBox, or a callable
            (N, *shape) -> (N,) on torch tensors or numpy arrays, data units.
        differentiable: Whether gradients may be taken of a callable. Default None: its first call finds out; False for
            one whose gradient is of no use.

    Raises:
        InputError: Nothing that scores samples.

    Example:
        >>> import torch
        >>> as_reward(lambda x: -x.square().mean((1, 2, 3)))(torch.ones(2, 1, 4, 4))
        tensor([-1., -1.])
    """
    from invguide.adapters.rewards import FunctionReward

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
        return as_scores(self.operator.to(x.device)(x.clone()), x, repr(self))

    def operators(self) -> list[Operator]:
        return [self.operator]

    def changes_input(self, x: Tensor) -> bool:
        given = x.clone()
        self.operator.to(x.device)(given)
        return not torch.equal(given, x)

    def __repr__(self) -> str:
        return f"as_reward({type(self.operator).__name__}({self.operator.extra_repr()}))"


class _Blind(Reward):
    """A reward whose gradient is of no use, as a black box."""

    differentiable = False

    def __init__(self, reward: Reward, fault: str) -> None:
        self.reward, self.fault = reward, fault

    def __call__(self, x: Tensor) -> Tensor:
        return self.reward(x)

    def operators(self) -> list[Operator]:
        return self.reward.operators()

    def changes_input(self, x: Tensor) -> bool:
        return self.reward.changes_input(x)

    def __repr__(self) -> str:
        return repr(self.reward)


def try_reward(reward: Reward, x: Tensor) -> Reward:
    """Score x (B, *shape), data units, and return the reward; terms whose gradient is of no use as black boxes.

    Raises:
        InputError: Such a term was declared differentiable; and what is wrong with a reward at its first call.
    """
    reward(x)
    parts: list[tuple[float, Reward]] = []
    for weight, part in terms(reward):
        fault = gradient_fault(part, x) if part.differentiable else None
        if fault is None or fault.startswith(RAISES):  # which the run tells, and where it happened
            parts.append((weight, part))
            continue
        if getattr(part, "declared", False):
            raise InputError(
                f"{part!r} was declared differentiable, but its gradient {fault}; declare differentiable=False"
            )
        parts.append((weight, _Blind(part, f"its gradient {fault}")))
    if all(new is old for (_, new), (_, old) in zip(parts, terms(reward), strict=True)):
        return reward
    return parts[0][1] if not isinstance(reward, Weighted) else Weighted(tuple(parts))


def as_scores(value: Any, x: Tensor, name: str) -> Tensor:
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


class EditReward(Reward):
    """A reward that knows the picture that is edited.

    Attributes:
        source: The picture (*shape), data units.
        edit_mask: Where it may change, 1, and where it must not, 0; in between, by how much. Broadcasts to the picture.
    """

    source: Tensor
    edit_mask: Tensor
