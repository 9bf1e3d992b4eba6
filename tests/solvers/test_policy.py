"""What "auto" takes, and that several samples never come from a point estimator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.diagnostics.metrics import crps
from invguide.likelihood import Likelihood
from invguide.noise import Gaussian as GaussianNoise
from invguide.noise import NoiseModel, Poisson
from invguide.numerics.linear import per_sample
from invguide.operators import HDR, GaussianBlur, Identity, Inpainting, SuperResolution
from invguide.policy import choose
from invguide.prior import Prior
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.solver import Solver
from invguide.solvers import HQS, DFlow, ExactPosterior, PosteriorMean

SHAPE = (3, 8, 8)


class White(Prior):
    """Standard normals, with no word of their posterior."""

    shape: tuple[int | None, ...] = SHAPE
    sigma_min, sigma_max, sigma_data, symmetric = 0.01, 50.0, 1.0, True

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + per_sample(sigma, x) ** 2)


def target(operator: object, noise: NoiseModel | float, prior: Prior | None = None) -> Problem:
    operator = ig.as_operator(operator)
    y = operator(torch.full((1, *SHAPE), 0.5))
    return Problem(prior or White(), Likelihood(operator, y, noise))


FIELD = ig.priors.GaussianField(SHAPE)
BLUR = GaussianBlur(sigma=1.0)


@pytest.mark.parametrize(
    ("problem", "one", "four"),
    [
        (target(Identity(), 0.1), PosteriorMean(), "TweedieMatheron"),
        (target(BLUR, 0.1), HQS(num_steps=30), "TweedieMatheron"),
        (target(SuperResolution(factor=2), 0.1), HQS(num_steps=20), "TweedieMatheron"),
        (target(SuperResolution(factor=4), 0.1), HQS(num_steps=8), "TweedieMatheron"),
        (target(Inpainting.random(SHAPE, 0.5), 0.1), HQS(num_steps=30), "TweedieMatheron"),
        (target(BLUR, Poisson(0.1)), HQS(num_steps=30), "DPS"),
        (target(HDR(gain=2.0), 0.1), HQS(lam=1.0), "DiffPIR"),  # it has a data step of its own
        (target(HDR(gain=2.0), Poisson(0.1)), "DPS", "DPS"),
        (target(lambda x: (2 * x).clamp(0, 1), 0.1), "DPS", "DPS"),
        (target(lambda x: x**2, 0.1), "DPS", "DPS"),
        (target(Identity(), 100.0), HQS(num_steps=30), "TweedieMatheron"),  # above sigma_max
        (target(BLUR, 0.1, FIELD), ExactPosterior(draw=False), "ExactPosterior"),
        (target(lambda x: x**2, 0.1, FIELD), "DPS", "DPS"),
    ],
)
def test_one_policy(problem: Problem, one: Solver | str, four: str) -> None:
    for count in (None, 1):
        solver, reason = choose(problem, count)
        assert (solver == one) if isinstance(one, Solver) else type(solver).__name__ == one
        assert reason
    solver, reason = choose(problem, 4)
    assert type(solver).__name__ == four
    assert not solver.point_estimate
    assert reason


def test_a_reward_beside_the_measurement_is_not_left_out() -> None:
    both = target(BLUR, 0.1)
    both = Problem(both.prior, both.likelihood, as_reward(lambda x: -x.square().sum((1, 2, 3))))
    assert type(choose(both, 1).solver).__name__ == type(choose(both, 4).solver).__name__ == "DPS"


@pytest.mark.parametrize("operator", [Identity(), BLUR, SuperResolution(factor=2), HDR(gain=2.0)])
def test_four_samples_are_four(operator: object) -> None:
    y = ig.as_operator(operator)(torch.full((1, *SHAPE), 0.4))
    result = ig.solve(y, operator, White(), sigma_y=0.1, num_samples=4, progress=False)
    assert result.manifest["auto"]
    pairs = torch.cdist(*[result.samples[0].flatten(1)] * 2)
    assert float((pairs + 1e9 * torch.eye(4)).min()) > 1e-3
    assert float(result.std.min()) > 0


@pytest.mark.parametrize("solver", [HQS(num_steps=2), PosteriorMean(), "red-diff"])
def test_point_estimators_say_so(solver: Solver | str) -> None:
    y = torch.zeros(1, *SHAPE)
    with pytest.warns(UserWarning, match="is a point estimator: 3 samples"):
        result = ig.solve(
            y, Identity(), White(), sigma_y=0.1, solver=solver, num_samples=3, progress=False
        )
    assert bool(result.std.isnan().all())
    assert bool(result.mean.isfinite().all())


def test_dflow_samples_only_where_it_is_told() -> None:
    assert DFlow().point_estimate
    assert not DFlow(randomised=True).point_estimate


def test_denoising_takes_one_call_and_is_the_posterior_mean() -> None:
    """Of standard normals, y / (1 + sigma_y^2), in closed form; in data units with a scale of 2 and a shift of 1."""
    prior = White()
    prior.scale, prior.shift = 2.0, 1.0
    y = torch.randn(2, *SHAPE, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64).reshape(2, 1, 1, 1)
    result = ig.solve(y, Identity(), prior, sigma_y=sigma, dtype=torch.float64, progress=False)
    expected = 1 + (y - 1) * 4 / (4 + sigma**2)
    assert torch.allclose(result.samples[:, 0], expected, atol=1e-12)
    assert result.nfe == 1


@pytest.mark.parametrize("sigma_y", [1e-3, 0.02])
def test_noise_below_what_the_prior_knows_is_not_overestimated(sigma_y: float) -> None:
    """Of standard normals with sigma_min = 0.5: y (1 - sigma_y^2 / (1 + 0.25)), near the truth y / (1 + sigma_y^2)."""
    prior = White()
    prior.sigma_min = 0.5
    y = torch.randn(2, *SHAPE, dtype=torch.float64)
    run = {"sigma_y": sigma_y, "dtype": torch.float64, "progress": False}
    x = ig.solve(y, Identity(), prior, **run).samples[:, 0]
    assert torch.allclose(x, y * (1 - sigma_y**2 / 1.25), atol=1e-12)
    assert torch.allclose(x, y / (1 + sigma_y**2), atol=0, rtol=0.21 * sigma_y**2)
    assert not torch.allclose(prior.denoise(y, 0.5), y / (1 + sigma_y**2), rtol=0.1)


def test_views_are_averaged() -> None:
    class Leaning(White):
        """Adds a gradient that only one orientation has."""

        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            return super().denoise(x, sigma) + torch.linspace(-1, 1, 8)

    y = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    problem = Problem(Leaning(), Likelihood(Identity(), y, 0.5))
    one, eight = (
        driver.run(PosteriorMean(num_steps=n), problem, progress=False).samples[0, 0] - y[0] / 1.25
        for n in (1, 8)
    )
    assert float(one.abs().max()) == pytest.approx(1.0, abs=1e-5)
    assert float(eight.abs().max()) < 1e-5


@pytest.mark.slow
def test_exact_draws_have_the_moments_of_the_posterior() -> None:
    """1,000 draws of each: mean within 5 standard errors, variances within 5 of theirs."""
    source = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=source, dtype=torch.float64)
    prior = ig.priors.Gaussian(torch.arange(5.0), root @ root.mT + torch.eye(5))
    matrix = torch.randn(2, 5, generator=source, dtype=torch.float64)
    operator = ig.as_operator(lambda x: x @ matrix.to(x).mT, shape=(5,), linear=True)
    y = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    run = {"sigma_y": 0.5, "dtype": torch.float64, "progress": False}
    result = ig.solve(y, operator, prior, num_samples=1000, **run)
    again = ig.solve(y, operator, prior, num_samples=1000, batch_size=7, **run)
    assert torch.allclose(result.samples, again.samples, atol=1e-12)
    assert result.nfe == 0
    covariance = prior.covariance
    for b in range(2):  # the textbook formula
        innovation = matrix @ covariance @ matrix.mT + 0.25 * torch.eye(2)
        gain = covariance @ matrix.mT @ torch.linalg.inv(innovation)
        mean = prior.mean + gain @ (y[b] - matrix @ prior.mean)
        variance = (covariance - gain @ matrix @ covariance).diagonal()
        x = result.samples[b]
        assert bool(((x.mean(0) - mean).abs() < 5 * (variance / 1000).sqrt()).all())
        assert bool(((x.var(0) / variance - 1).abs() < 5 * (2 / 1000) ** 0.5).all())
    point = ig.solve(y, operator, prior, **run)
    assert torch.allclose(point.samples[1, 0], mean)


def test_solvers_that_need_what_is_not_there_are_refused() -> None:
    for solver, text in (
        (PosteriorMean(), "orthonormal transform"),
        (ExactPosterior(), "closed form"),
    ):
        with pytest.raises(ig.errors.CompatibilityError, match=text):
            driver.run(solver, target(BLUR, GaussianNoise(0.1)), progress=False)


def test_crps_is_the_mean_over_pairs() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=source)
    truth = torch.randn(2, 3, generator=source)
    for b in range(2):
        error = torch.stack([(x[b, i] - truth[b]).abs() for i in range(5)]).mean(0)
        pairs = [(x[b, i] - x[b, j]).abs() for i in range(5) for j in range(5) if i != j]
        expected = (error - torch.stack(pairs).mean(0) / 2).mean()
        assert float(crps(x, truth)[b]) == pytest.approx(float(expected), abs=1e-6)
