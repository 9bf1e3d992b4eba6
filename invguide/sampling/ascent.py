"""Climbing the log target from clean signals, without the prior; each sample on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.numerics.linear import inner, norm, per_sample
from invguide.problem.problem import Problem


def conjugate_ascent(problem: Problem, start: Tensor, num_steps: int, reach: float) -> Tensor:
    """Return clean signals (B, *shape) after nonlinear conjugate gradients, which needs no learning rate.

    Directions by Polak and Ribiere, restarted where a step fails (Nocedal and Wright 2006, "Numerical optimization",
    section 5.2); lengths from the parabola through the target here, its slope and the target at a trial point. For a
    quadratic target every length is exact, and the top is reached in as many steps as the target has directions. The
    target never falls.

    Args:
        problem: The target.
        start: Where to start, normalised units.
        num_steps: Each takes two calls of the target and one gradient.
        reach: How far from `start` to go at most; rewards may rise for ever.
    """
    x0 = start
    value, _, gradient = problem.gradient(x0)
    direction = gradient
    length = room = torch.full_like(value, reach)  # of the trial, and of any step until one fails
    for _ in range(num_steps):
        unit = direction / per_sample(norm(direction).clamp_min(1e-30), x0)
        slope = inner(gradient, unit)
        bound = torch.minimum(room, _to_sphere(x0 - start, unit, reach))
        length = torch.minimum(length, bound).clamp_min(1e-12)
        trial = problem.evaluate(x0 + per_sample(length, x0) * unit)[0]
        drop = (value + slope * length - trial) / length**2
        # Where the target bends upwards, or is not known, the trial point itself.
        best = torch.where(drop > 0, 0.5 * slope / drop.clamp_min(1e-30), length)
        best = torch.minimum(best, bound).clamp_min(0.0)
        new = x0 + per_sample(best, x0) * unit
        new_value, _, new_gradient = problem.gradient(new)
        rises = new_value >= value  # NaN does not
        turn = inner(new_gradient, new_gradient - gradient) / inner(gradient, gradient)
        turn = per_sample(turn.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0), x0)
        up = per_sample(rises, x0) > 0
        direction = torch.where(up, new_gradient + turn * direction, gradient)
        x0, gradient = torch.where(up, new, x0), torch.where(up, new_gradient, gradient)
        value = torch.where(rises, new_value, value)
        room = torch.where(rises, 4 * room, best / 4)
        length = torch.where(best > 0, best, length)
    return x0


def _to_sphere(offset: Tensor, unit: Tensor, radius: float) -> Tensor:
    """Largest t with |offset + t unit| = radius, (B,); 0 for what is outside already."""
    along = inner(offset, unit)
    room = (along**2 + radius**2 - inner(offset, offset)).clamp_min(0.0)
    return (room.sqrt() - along).clamp_min(0.0)


def adam_ascent(problem: Problem, x0: Tensor, num_steps: int, learning_rate: float) -> Tensor:
    """Return x0 (B, *shape) after num_steps of Adam."""
    x0 = x0.clone()
    optimiser = torch.optim.Adam([x0], learning_rate, maximize=True)
    for _ in range(num_steps):
        x0.grad = problem.gradient(x0)[2]
        optimiser.step()
    return x0
