"""Keyed noise, schedules, reverse steps, noise laws, likelihood, proximal map and the change of units."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from invguide import noise
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.numerics.symmetry import SYMMETRIES, turn_back, turn_image
from invguide.operators import Identity, Inpainting, SuperResolution
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.problem.proximal import proximal
from invguide.reverse import ancestral, ddim, euler, heun, mix_noise, renoise
from invguide.rng import Noise
from invguide.schedule import SCHEDULES, make_sigmas

F64 = torch.float64


class Matrix(LinearOperator):
    matrix: torch.Tensor

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix


class Cube(Operator):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * x**3


# ---- keyed noise


def test_noise_does_not_depend_on_the_batch() -> None:
    rows = ((0, 0), (0, 1), (3, 7))
    together = Noise(5, rows, (4, 3)).at(2)("a")
    alone = [Noise(5, (row,), (4, 3)).at(2)("a")[0] for row in rows]
    assert torch.equal(together, torch.stack(alone))


def test_every_part_of_the_key_changes_the_noise() -> None:
    base = Noise(0, ((0, 0),), (64,)).at(0)
    others = [
        Noise(1, ((0, 0),), (64,)).at(0)(),
        Noise(0, ((1, 0),), (64,)).at(0)(),
        Noise(0, ((0, 1),), (64,)).at(0)(),
        base.at(1)(),
        base.at(-1)(),
        base("candidates"),
        base.uniform(),
    ]
    for other in others:
        assert (base() - other).abs().max() > 0.5


def test_noise_is_standard_normal() -> None:
    draws = Noise(0, tuple((0, s) for s in range(200)), (100,), dtype=F64)()
    # Two-sided Kolmogorov-Smirnov at 20 000 draws: fails once in 10 000 seeds, and the seed is fixed.
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(torch.corrcoef(draws[:2])[0, 1]) < 0.4


# ---- schedules and reverse steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_schedules_fall_from_top_to_zero(name: str, steps: int) -> None:
    sigmas = make_sigmas(name, steps, 0.01, 40.0)
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    assert sigmas[0] == pytest.approx(40.0, rel=1e-9)
    if steps > 1:
        assert sigmas[-2] == pytest.approx(0.01, rel=1e-9)


def test_karras_levels_are_those_of_the_paper() -> None:
    n, rho = 18, 7
    expected = [
        (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        for i in range(n)
    ]
    assert make_sigmas("karras", n, 0.002, 80.0)[:-1].tolist() == pytest.approx(
        expected, rel=1e-12
    )


def test_vp_linear_levels_are_those_of_ddpm() -> None:
    """1000 levels of beta from 1e-4 to 0.02; discretisation makes 2.5 % at the low end."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    ddpm = ((1 - alphas) / alphas).sqrt().flip(0)
    ours = make_sigmas("vp-linear", 1000, float(ddpm[-1]), float(ddpm[0]))[:-1]
    assert (ours.log() - ddpm.log()).abs().max() < 0.03


@pytest.mark.parametrize(
    ("levels", "steps", "message"),
    [
        ([1.0, 2.0, 0.0], 2, "strictly decreasing"),
        ([2.0, 1.0], 1, "end in 0"),
        ([2.0, 1.0, 0.0], 5, "expected 6"),
    ],
)
def test_bad_user_levels(levels: list[float], steps: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_sigmas(levels, steps, 0.01, 40)


def test_unknown_schedule_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'karras'"):
        make_sigmas("karas", 5, 0.01, 40)


def test_reverse_steps_against_the_ddpm_posterior() -> None:
    """Moments of q(x_b | x_a, x0) from the joint Gaussian of (x_a, x_b), with fixed x0."""
    a, b, x, x0, n = 2.0, 0.7, torch.tensor(3.0), torch.tensor(1.0), torch.tensor(0.37)
    # x_a = x_b + independent noise of variance a^2 - b^2, x_b ~ N(x0, b^2).
    mean, variance = x0 + b**2 / a**2 * (x - x0), b**2 * (a**2 - b**2) / a**2
    assert ancestral(x, x0, a, b, n) == pytest.approx(
        float(mean + math.sqrt(variance) * n), rel=1e-6
    )
    assert ddim(x, x0, a, b, n, 0.0) == pytest.approx(float(euler(x, x0, a, b)), rel=1e-6)
    assert mix_noise(x, x0, a, b, n, 0.0) == pytest.approx(float(euler(x, x0, a, b)), rel=1e-6)
    assert mix_noise(x, x0, a, b, n, 1.0) == pytest.approx(float(x0 + b * n), rel=1e-6)
    assert renoise(x, b, a, n) == pytest.approx(float(x + math.sqrt(a**2 - b**2) * n), rel=1e-6)
    for step in (
        ancestral(x, x0, a, 0.0, n),
        euler(x, x0, a, 0.0),
        mix_noise(x, x0, a, 0.0, n, 0.5),
    ):
        assert step == x0


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_deterministic_steps(method: str, order: int) -> None:
    """Prior N(0, 1): the probability flow from a to b is x sqrt((1 + b^2) / (1 + a^2))."""

    def denoise(x: torch.Tensor, s: float) -> torch.Tensor:
        return x / (1 + s**2)

    errors, counts = [], (16, 32, 64, 128)
    for count in counts:
        x, levels = (
            torch.tensor(1.0, dtype=F64),
            torch.linspace(2.0, 0.5, count + 1, dtype=F64).tolist(),
        )
        for a, b in itertools.pairwise(levels):
            d = denoise(x, a)
            x = euler(x, d, a, b) if method == "euler" else heun(x, d, a, b, denoise)
        errors.append(abs(float(x) - math.sqrt(1.25 / 5)))
    slope = -math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(order, abs=0.2)


# ---- noise laws and likelihood


def test_gaussian_log_density_matches_scipy() -> None:
    y, predicted = torch.tensor([[0.3, 1.2]], dtype=F64), torch.tensor([[0.1, 1.0]], dtype=F64)
    sigma = torch.tensor([0.2, 0.5], dtype=F64)
    law = noise.Gaussian(sigma).bind(y)
    shift = predicted + 0.4
    ours = law.log_density(predicted, y) - law.log_density(shift, y)
    theirs = (
        stats.norm.logpdf(y, predicted, sigma).sum() - stats.norm.logpdf(y, shift, sigma).sum()
    )
    assert float(ours) == pytest.approx(theirs, rel=1e-12)


def test_poisson_log_density_matches_scipy() -> None:
    gain = 0.1
    y = gain * torch.tensor([[3.0, 0.0, 12.0]], dtype=F64)
    law = noise.Poisson(gain).bind(y)
    rates = (
        torch.tensor([[0.25, 0.05, 1.1]], dtype=F64),
        torch.tensor([[0.5, 0.2, 0.9]], dtype=F64),
    )
    ours = law.log_density(rates[0], y) - law.log_density(rates[1], y)
    theirs = [stats.poisson.logpmf((y / gain).round(), r / gain).sum() for r in rates]
    assert float(ours) == pytest.approx(theirs[0] - theirs[1], rel=1e-10)


def test_complex_measurements_count_both_parts() -> None:
    y = torch.zeros(1, 4, dtype=torch.complex128)
    likelihood = Likelihood(Identity(), y, 0.5)
    x = torch.full((1, 4), 1 + 1j, dtype=torch.complex128)
    log_prob, chi2 = likelihood.evaluate(x)
    assert float(log_prob) == pytest.approx(-0.5 * 8 / 0.25)
    assert float(chi2) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (-0.1, "sigma_y is -0.1"),
        (float("nan"), "sigma_y is nan"),
        (torch.ones(7), r"sigma_y has shape \(7,\)"),
        (torch.ones(3, 1, 1), "sigma_y has shape"),
    ],
)
def test_bad_sigma_y(sigma: float | torch.Tensor, message: str) -> None:
    with pytest.raises((InputError, ShapeError), match=message):
        noise.Gaussian(sigma).bind(torch.zeros(2, 5))


def test_exact_data_is_announced() -> None:
    y = torch.full((2, 5), 3.0)
    with pytest.warns(UserWarning, match=r"sigma_y is 0 .* 0\.1%"):
        law = noise.Gaussian(0.0).bind(y)
    assert law.sigma_y.flatten().tolist() == pytest.approx([3e-3, 3e-3])


def test_rows_of_a_per_element_sigma() -> None:
    y = torch.randn(3, 5)
    sigma = torch.rand(3, 5) + 0.1
    part = Likelihood(Identity(), y, sigma).rows(torch.tensor([2, 2, 0]))
    x = torch.randn(3, 5)
    expected = ((y[[2, 2, 0]] - x) / sigma[[2, 2, 0]]).square().mean(1)
    assert torch.allclose(part.chi2(x), expected)


def test_unknown_pixels_do_not_count() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    operator = Inpainting(mask)
    x = torch.rand(2, 1, 4, 4)
    y = operator(x) + 0.3 * mask
    y[:, :, 3] = float("nan")
    assert torch.allclose(Likelihood(operator, y, 0.1).chi2(x), torch.full((2,), 9.0))


def test_non_finite_measurement_is_refused() -> None:
    y = torch.zeros(1, 4)
    y[0, 2] = float("inf")
    with pytest.raises(InputError, match=r"1 NaN or infinite values \(first at index \(0, 2\)\)"):
        Likelihood(Identity(), y, 0.1)


# ---- proximal map and units


def _proximal_objective(
    likelihood: Likelihood, z: torch.Tensor, x: torch.Tensor, variance: float
) -> torch.Tensor:
    return (z - x).square().flatten(1).sum(1) / (2 * variance) - likelihood.log_prob(z)


@pytest.mark.parametrize("sigma", [0.3, "per element"])
def test_proximal_point_of_a_linear_operator_is_exact(sigma: float | str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 8, generator=generator, dtype=F64)
    y, x = (
        torch.randn(2, 5, generator=generator, dtype=F64),
        torch.randn(2, 8, generator=generator, dtype=F64),
    )
    sigma_y = (
        torch.rand(5, generator=generator, dtype=F64) + 0.1
        if sigma == "per element"
        else torch.tensor(sigma)
    )
    variance = torch.tensor([0.5, 2.0], dtype=F64)
    z = proximal(Likelihood(Matrix(matrix), y, sigma_y), x, variance)
    weight = torch.diag((1 / sigma_y.to(F64) ** 2).expand(5))
    for i in range(2):
        system = matrix.T @ weight @ matrix + torch.eye(8) / variance[i]
        exact = torch.linalg.solve(system, matrix.T @ weight @ y[i] + x[i] / variance[i])
        # CG stops at a relative residual of 1e-6.
        assert torch.allclose(z[i], exact, atol=1e-5)


@pytest.mark.parametrize("law", [0.1, noise.Poisson(0.05)])
def test_proximal_point_of_a_nonlinear_target_is_stationary(law: float | noise.Poisson) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 6, generator=generator, dtype=F64) + 0.5
    likelihood = Likelihood(Cube(), (Cube()(truth) / 0.05).round() * 0.05, law)
    x, variance = truth + 0.2 * torch.randn(2, 6, generator=generator, dtype=F64), 0.04
    z = proximal(likelihood, x, variance).requires_grad_()
    (slope,) = torch.autograd.grad(_proximal_objective(likelihood, z, x, variance).sum(), z)
    start = x.clone().requires_grad_()
    (before,) = torch.autograd.grad(
        _proximal_objective(likelihood, start, x, variance).sum(), start
    )
    # A first-order descent of 20 steps: three orders of magnitude off the first slope.
    assert slope.norm() < 1e-3 * before.norm()


def test_problem_changes_units_once() -> None:
    prior = Gaussian(torch.zeros(3), torch.eye(3))
    prior.scale, prior.shift = 0.5, 0.25
    y = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    problem = Problem(prior, Likelihood(Identity(), y, 0.1))
    x0 = (y - 0.25) / 0.5
    log_prob, chi2, slope = problem.gradient(x0 + 0.2)
    # 0.2 normalised is 0.1 in data units: one sigma_y.
    assert torch.allclose(chi2, torch.ones(1, dtype=F64))
    assert torch.allclose(log_prob, torch.tensor(-1.5, dtype=F64))
    assert torch.allclose(slope, torch.full((1, 3), -0.5 * 0.1 / 0.01, dtype=F64))
    assert torch.allclose(problem.prox(x0, 1e3), x0)
    assert problem.sigma_y is not None
    assert problem.sigma_y.item() == pytest.approx(0.2)


def test_guide_is_the_chain_rule() -> None:
    generator = torch.Generator().manual_seed(1)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=F64)
    matrix = torch.randn(3, 2, generator=generator, dtype=F64)
    prior = Gaussian(torch.zeros(2, dtype=F64), covariance)
    y, x = (
        torch.randn(1, 3, generator=generator, dtype=F64),
        torch.randn(1, 2, generator=generator, dtype=F64),
    )
    problem = Problem(prior, Likelihood(Matrix(matrix), y, 0.3))
    guidance = problem.guide(x, 0.8)
    jacobian = covariance @ torch.linalg.inv(covariance + 0.64 * torch.eye(2))
    residual = y - (x @ jacobian.T) @ matrix.T
    assert torch.allclose(guidance.gradient, residual @ matrix @ jacobian / 0.09, atol=1e-10)
    assert (problem.counters.network, problem.counters.vjp, problem.counters.forward) == (1, 1, 1)


def test_shape_comes_from_prior_operator_or_caller() -> None:
    class Free(Gaussian):
        pass

    prior = Free(torch.zeros(2), torch.eye(2))
    prior.shape = (3, None, None)
    y = torch.zeros(1, 3, 8, 10)
    assert Problem(prior, Likelihood(SuperResolution(2), y, 0.1)).shape == (3, 16, 20)
    assert Problem(prior, Likelihood(Matrix(torch.eye(2)), y, 0.1), shape=(3, 5, 5)).shape == (
        3,
        5,
        5,
    )
    with pytest.raises(ShapeError, match="shape of x is unknown"):
        Problem(prior, Likelihood(Matrix(torch.eye(2)), y, 0.1))
    prior.min_size = 32
    with pytest.raises(ShapeError, match="at least 32"):
        Problem(prior, Likelihood(Identity(), y, 0.1))


def test_symmetries_are_undone_and_differ() -> None:
    x = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    turned = [turn_image(x, k) for k in range(SYMMETRIES)]
    assert all(torch.equal(turn_back(t, k), x) for k, t in enumerate(turned))
    assert len({tuple(t.flatten().tolist()) for t in turned}) == SYMMETRIES
