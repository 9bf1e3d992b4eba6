"""Operators that know their own data step: against integrals on a grid, and who asks for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.noise import Poisson
from invguide.numerics.linear import per_sample
from invguide.numerics.truncated_normal import log_mass_and_mean
from invguide.operators import HDR, Composition, GaussianBlur
from invguide.prior import Prior
from invguide.problem.problem import OPEN, Problem
from invguide.problem.proximal import proximal

SIDE = 10


def cases() -> tuple[Tensor, Tensor]:
    """Centres from below black to above white against measurements from -0.1 to 1.1, (2, 1, SIDE, SIDE) each."""
    x = torch.linspace(-0.7, 1.7, SIDE, dtype=torch.float64)[:, None].expand(SIDE, SIDE)
    y = torch.linspace(-0.1, 1.1, SIDE, dtype=torch.float64)[None].expand(SIDE, SIDE)
    return x.expand(2, 1, SIDE, SIDE).clone(), y.expand(2, 1, SIDE, SIDE).clone()


def integrated(operator: Operator, x: Tensor, y: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """E[z | y] by sums over a grid, value by value, which knows of the operator no more than what it measures."""
    grid = torch.linspace(-6, 7, 60001, dtype=torch.float64)
    measured = operator(grid.reshape(1, 1, 1, -1)).flatten()
    means = []
    for centre, value, s, variance in zip(
        *(t.expand(x.shape).flatten() for t in (x, y, sigma, v)), strict=True
    ):
        log_weight = -((value - measured) ** 2) / (2 * s**2) - (grid - centre) ** 2 / (
            2 * variance
        )
        means.append((log_weight.softmax(0) * grid).sum())
    return torch.stack(means).reshape(x.shape)


def noise_and_variance(sigma_y: float) -> tuple[Tensor, Tensor]:
    sigma = torch.tensor([sigma_y, 2 * sigma_y], dtype=torch.float64).reshape(2, 1, 1, 1)
    return sigma, torch.tensor([0.01, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("operator", [HDR(2.0), HDR(4.0, pivot=0.5), HDR(0.5)])
@pytest.mark.parametrize("sigma_y", [0.02, 0.3])
def test_the_mean_is_the_integral(operator: HDR, sigma_y: float) -> None:
    """To what the kinks at the levels that clip cost a sum: the square of its step, 2e-4."""
    (x, y), (sigma, variance) = cases(), noise_and_variance(sigma_y)
    z = proximal(Likelihood(operator, y, sigma), x, variance)
    error = z - integrated(operator, x, y, sigma, per_sample(variance, x))
    assert float(error.abs().max()) < 1e-5


@pytest.mark.parametrize("gamma", [1 / 2.2, 2.2])
def test_with_a_tone_curve_it_is_near(gamma: float) -> None:
    """The secant is as near as the curve is straight over the noise, least so where a large gamma is flat: at black."""
    (x, y), (sigma, variance) = cases(), noise_and_variance(0.01)
    operator, v = HDR(2.0, gamma), per_sample(variance, x)
    z = operator.posterior_mean(x, y, v, sigma)
    error = ((z - integrated(operator, x, y, sigma, v)) / v.sqrt()).abs()
    assert float(error.max()) < 0.25
    assert float(error[y > 0.15].max()) < 0.03


@pytest.mark.parametrize("mistake", ["clipped taken as measured", "the mode", "one case left out"])
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    operator, (x, y) = HDR(2.0), cases()
    sigma, v = torch.tensor(0.1, dtype=x.dtype), torch.tensor(0.05, dtype=x.dtype)
    weight = operator.gain**2 * v / sigma**2
    wrong = (x + weight * y / operator.gain) / (1 + weight)
    if mistake == "the mode":
        between = wrong.clamp(0, 0.5)
        choices = torch.stack([between, x.clamp_min(0.5), x.clamp_max(0)])
        cost = (operator(choices.flatten(0, 1)).reshape(choices.shape) - y) ** 2 / (2 * sigma**2)
        best = (cost + (choices - x) ** 2 / (2 * v)).argmin(0, keepdim=True)
        wrong = choices.gather(0, best)[0]
    elif mistake == "one case left out":
        wrong = log_mass_and_mean(wrong, (v / (1 + weight)).sqrt(), 0.0, 0.5)[1]
    error = wrong - integrated(operator, x, y, sigma, v)
    assert float(error.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_what_was_measured_nothing_underflows(dtype: torch.dtype) -> None:
    """A centre 5,000 standard deviations from all that explains y goes just there."""
    x = torch.full((1, 1, 1, 3), -5.0, dtype=dtype)
    y = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).reshape(1, 1, 1, 3)
    one = torch.tensor(1e-6, dtype=dtype)
    z = HDR(2.0).posterior_mean(x, y, one, torch.tensor(1e-6, dtype=dtype))
    assert torch.allclose(z.flatten(), torch.tensor([-5.0, 0.25, 0.5], dtype=dtype), atol=1e-5)


def test_descent_stays_where_nothing_passes_and_the_own_step_does_not() -> None:
    """D overshoots where y was not clipped: the same function without a step of its own is stuck there."""
    x = torch.full((1, 3, 4, 4), 0.9, dtype=torch.float64)
    y = torch.full_like(x, 0.6)
    operator = HDR(2.0)
    stuck = proximal(Likelihood(ig.as_operator(lambda x: operator(x)), y, 0.02), x, 0.05)
    own = proximal(Likelihood(operator, y, 0.02), x, 0.05)
    assert torch.equal(stuck, x)
    # The product of two Gaussians: 0.3 and 0.6 / (1 + 4 * 0.05 / 0.02^2) beyond.
    assert float((own - 0.3 - 0.6 / 501).abs().max()) < 1e-6


class White(Prior):
    shape: tuple[int | None, ...] = (3, 8, 8)
    sigma_min, sigma_max, sigma_data, scale, shift = 0.01, 50.0, 1.5, 0.5, 0.5

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + per_sample(sigma, x) ** 2)


def problem(operator: object, noise: object = 0.1) -> Problem:
    y = torch.full((1, 3, 8, 8), 0.9)
    return Problem(White(), Likelihood(ig.as_operator(operator), y, noise))  # pyright: ignore[reportArgumentType]


def test_who_has_a_step_of_their_own() -> None:
    assert problem(HDR(2.0)).own_data_step
    assert not problem(HDR(2.0), Poisson(0.1)).own_data_step
    assert not problem(lambda x: (2 * x).clamp(0, 1)).own_data_step
    assert not problem(Composition(GaussianBlur(1.0), HDR(2.0))).own_data_step
    assert not problem(GaussianBlur(1.0)).own_data_step


def test_a_clipped_value_is_no_farther_above_than_signals_are_wide() -> None:
    """At any level: E[z | z > 0.5] of a Gaussian around 0.5 as wide as OPEN signals, times sqrt(2 / pi)."""
    y = torch.full((1, 3, 8, 8), 1.0)
    clipped = Problem(White(), Likelihood(HDR(2.0), y, 1e-3))
    x = clipped.prox(torch.zeros(1, 3, 8, 8), 1e4)
    assert torch.allclose(x, torch.full_like(x, (2 / torch.pi) ** 0.5 * OPEN * 1.5), rtol=1e-2)
