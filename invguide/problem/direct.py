"""Measurements of the signal itself: a noisy signal, an orthonormal transform of one, counts of a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from invguide.forward_operator import LinearOperator, multiple_of_identity, orthonormal_scale
from invguide.noise import CountingLaw
from invguide.noise.counts import Counts

if TYPE_CHECKING:
    from invguide.problem.problem import Problem


class Direct(NamedTuple):
    """y as a noisy signal, normalised units."""

    signal: Tensor  # A* y / c^2 for A* A = A A* = c^2 I, (B, *shape)
    noise: Tensor  # its standard deviation, (B,)
    level: Tensor  # the same, but at least the least level that the prior knows, (B,)


def scale_of_transform(problem: Problem) -> float:
    """c > 0 where y is c times an orthonormal transform of x with one sigma_y per measurement, else 0."""
    likelihood = problem.likelihood
    if not problem.linear or problem.sigma_y is None or problem.reward is not None:
        return 0.0
    if likelihood is None or likelihood.masked:
        return 0.0
    y, operator = problem.y, likelihood.operator.rows(torch.tensor([0]))
    assert isinstance(operator, LinearOperator)
    x = torch.empty(1, *problem.data_shape, dtype=y.real.dtype, device=y.device)
    with torch.no_grad():
        return orthonormal_scale(operator.to(y.device), x, y[:1]) or 0.0


def direct_measurement(problem: Problem, scale: float) -> Direct:
    """A* y / c^2 = x + sigma_y / c n, whatever the units of y are."""
    assert problem.likelihood is not None
    assert isinstance(problem.likelihood.operator, LinearOperator)
    signal = problem.likelihood.operator.adjoint(problem.y) / scale**2
    noise = problem.require_sigma_y("denoising in one call") / scale
    level = noise.clamp_min(problem.prior.sigma_min)
    return Direct(problem.prior.to_normalised(signal), noise, level)


def counted_picture(problem: Problem) -> Counts | None:
    """How to even out the noise of y, where that counts a picture itself with one gain per measurement."""
    likelihood, prior = problem.likelihood, problem.prior
    if likelihood is None or likelihood.masked or problem.reward is not None or not problem.linear:
        return None
    law = likelihood.noise
    if not isinstance(law, CountingLaw) or not law.even:
        return None
    if not (prior.symmetric and prior.affine and prior.shift + prior.scale > 0):
        return None
    y, operator = problem.y, likelihood.operator.rows(torch.tensor([0]))
    x = torch.empty(1, *problem.data_shape, dtype=y.dtype, device=y.device)
    with torch.no_grad():
        c = multiple_of_identity(operator.to(y.device), x)
    if c is None:
        return None
    dark, bright = (
        law.stabilise(0 * law.gain + c * max(0.0, prior.shift + side * prior.scale))
        for side in (-1, 1)
    )
    half = (bright - dark) / 2
    return Counts(law, c, dark, half) if bool((1 / half <= prior.sigma_max).all()) else None
