"""How far to move D along a guidance gradient: a step that needs no tuning, shared by DPS and its kin."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.numerics.linear import inner, norm, per_sample
from invguide.problem.problem import Problem, TargetGradient


def open_variance(problem: Problem, a: float) -> float:
    """Variance that level a leaves open in clean signals of size s, a^2 s^2 / (a^2 + s^2); normalised units."""
    size = problem.sigma_data
    return a**2 * size**2 / (a**2 + size**2)


def reach(problem: Problem, a: float) -> float:
    """How far a draw of x0 under level a alone lies from D, three standard deviations included; normalised units."""
    return open_variance(problem, a) ** 0.5 * (torch.Size(problem.shape).numel() ** 0.5 + 3)


def adaptive_strength(
    problem: Problem, chi2: Tensor, slope_square: Tensor, a: float, scale: float
) -> Tensor:
    """Factor of the gradient that takes the uncertainty of D into account, scale a^2 / N, (B,).

    N = 1 + min(chi2, r^2 |h|^2 / (m chi2)) estimates by how much the residual varies beyond its noise, twice: as the
    measurement itself tells, and from what level a leaves open, r^2, seen through the operator: |h|^2 / (m chi2) is
    the Rayleigh quotient of A A^T / sigma_y^2 at the residual, with m measurements.

    Args:
        problem: Prior and target.
        chi2: At D, (B,).
        slope_square: |h|^2, h = d log target / d D, (B,).
        a: Noise level.
        scale: 1 is meant for every operator.
    """
    rayleigh = slope_square / (chi2 * problem.measurement_sizes)
    # A reward, or a likelihood without a noise level, has no chi2 (NaN) and is taken as it is.
    excess = torch.nan_to_num(torch.minimum(chi2, open_variance(problem, a) * rayleigh), nan=0.0)
    return torch.full_like(chi2, scale * a**2) / (1 + excess)


def share_to_top(linear: Tensor, drop: Tensor, a: float, b: float) -> Tensor:
    """Share of a step at which f(share) = f(0) + linear share - drop share^2 is highest, in [0, 1], (B,).

    The reverse step from a to b takes only 1 - b^2 / a^2 of what is added to D, which is made up for.
    """
    best = torch.nan_to_num(0.5 * linear / drop.clamp_min(1e-12), nan=1.0)
    taken = 1 - b**2 / a**2
    return (best / taken).clamp(0.0, 1.0)


def clean_guidance(problem: Problem, x: Tensor, a: float, variance: float) -> TargetGradient:
    """Denoise x and differentiate the log target at D alone: J is taken to be variance / a^2, and costs nothing.

    J = Cov(x0 | x) / a^2 for any prior, so that `variance` stands for what x leaves open in every direction.
    """
    denoised = problem.denoise(x, a)
    log_prob, chi2, slope = problem.gradient(denoised)
    return TargetGradient(denoised, log_prob, chi2, slope, variance / a**2 * slope)


def guided_strength(
    problem: Problem, guidance: TargetGradient, a: float, b: float, scale: float
) -> Tensor:
    """Factor of `guidance.gradient` that is added to D, (B,): `adaptive_strength` within two bounds.

    D moves no farther than `reach`: the slope of a reward or of a nonlinear operator (clipping, JPEG) holds nearby
    only. And never beyond the top of a parabola through the log target at D and at the full step, with its slope at D.
    Of a measurement and a reward together, N is 1 + r^2 times the curvature of that parabola as well.
    """
    gradient = guidance.gradient
    slope_square = inner(guidance.slope, guidance.slope)
    strength = adaptive_strength(problem, guidance.chi2, slope_square, a, scale)
    strength = torch.minimum(strength, reach(problem, a) / norm(gradient).clamp_min(1e-30))
    full = guidance.denoised + per_sample(strength, gradient) * gradient
    rise = problem.evaluate(full)[0] - guidance.log_prob
    linear = strength * inner(guidance.slope, gradient)
    shortened = strength * share_to_top(linear, linear - rise, a, b)
    if problem.likelihood is None or problem.reward is None:
        return shortened
    # chi2 tells nothing of the reward: N from the curvature of both along the step.
    length_square = (strength**2 * inner(gradient, gradient)).clamp_min(1e-30)
    curvature = (2 * (linear - rise) / length_square).clamp_min(0.0)
    return torch.minimum(shortened, scale * a**2 / (1 + open_variance(problem, a) * curvature))
