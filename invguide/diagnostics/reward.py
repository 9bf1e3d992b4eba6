"""The reward certificate: what a reward says of itself, checked on numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.adapters.rewards import FunctionReward
from invguide.diagnostics.check import OperatorCheck
from invguide.diagnostics.numbers import brief, signals
from invguide.diagnostics.operator import Examination
from invguide.errors import ShapeError
from invguide.forward_operator import Operator
from invguide.reward import Reward, Weighted


def certify_reward(
    reward: Reward,
    shape: tuple[int, ...] | None = None,
    x: Tensor | None = None,
    seed: int = 0,
) -> OperatorCheck:
    """Examine a reward on clean signals x (B, *shape), data units, or on four of uniform random numbers in [0, 1].

    Runs in double precision where the reward allows it.

    Raises:
        InputError: Neither shape nor x is given, or both.
    """
    return RewardExamination(reward, *signals(shape, x, count=4, seed=seed)).run()


class _OneNumber(Operator):
    """A reward as an operator that measures one number, so that it can take the examinations of operators."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.reward.differentiable

    def forward(self, x: Tensor) -> Tensor:
        value = self.reward(x)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{len(x)} samples gave {got}; expected ({len(x)},), one value each")
        return value[:, None]


class RewardExamination(Examination):
    """Shape, finiteness, repetition, input, rows, gradient, range and time of a reward."""

    def __init__(self, reward: Reward, x: Tensor, generator: torch.Generator) -> None:
        super().__init__(_OneNumber(reward), x, generator)
        self.reward = reward
        self.certificate = OperatorCheck(repr(reward))

    def run(self) -> OperatorCheck:
        y = self.measure()
        if y is None:
            return self.certificate
        self.attempt(
            {
                "input unchanged": self.unchanged,
                "rows independent": lambda: self.repetition(y),
                "differentiable": self.gradient,
            }
        )
        self.values(y)
        self.time()
        self.failed_calls()
        return self.certificate

    def measure(self) -> Tensor | None:
        """Find a precision in which the reward runs, and the samples that it can score; None: nothing to go on with."""
        x, reason = self.x.double(), ""
        try:
            y = self.operator(x.clone()).detach()
        except Exception as error:
            reason = brief(error)
            x, self.tolerance = self.x.float(), 1e-4
            try:
                y = self.operator(x.clone()).detach()
            except Exception as error:
                self.add("runs", False, f"raises {brief(error)}")
                return None
        self.add("runs", True, f"{tuple(x.shape[1:])} -> one number")
        if reason:
            self.add("precision", None, f"float32 only; float64 raises {reason}")
        elif any(torch.equal(part, part.float().to(part)) for part in self.parts(x, y)):
            self.tolerance = 1e-4  # whole numbers, or float32 inside
        finite = torch.isfinite(y[:, 0])
        bad = int((~finite).sum())
        # A black box may leave samples out; a gradient method has no use for one without a slope.
        good = None if 0 < bad <= len(y) - 2 and not self.reward.differentiable else bad == 0
        self.add(
            "finite", good, f"{bad} of {len(y)} samples are NaN or infinite" if bad else "yes"
        )
        self.x = x[finite]
        return None if good is False else y[finite]

    def parts(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the values of each part of a sum: its weight hides how a part was rounded."""
        if not isinstance(self.reward, Weighted):
            return [y]
        return [part(x.clone()).detach() for _, part in self.reward.parts]

    def unchanged(self) -> None:
        changed = self.reward.changes_input(self.x)
        self.add("input unchanged", not changed, "x is changed in place" if changed else "yes")

    def repetition(self, y: Tensor) -> None:
        self.same("deterministic", self.operator(self.x), y, 0.1 * self.tolerance)
        alone = torch.cat([self.operator(row[None]) for row in self.x])
        # Another companion: rows that share a quantity may still agree on the batch itself.
        crowd = self.operator(torch.cat([self.x, self.x.flip(0) * 0.5 + 0.1]))[: len(y)]
        errors = [(other - y).abs().nan_to_num(float("inf")).max() for other in (alone, crowd)]
        worse = alone if errors[0] >= errors[1] else crowd
        self.same("rows independent", worse, y, self.tolerance)

    def same(self, name: str, a: Tensor, b: Tensor, tolerance: float) -> None:
        """Record whether two lists of values agree, relative to the largest: a value near zero says nothing."""
        difference = (a.detach() - b).abs().max()
        error = 0.0 if difference == 0 else (difference / b.abs().max()).item()
        self.add(
            name, error <= tolerance, "yes" if error == 0 else f"relative difference {error:.1e}"
        )

    def values(self, y: Tensor) -> None:
        low, high = y.min().item(), y.max().item()
        flat = low == high
        text = f"all {len(y)} samples score {low:.4g}" if flat else f"{low:.4g} to {high:.4g}"
        self.add("values", None if flat else True, text)

    def failed_calls(self) -> None:
        failures = self.reward.failures if isinstance(self.reward, FunctionReward) else None
        if failures is not None and failures.batches:
            text = f"{failures.batches} batches raised and were asked row by row, {failures.count} rows raised"
            self.add("failures", None, f"{text}; first {failures.first}")
