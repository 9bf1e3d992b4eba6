"""EDICT: a roll-out of the probability flow that can be run backwards exactly, by carrying it twice.

A pair of states takes the step from level a to b by turns, each with the noise that the other one shows:

    x <- x + (b / a - 1) (y - D(y; a))
    y <- y + (b / a - 1) (r x - D(r x; a)),    r = sqrt((s^2 + a^2) / (s^2 + b^2))
    x <- p x + (1 - p) y;    y <- p y + (1 - p) x

and the two change places. Each line is undone exactly, whatever D is. Mixing with weight p holds the two together.
It shrinks their difference by p^2 in every step, so that the way back enlarges rounding errors as much: n steps lose
a factor of p^(-2n), 1.4e3 for 50 steps at 0.93. p = 1 loses nothing, but lets the two drift apart. By default p^(2n)
is that of the paper's 50 steps at 0.93, whatever n is: with 10 steps, 0.93 would leave a gap of the data's size.

Wallace, Gokul, Naik 2023, "EDICT: exact diffusion inversion via coupled transformations", arXiv 2211.12446, there in
variance-preserving units x / sqrt(1 + sigma^2). Both states are at one level where they are mixed, so that the factor
drops out there; but the second call is made with a state that is at level b already, at level a. In those units it has
the size that the network expects; here r restores it, for data of size s (`Problem.sigma_data`; there 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invguide.adjoint.faults import check_loss
from invguide.errors import InputError, ShapeError
from invguide.numerics.linear import norm
from invguide.numerics.tableaus import make_steps
from invguide.prior import Prior
from invguide.problem.data_size import measured_size, of_first
from invguide.problem.problem import Problem

# Relative error of the start, found again. Gradients are better: to 1e-4 where this is 1e-2, but soon not at all.
LOST = 1e-2

Denoiser = Callable[[Tensor, float], Tensor]


class Pair(NamedTuple):
    """The two states, (B, *shape) each."""

    x: Tensor
    y: Tensor

    @property
    def mean(self) -> Tensor:
        return (self.x + self.y) / 2


class _Step(NamedTuple):
    level: float  # a
    weight: float  # b / a - 1
    stretch: float  # r


def choose_mixing(mixing: float | None, num_steps: int) -> float:
    """Return the weight, by default one that mixes as much in num_steps as 0.93 in 50.

    Raises:
        InputError: It does not leave each state more of itself than of its partner.
    """
    if mixing is None:
        return max(0.6, 0.93 ** (50 / num_steps))
    if not 0.5 < mixing <= 1:
        raise InputError(
            f"mixing is {mixing}; expected a weight above 0.5 and at most 1, such as 0.93"
        )
    return mixing


def _make_steps(size: float, sigmas: Sequence[float] | Tensor) -> list[_Step]:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1:
        raise ShapeError(
            f"sigmas has shape {tuple(levels.shape)}; expected n + 1 levels, (n + 1,)"
        )
    make_steps(levels.tolist(), "euler")  # refuses what is no roll-out
    return [
        _Step(a, b / a - 1, math.hypot(size, a) / math.hypot(size, b))
        for a, b in pairwise(levels.tolist())
    ]


def _forward(denoise: Denoiser, pair: Pair, step: _Step, mixing: float) -> Pair:
    x, y = pair
    x = x + _push(denoise, y, step)
    y = y + _push(denoise, step.stretch * x, step)
    x = mixing * x + (1 - mixing) * y
    y = mixing * y + (1 - mixing) * x
    return Pair(y, x)


def _unmix(pair: Pair, mixing: float) -> Pair:
    y, x = pair
    y = (y - (1 - mixing) * x) / mixing
    x = (x - (1 - mixing) * y) / mixing
    return Pair(x, y)


def _inverse(denoise: Denoiser, pair: Pair, step: _Step, mixing: float) -> Pair:
    x, y = _unmix(pair, mixing)
    y = y - _push(denoise, step.stretch * x, step)
    x = x - _push(denoise, y, step)
    return Pair(x, y)


def _push(denoise: Denoiser, point: Tensor, step: _Step) -> Tensor:
    return step.weight * (point - denoise(point, step.level))


# ---- gradients


class _Chain(torch.autograd.Function):
    """The end of a chain as a function of its start; backward walks back through the inverse and keeps no states."""

    @staticmethod
    def forward(
        ctx: Any, denoise: Denoiser, steps: list[_Step], mixing: float, x: Tensor, y: Tensor
    ) -> Pair:
        pair = Pair(x, y)
        for step in steps:
            pair = _forward(denoise, pair, step, mixing)
        ctx.denoise, ctx.steps, ctx.mixing = denoise, steps, mixing
        ctx.save_for_backward(x, y, *pair)
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return pair

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_bar: Tensor, y_bar: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, *end = ctx.saved_tensors
        pair, bars = Pair(*end), Pair(x_bar, y_bar)
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype, enabled):
            for step in reversed(ctx.steps):
                pair, bars = _pull_back(ctx.denoise, pair, bars, step, ctx.mixing)
        _check_return(Pair(x, y), pair, len(ctx.steps), ctx.mixing)
        return None, None, None, *bars


def _pull_back(
    denoise: Denoiser, pair: Pair, bars: Pair, step: _Step, mixing: float
) -> tuple[Pair, Pair]:
    """One step back, of the pair and of the gradient with respect to it; the same two calls serve both."""
    x, y = _unmix(pair, mixing)
    y_bar, x_bar = bars
    x_bar = x_bar + (1 - mixing) * y_bar
    y_bar, x_bar = mixing * y_bar + (1 - mixing) * x_bar, mixing * x_bar
    push, pulled = _push_vjp(denoise, step.stretch * x, step, y_bar)
    y, x_bar = y - push, x_bar + step.stretch * pulled
    push, pulled = _push_vjp(denoise, y, step, x_bar)
    return Pair(x - push, y), Pair(x_bar, y_bar + pulled)


def _push_vjp(denoise: Denoiser, point: Tensor, step: _Step, bar: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        push = _push(denoise, point, step)
    (pulled,) = torch.autograd.grad(push, point, bar)
    return push.detach(), pulled


def _check_return(start: Pair, again: Pair, num_steps: int, mixing: float) -> None:
    # NaN is for the caller to find.
    error = max(float((norm(s - t) / norm(s)).max()) for s, t in zip(start, again, strict=True))
    if error > LOST:
        raise InputError(
            f"the way back through {num_steps} steps with mixing={mixing} missed its start by {error:.1g} of its size, "
            f"so that the gradient is lost; raise mixing towards 1, take fewer steps, or compute in float64 (and "
            f"put the network in evaluation mode: it must be deterministic)"
        )


# ---- the public face


def rollout(
    prior: Prior,
    x: Tensor | Pair,
    sigmas: Sequence[float] | Tensor,
    mixing: float | None = None,
    *,
    condition: dict[str, Tensor] | None = None,
) -> Pair:
    """Follow the probability flow from x at sigmas[0] to sigmas[-1], invertibly; two network calls per step.

    Args:
        prior: The prior.
        x: States at the first level, (B, *shape), normalised units; or a pair, such as `invert` returns.
        sigmas: n + 1 levels that decrease strictly; the last may be 0.
        mixing: Weight p of a state against its partner, above 0.5 and at most 1; by default 0.93^(50 / n).
        condition: Keywords of a conditional prior, one row per sample.

    Returns:
        The pair at the last level, differentiable once in x, in memory that does not depend on n. Both are samples;
        they differ by the discretisation.

    Raises:
        InputError: No roll-out, a mixing weight out of range, or (in backward) a way back that misses the start.
    """
    denoise = _denoiser(prior, condition)
    steps = _make_steps(_size(prior, x.x if isinstance(x, Pair) else x, condition), sigmas)
    return _apply(denoise, steps, mixing, x)


def invert(
    prior: Prior,
    end: Pair,
    sigmas: Sequence[float] | Tensor,
    mixing: float | None = None,
    *,
    condition: dict[str, Tensor] | None = None,
) -> Pair:
    """Return the pair at sigmas[0] whose `rollout` is `end` at sigmas[-1]; Pair(x0, x0) encodes a clean signal."""
    denoise = _denoiser(prior, condition)
    steps = _make_steps(_size(prior, end.x, condition), sigmas)
    weight = choose_mixing(mixing, len(steps))
    for step in reversed(steps):
        end = _inverse(denoise, end, step, weight)
    return end


def rollout_gradient(
    prior: Prior,
    x: Tensor,
    sigmas: Sequence[float] | Tensor,
    loss: Callable[[Tensor], Tensor],
    mixing: float | None = None,
    *,
    condition: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Value and gradient in x of a function of the end of a roll-out, the mean of its pair.

    Args:
        loss: The function, (B, *shape), normalised units -> (B,); each row of its own sample only.
        prior, x, sigmas, mixing, condition: As for `rollout`.

    Returns:
        value (B,) and gradient (B, *shape).

    Raises:
        ShapeError, InputError: What `adjoint.rollout_gradient` refuses in a loss, and what `rollout` does.

    Example:
        >>> from invguide.priors import Gaussian
        >>> prior = Gaussian(torch.zeros(2), torch.eye(2))
        >>> value, gradient = rollout_gradient(prior, torch.ones(1, 2), [1.0, 0.0], lambda x: x.sum(1), mixing=1.0)
        >>> value.shape, gradient.shape
        (torch.Size([1]), torch.Size([1, 2]))
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        end = rollout(prior, x, sigmas, mixing, condition=condition)
        value = check_loss(loss, end.mean)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def rollout_in(
    problem: Problem, x: Tensor, sigmas: Sequence[float], mixing: float | None = None
) -> Tensor:
    """For solvers: the mean of the pair, with the prior and the conditions of a problem, whose counters go on."""

    def denoise(point: Tensor, level: float) -> Tensor:
        if torch.is_grad_enabled():  # backwards: its vjp follows
            problem.counters.vjp += len(point)
        return problem.denoise(point, level)

    return _apply(denoise, _make_steps(problem.sigma_data, sigmas), mixing, x).mean


def _denoiser(prior: Prior, condition: dict[str, Tensor] | None) -> Denoiser:
    return lambda point, level: prior.denoise(point, point.new_tensor(level), **(condition or {}))


def _size(prior: Prior, x: Tensor, condition: dict[str, Tensor] | None) -> float:
    """Root mean square of clean signals like the first row of x, as the prior tells, or else as measured."""
    if prior.sigma_data is not None:
        return prior.sigma_data

    def denoise(point: Tensor, level: float) -> Tensor:
        return _denoiser(prior, of_first(condition or {}, len(point)))(point, level)

    return measured_size(denoise, tuple(x.shape[1:]), prior.sigma_min, prior.sigma_max, x)


def _apply(denoise: Denoiser, steps: list[_Step], mixing: float | None, x: Tensor | Pair) -> Pair:
    start = x if isinstance(x, Pair) else Pair(x, x)
    end = _Chain.apply(denoise, steps, choose_mixing(mixing, len(steps)), *start)
    assert isinstance(end, tuple)
    return Pair(*end)
