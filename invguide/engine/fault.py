"""Who was the first to make a NaN or an infinity of finite numbers: prior, operator, noise law or reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.noise import LogDensity
from invguide.problem.problem import Counters, Problem
from invguide.reward import terms
from invguide.rng import Noise
from invguide.solver import Solver

REMEDY_VALUE = "keep its input inside its domain, with clamp or an epsilon"
REMEDY_GRADIENT = (
    "its value is finite: the square root and the norm have no gradient at 0, and what torch.where leaves out is "
    "differentiated too; add an epsilon inside, (v + 1e-12).sqrt()"
)


class Fault(NamedTuple):
    """What went wrong first."""

    text: str  # such as "the operator Blur returned NaN"
    remedy: str
    rms: float  # of the finite signal that it was given, normalised units

    @property
    def impossible(self) -> bool:
        """Whether a log target of -inf is all there is: a signal that the target excludes, and no mistake."""
        return self.text.endswith(" -infinity")


class _BlackBox(Exception):
    """A black box would be called again: its calls are dear, and its failures are known."""


def find_fault(
    solver: Solver[Any], problem: Problem, state: Any, k: int, noise: Noise
) -> Fault | None:
    """Take step k (-1: the first state) once more, with an eye on every part; None where none is to blame.

    Args:
        solver, problem, state, noise: As the step had them; rows that are not in question may be left out.
        k: Of the step.
    """
    watched = Watched.of(problem)
    with torch.no_grad():
        try:
            if k < 0:
                solver.init(watched, noise)
            else:
                solver.step(watched, state, k, noise.at(k))
        except (_BlackBox, RuntimeError):
            pass  # what stopped the run stops this too
        return next((f for find in watched.suspects if (f := find()) is not None), None)


class Watched(Problem):
    """A problem that remembers, in order, where finite numbers went in and others came out."""

    suspects: list[Callable[[], Fault | None]]

    @classmethod
    def of(cls, problem: Problem) -> Watched:
        watched = cls.__new__(cls)
        vars(watched).update(vars(problem), suspects=[], counters=Counters())
        return watched

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        denoised = super().denoise(x, sigma)
        level = torch.as_tensor(sigma).expand(len(x))
        who = f"the prior {type(self.prior).__name__}"

        def suspect(given: Tensor, got: Tensor, what: str) -> None:
            i = first_bad(given, got)
            if i is not None:
                text = f"{who} {what} {kind(got[i])} at noise level {level[i].item():.3g}"
                fault = Fault(
                    text, "is its network valid there, and in this precision?", rms(x[i])
                )
                self.suspects.append(lambda: fault)

        suspect(x, denoised, "returned")
        if x.requires_grad and denoised.requires_grad:
            slopes: list[Tensor] = []
            denoised.register_hook(slopes.append)
            x.register_hook(
                lambda g: suspect(slopes[0], g, "has a gradient of") if slopes else None
            )
        return denoised

    def evaluate(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        self._stop_at_black_box()
        log_prob, chi2 = super().evaluate(x0)
        self._suspect_target(x0, log_prob)
        if x0.requires_grad:
            x0.register_hook(lambda g: self._suspect_target(x0, g))
        return log_prob, chi2

    def whitened(self, x0: Tensor) -> Tensor:
        self._stop_at_black_box()
        residual = super().whitened(x0)
        self._suspect_target(x0, residual)
        return residual

    def prox(self, x0: Tensor, sigma: Tensor | float) -> Tensor:
        self._stop_at_black_box()
        moved = super().prox(x0, sigma)
        i = first_bad(x0, moved)
        if i is not None:
            assert self.likelihood is not None
            name = type(self.likelihood.operator).__name__
            text = f"the data step through the operator {name} gave {kind(moved[i])}"
            fault = Fault(text, "look at its adjoint and solve", rms(x0[i]))
            self._suspect_target(x0, moved)
            self.suspects.append(lambda: fault)
        return moved

    def _suspect_target(self, x0: Tensor, got: Tensor) -> None:
        i = first_bad(x0, got)
        if i is not None:
            row, signal = self.rows(torch.tensor([i])), x0[i : i + 1].detach().clone()
            self.suspects.append(lambda: target_fault(row, signal))

    def _stop_at_black_box(self) -> None:
        if not self.differentiable:
            raise _BlackBox


def target_fault(problem: Problem, x0: Tensor) -> Fault | None:
    """Which part of a differentiable target is not finite at one clean signal, or has no finite gradient there.

    Args:
        problem: Of one row.
        x0: Finite, (1, *shape), normalised units.
    """
    size = rms(x0)
    with torch.enable_grad():
        latent = x0.detach().requires_grad_()
        data = problem.prior.to_data(latent)
        who = f"the decoder of the prior {type(problem.prior).__name__}"
        if not finite(data):
            return Fault(f"{who} returned {kind(data)}", "is it valid in this precision?", size)
        slope = torch.zeros_like(data)
        for part in _parts(problem):
            found = _follow(part, data, size)
            if isinstance(found, Fault):
                return found
            slope = slope + found
        if data.requires_grad and not finite(torch.autograd.grad(data, latent, slope)[0]):
            return Fault(f"the gradient of {who} is not finite", REMEDY_GRADIENT, size)
    return None


class _Link(NamedTuple):
    name: str
    call: Callable[[Tensor], Tensor]


def _parts(problem: Problem) -> list[list[_Link]]:
    """Return the terms of the log target, each as a chain of functions that begins at a signal in data units."""
    parts: list[list[_Link]] = []
    if problem.likelihood is not None:
        law, y = problem.likelihood.noise, problem.likelihood.y
        own = (
            "the log density"
            if isinstance(law, LogDensity)
            else f"the noise law {type(law).__name__}"
        )
        operator = problem.likelihood.operator
        links = [
            _Link(f"the operator {type(operator).__name__}", operator),
            _Link(own, lambda predicted: law.log_density(predicted, y)),
        ]
        parts.append(links)
    if problem.reward is not None:
        parts += [[_Link(f"the reward {part!r}", part)] for _, part in terms(problem.reward)]
    return parts


def _follow(part: list[_Link], data: Tensor, size: float) -> Fault | Tensor:
    """Go along a chain and its gradient back: the first link that is not finite, else the gradient at its start."""
    ends: list[tuple[Tensor, Tensor]] = []
    value = data
    for link in part:
        given = value.detach().requires_grad_()
        value = link.call(given)
        if not finite(value):
            return Fault(f"{link.name} returned {kind(value)}", REMEDY_VALUE, size)
        ends.append((given, value))
    slope = torch.ones_like(value)
    for link, (given, value) in zip(reversed(part), reversed(ends)):
        if not value.requires_grad:
            return torch.zeros_like(data)
        (slope,) = torch.autograd.grad(value, given, slope)
        if not finite(slope):
            return Fault(f"the gradient of {link.name} is {kind(slope)}", REMEDY_GRADIENT, size)
    return slope


def finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def kind(values: Tensor) -> str:
    """Return "NaN", "infinity" or "-infinity", whichever is in there."""
    if bool(values.isnan().any()):
        return "NaN"
    return "infinity" if values.is_complex() or bool((values == torch.inf).any()) else "-infinity"


def rms(values: Tensor) -> float:
    return values.detach().double().square().mean().sqrt().item()


def first_bad(given: Tensor, got: Tensor) -> int | None:
    """Return the first row that was finite and is not any more."""
    whole = torch.isfinite(given).flatten(1).all(1) & ~torch.isfinite(got).reshape(
        len(got), -1
    ).all(1)
    return int(whole.nonzero()[0]) if bool(whole.any()) else None
