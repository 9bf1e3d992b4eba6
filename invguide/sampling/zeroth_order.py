"""What methods for black boxes share: values of the target around D, and a step along a slope estimated from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from invguide.numerics.linear import inner, norm, per_sample
from invguide.problem.problem import Problem
from invguide.renamed import old_names
from invguide.sampling.step_size import adaptive_strength, open_variance, share_to_top

# Where along a full step the target is evaluated.
LINE = (0.25, 0.5, 0.75, 1.0)


class Evaluated(NamedTuple):
    """The target at D and at its candidates; what failed, or overflowed, is NaN."""

    log_prob: Tensor  # at D, (B,)
    chi2: Tensor  # at D, or where D failed the mean over its candidates, (B,)
    values: Tensor  # log target of the candidates, (B, K); -inf is a value: impossible


class Slope(NamedTuple):
    """An estimate of d log target / d D."""

    slope: Tensor  # (B, *shape); 0 where too few candidates are left
    directions: Tensor  # independent directions it comes from, (B,)


def denoise_with_vjp(
    problem: Problem, x: Tensor, sigma: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return D(x) and the map from d f / d D to d f / d x, to be called once: one network call and one vjp."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        denoised = problem.denoise(x, sigma)
    problem.counters.vjp += len(x)
    return denoised.detach(), lambda slope: torch.autograd.grad(denoised, x, slope)[0]


def evaluate_each(problem: Problem, points: Tensor) -> tuple[Tensor, Tensor]:
    """Log target and chi2 of points (B, K, *shape), (B, K) each, in one call without gradients; NaN where it failed."""
    rows, count = points.shape[:2]
    log_prob, chi2 = problem.repeat(count, rows).evaluate(points.flatten(0, 1))
    log_prob = torch.where(log_prob == torch.inf, torch.nan, log_prob)
    chi2 = torch.where(chi2.isfinite(), chi2, torch.nan)
    return log_prob.reshape(rows, count), chi2.reshape(rows, count)


def evaluate_around(problem: Problem, x0: Tensor, offsets: Tensor) -> Evaluated:
    """Evaluate the target at x0 (B, *shape) and at x0 + offsets (B, K, *shape)."""
    log_prob, chi2 = evaluate_each(problem, torch.cat([x0[:, None], x0[:, None] + offsets], 1))
    near = torch.where(chi2[:, 0].isnan(), chi2[:, 1:].nanmean(1), chi2[:, 0])
    return Evaluated(log_prob[:, 0], near, log_prob[:, 1:])


def mean_direction(weights: Tensor, directions: Tensor, count: Tensor) -> Tensor:
    """sum_k weights_k directions_k / count, (B, K) x (B, K, *shape) -> (B, *shape); 0 where count is below 1."""
    weights = torch.where(count[:, None] >= 1, weights / count[:, None].clamp_min(1), 0.0)
    return torch.einsum("bk,bk...->b...", weights, directions)


def climb(
    problem: Problem,
    denoised: Tensor,
    seen: Evaluated,
    estimate: Slope,
    gradient: Tensor,
    a: float,
    b: float,
    scale: float,
) -> Tensor:
    """Move D along `gradient` = J^T slope, as far as `adaptive_strength` says, within two bounds.

    It moves no farther than a draw of x0 under level a alone would lie from D, three standard deviations included: a
    slope holds nearby only. And not beyond the top of a parabola fitted to the target at D and at four points along
    the step, nor beyond the last of these that did not fail; where less than three are left, D stays.
    """
    # An estimate from n random directions of d is (d + 1) / n too long, in the square.
    n, d = estimate.directions, denoised[0].numel()
    slope_square = inner(estimate.slope, estimate.slope) * n / (n + d + 1)
    strength = adaptive_strength(problem, seen.chi2, slope_square, a, scale)
    step = per_sample(strength, gradient) * gradient
    longest = open_variance(problem, a) ** 0.5 * (d**0.5 + 3)
    step = step * per_sample((longest / norm(step).clamp_min(1e-30)).clamp_max(1.0), step)
    t = torch.tensor((0.0, *LINE), dtype=step.dtype, device=step.device)
    line = denoised[:, None] + step[:, None] * t[1:].reshape(-1, *(1,) * (step.ndim - 1))
    heights = torch.cat([seen.log_prob[:, None], evaluate_each(problem, line)[0]], 1)
    linear, drop = fit_parabola(t, heights)
    reach = (t * heights.isfinite()).amax(1)
    share = torch.minimum(share_to_top(linear, drop, a, b), reach)
    return denoised + per_sample(share, step) * step


def fit_parabola(t: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of heights (B, n) by c + linear t - drop t^2 over the finite ones; (0, 1) where under three."""
    known = heights.isfinite()
    enough = known.sum(1) >= 3
    top = torch.where(known, heights, -torch.inf).amax(1, keepdim=True)
    heights = torch.where(known & enough[:, None], heights - top, 0.0)
    powers = torch.stack([torch.ones_like(t), t, -(t**2)], 1)
    weighted = powers.mT * known[:, None]
    normal = torch.where(enough[:, None, None], weighted @ powers, torch.eye(3).to(t))
    solution = torch.linalg.solve(normal, weighted @ heights[:, :, None])[:, :, 0]
    return solution[:, 1], torch.where(enough, solution[:, 2], 1.0)


__getattr__ = old_names(__name__)
