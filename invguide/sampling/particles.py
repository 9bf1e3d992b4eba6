"""What weighted particles share: effective sample size, systematic resampling, kernel ratios, looks at clean signals.

Log-weights are unnormalised, (J,), and never clamped: -inf is a particle that the target calls impossible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from invguide.errors import DivergenceError
from invguide.problem.problem import Problem
from invguide.rng import Noise

BISECTIONS = 40


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to 1, (J,).

    Raises:
        DivergenceError: Every particle is impossible.
    """
    if not bool((log_weights > -torch.inf).any()):
        raise DivergenceError(
            f"all {len(log_weights)} particles are impossible under the target (log-weight -inf); use more particles "
            f"(ensemble_size), or a target that prefers some bad samples to others"
        )
    return torch.softmax(log_weights, 0)


def effective_size(log_weights: Tensor) -> float:
    """Effective sample size 1 / sum w^2, between 1 and J."""
    return 1 / normalised(log_weights).square().sum().item()


def systematic(log_weights: Tensor, u: Tensor) -> Tensor:
    """Indices (J,) of a systematic resampling: particle i is drawn floor(J w_i) or ceil(J w_i) times.

    One uniform u on [0, 1) places all J combs (Kitagawa 1996, doi 10.2307/1390750); E[count of i] = J w_i exactly.
    """
    count = len(log_weights)
    edges = normalised(log_weights.double()).cumsum(0)
    teeth = (torch.arange(count, dtype=edges.dtype, device=edges.device) + u.double()) / count
    # The last edge is 1 up to rounding; a tooth beyond it belongs to the last possible particle.
    last = int((log_weights > -torch.inf).nonzero().max())
    return torch.searchsorted(edges, teeth, right=True).clamp_max(last)


def resample(log_weights: Tensor, u: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Indices and new log-weights: resampled to equal weights where the ESS is below threshold * J, else unchanged.

    Args:
        log_weights: (J,).
        u: One uniform on [0, 1).
        threshold: 0 never resamples, 1 always does unless all weights agree.
    """
    count = len(log_weights)
    if effective_size(log_weights) >= threshold * count:
        return torch.arange(count, device=log_weights.device), log_weights
    return systematic(log_weights, u), torch.zeros_like(log_weights)


def flattened(log_weights: Tensor, threshold: float) -> Tensor:
    """The largest multiple of the log-weights, at most one, whose ESS is at least threshold * J; NaN stay."""
    known = log_weights[~log_weights.isnan()]
    if not len(known) or effective_size(known) >= threshold * len(known):
        return log_weights
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = effective_size(middle * known) >= threshold * len(known)
        low, high = (middle, high) if enough else (low, middle)
    return low * log_weights


def replaced(log_weights: Tensor, u: Tensor) -> Tensor:
    """Indices (J,) of a systematic resampling in which whoever is drawn stays in place, and copies fill the rest.

    What is drawn does not depend on the order of the particles: they are lined up by weight. A particle of unknown
    weight (NaN) has that of the average.
    """
    average = log_mean_exp(log_weights).nan_to_num()  # none known: all alike
    known = torch.where(log_weights.isnan(), average, log_weights)
    order = known.argsort()
    drawn = order[systematic(known[order], u.flatten()[:1])]
    count = torch.bincount(drawn, minlength=len(known))
    chosen = torch.arange(len(known), device=known.device)
    empty = order[count[order] == 0]
    chosen[empty] = order.repeat_interleave((count[order] - 1).clamp_min(0))
    return chosen


def log_kernel_ratio(x: Tensor, prior_mean: Tensor, proposal_mean: Tensor, std: float) -> Tensor:
    """log N(x; prior_mean, std^2) - log N(x; proposal_mean, std^2) of each row, (J,).

    Written as a product, since the two squares may be huge and nearly equal.
    """
    gap = (prior_mean - proposal_mean) / std
    middle = (x - 0.5 * (prior_mean + proposal_mean)) / std
    return (gap * middle).flatten(1).sum(1)


def shared(noise: Noise) -> Noise:
    """The noise of the first member, for draws that a whole ensemble has in common, in whatever order it stands."""
    return replace(noise, rows=(min(noise.rows),))


def look_around(
    problem: Problem, denoised: Tensor, sigma: float, normals: Iterable[Tensor]
) -> Tensor:
    """Log target at D + r n for each n, (M, B), r^2 = sigma^2 s^2 / (sigma^2 + s^2) with s the size of the data.

    r is what level sigma leaves open of white data of size s, so these are draws from a crude p(x0 | x).

    Args:
        problem: Of B rows.
        denoised: D, (B, *shape).
        sigma: Level of D.
        normals: M standard normals, (B, *shape) or (1, *shape).
    """
    size = problem.sigma_data
    radius = sigma * size / math.hypot(sigma, size)
    return torch.stack([problem.evaluate(denoised + radius * n)[0] for n in normals])


def log_mean_exp(values: Tensor) -> Tensor:
    """log mean exp over the first axis, (M, B) -> (B,); NaN are left out, and remain only where nothing else is."""
    known = ~values.isnan()
    total = torch.logsumexp(torch.where(known, values, -torch.inf), 0)
    count = known.sum(0)
    return torch.where(count > 0, total - count.clamp_min(1).log(), torch.nan)
