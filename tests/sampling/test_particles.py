"""Weights, resampling, kernel ratios and looks at clean signals, against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invguide.adapters.rewards import FunctionReward
from invguide.errors import DivergenceError
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reward import Reward
from invguide.rng import Noise
from invguide.sampling.particles import (
    effective_size,
    flattened,
    log_kernel_ratio,
    log_mean_exp,
    look_around,
    normalised,
    replaced,
    resample,
    shared,
    systematic,
)

INF = torch.inf


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_weights_and_their_effective_size():
    log_weights = weights(1, 2, 1) - 1e5  # unnormalised, far below what exp can hold
    torch.testing.assert_close(normalised(log_weights), torch.tensor([0.25, 0.5, 0.25]).double())
    assert effective_size(log_weights) == pytest.approx(16 / 6)
    assert effective_size(torch.zeros(7)) == pytest.approx(7)
    assert effective_size(torch.tensor([-INF, 3.0, -INF])) == 1
    with pytest.raises(DivergenceError, match="all 2 particles are impossible"):
        normalised(torch.tensor([-INF, -INF]))


def expected_counts(resampler, log_weights: Tensor, draws: int = 4000) -> Tensor:
    """Mean number of copies over evenly spaced u: an integral over u by the midpoint rule."""
    us = (torch.arange(draws) + 0.5).double() / draws
    counts = torch.stack(
        [torch.bincount(resampler(log_weights, u), minlength=len(log_weights)) for u in us]
    )
    return counts.double().mean(0)


def copies_error(resampler) -> float:
    """Largest error of E[copies of i] = J w_i."""
    log_weights = torch.randn(9, dtype=torch.float64) * 1.5
    log_weights[[0, 4, 8]] = -INF
    gap = expected_counts(resampler, log_weights) - 9 * normalised(log_weights)
    return float(gap.abs().max())


def test_systematic_resampling_is_unbiased_and_even():
    # The midpoint rule places each of the jumps of the count to within half a draw of 4000, nine teeth.
    assert copies_error(systematic) < 9 * 0.5 / 4000 + 1e-12
    log_weights = torch.randn(50, dtype=torch.float64)
    share = 50 * normalised(log_weights)
    for u in torch.rand(20):
        copies = torch.bincount(systematic(log_weights, u), minlength=50)
        assert bool((copies >= share.floor() - 1e-9).all())
        assert bool((copies <= share.ceil() + 1e-9).all())


def test_systematic_resampling_at_its_edges():
    for u in (1e-6, 0.5, 1 - 2**-24):
        u = torch.tensor(u)
        assert systematic(torch.zeros(5), u).tolist() == [0, 1, 2, 3, 4]
        assert systematic(torch.tensor([-INF, -INF, 0.0, -INF]), u).tolist() == [2] * 4
    # A million float32 weights: the last edge must not round below the last tooth.
    assert int(systematic(torch.zeros(10**6), torch.tensor(0.999999)).max()) < 10**6


def multinomial_of_clamped(log_weights: Tensor, u: Tensor) -> Tensor:
    """Planted: weights clamped from below, as released filters do."""
    return systematic(log_weights.clamp_min(-2.0), u)


def shifted(log_weights: Tensor, u: Tensor) -> Tensor:
    """Planted: the teeth start one off."""
    return (systematic(log_weights, u) + 1).clamp_max(len(log_weights) - 1)


@pytest.mark.parametrize("bug", [multinomial_of_clamped, shifted])
def test_planted_resampling_bugs_are_caught(bug):
    assert copies_error(bug) > 0.05


def test_resample_only_below_the_threshold():
    log_weights = weights(1, 1, 2, 4)  # effective size 64 / 22 = 2.9
    index, kept = resample(log_weights, torch.tensor(0.3), 0.5)
    assert index.tolist() == [0, 1, 2, 3]
    assert kept is log_weights
    index, equal = resample(log_weights, torch.tensor(0.3), 0.75)
    assert index.tolist() == systematic(log_weights, torch.tensor(0.3)).tolist()
    assert equal.tolist() == [0] * 4


def test_flattened_weights_have_the_effective_size_asked_for():
    log_weights = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() * 3
    flat = flattened(log_weights, 0.9)
    assert effective_size(flat) == pytest.approx(180, rel=1e-6)  # 40 bisections
    assert ((flat / log_weights) - flat[0] / log_weights[0]).abs().max() < 1e-12
    assert torch.equal(flattened(flat, 0.9), flat)
    assert torch.equal(flattened(log_weights, 0.0), log_weights)
    unknown = torch.cat([log_weights, torch.tensor([torch.nan])])
    torch.testing.assert_close(flattened(unknown, 0.9)[:-1], flat)


def test_replaced_keeps_who_is_drawn_in_place_whatever_the_order():
    source = torch.Generator().manual_seed(1)
    log_weights = torch.randn(50, generator=source).double()
    u, order = torch.tensor([0.3]), torch.randperm(50, generator=source)
    chosen = replaced(log_weights, u)
    count, expected = torch.bincount(chosen, minlength=50), 50 * normalised(log_weights)
    assert ((count - expected).abs() < 1).all()
    assert torch.equal(chosen == torch.arange(50), count > 0)
    again = replaced(log_weights[order], u)
    assert torch.equal(order[again], chosen[order])


def test_replaced_takes_unknown_weights_for_average_ones():
    log_weights = torch.tensor([0.0, torch.nan, 0.0, torch.nan]).double()
    assert replaced(log_weights, torch.tensor(0.5)).tolist() == [0, 1, 2, 3]
    none = torch.full((3,), torch.nan)
    assert replaced(none, torch.tensor(0.5)).tolist() == [0, 1, 2]


def test_kernel_ratio_is_that_of_normal_densities():
    x, prior, proposal = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = normal(prior, 0.3).log_prob(x) - normal(proposal, 0.3).log_prob(x)
    torch.testing.assert_close(
        log_kernel_ratio(x, prior, proposal, 0.3), expected.flatten(1).sum(1)
    )
    # Means that agree give exactly nothing, however far x is.
    assert log_kernel_ratio(1e9 * x, prior, prior, 1e-6).abs().max() == 0


def test_log_mean_exp_leaves_failures_out():
    values = torch.tensor(
        [[0.0, -INF, torch.nan, torch.nan, -INF], [1.0, 2.0, 3.0, torch.nan, -INF]]
    )
    expected = [math.log((1 + math.e) / 2), 2 - math.log(2), 3.0, math.nan, -INF]
    torch.testing.assert_close(log_mean_exp(values), torch.tensor(expected), equal_nan=True)
    far = log_mean_exp(torch.tensor([[-2000.0], [-2001.0]]))
    assert float(far) == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 2))


class Square(Reward):
    differentiable = False

    def __call__(self, x: Tensor) -> Tensor:
        return -2.0 * x.square().sum(1)


@pytest.mark.slow
def test_look_around_estimates_the_smoothed_target():
    """For a white prior D + r n are draws from p(x0 | x): the mean of exp(-2 |x0|^2) is a Gaussian integral."""
    s, sigma, M = 2.0, 1.5, 40_000
    prior = Gaussian([0.0, 0.0], s**2 * torch.eye(2))
    assert prior.sigma_data == pytest.approx(s)
    denoised = torch.tensor([[0.3, -0.2], [0.5, 0.1]]).double()
    normals = torch.randn(M, 1, 2, dtype=torch.float64)
    values = look_around(Problem(prior, reward=Square()), denoised, sigma, normals)
    assert values.shape == (M, 2)
    open_variance = sigma**2 * s**2 / (sigma**2 + s**2)
    wide = 1 + 4 * open_variance
    expected = -2 * denoised.square().sum(1) / wide - math.log(wide)
    # The relative error of the mean is below 3 / sqrt(M) = 0.015: the integrand is at most 8 times its mean.
    torch.testing.assert_close(log_mean_exp(values), expected, atol=0.045, rtol=0)


def test_look_around_without_spread_is_the_target_at_d():
    problem = Problem(
        Gaussian([0.0], torch.eye(1)), reward=FunctionReward(lambda x: x[:, 0], False)
    )
    denoised = torch.randn(3, 1, dtype=torch.float64)
    values = look_around(problem, denoised, 0.0, torch.randn(2, 3, 1, dtype=torch.float64))
    torch.testing.assert_close(values, denoised.mT.expand(2, 3))
    assert problem.counters.forward == 6


def test_shared_noise_is_that_of_the_first_member():
    noise = Noise(3, ((0, 4), (0, 5)), (2,)).at(7)
    assert torch.equal(shared(noise)("draws"), noise("draws")[:1])
