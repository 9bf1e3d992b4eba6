"""TweedieMatheron against the exact posteriors of Gaussian fields, and what it promises of rows and starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.forward_operator import LinearOperator, orthonormal_scale
from invguide.likelihood import Likelihood
from invguide.operators import GaussianBlur, Identity, Inpainting, SuperResolution
from invguide.prior import Prior
from invguide.priors import GaussianField
from invguide.problem.problem import Problem
from invguide.sampling.twist import Tangent
from invguide.schedule import split_levels
from invguide.solvers import TweedieMatheron

SHAPE, SIGMA_Y, DRAWS = (1, 8, 8), 0.05, 400
OPERATORS = {
    "blur": GaussianBlur(sigma=1.0),
    "inpaint": Inpainting.random(SHAPE, 0.5),
    "reduce": SuperResolution(factor=2),
    "denoise": Identity(),
}


def field() -> GaussianField:
    return GaussianField(SHAPE, std=0.5, scale=0.5, shift=0.5)


def measured(name: str) -> tuple[LinearOperator, Tensor]:
    operator, prior = OPERATORS[name], field()
    clean = operator(prior.to_data(prior.sample(1, seed=5)))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
    y = clean + SIGMA_Y * noise
    return operator, operator(y) if name == "inpaint" else y


def figures(name: str, solver: TweedieMatheron) -> tuple[float, float]:
    """Mean square of the standardised error of the sample mean, and ratio of variances, both 1 for exact draws."""
    operator, y = measured(name)
    prior = field()
    problem = Problem(prior, Likelihood(operator, y, SIGMA_Y))
    result = driver.run(solver, problem, DRAWS, dtype=torch.float64, progress=False)
    x, posterior = prior.to_normalised(result.samples[0]), prior.posterior(operator, y, SIGMA_Y)
    variance = posterior.std.square()
    error = DRAWS * ((x.mean(0) - posterior.mean).square() / variance).mean()
    return float(error), float(x.var(0).mean() / variance.mean())


@pytest.mark.parametrize("name", OPERATORS)
def test_gaussian_fields_are_sampled_nearly_exactly(name: str) -> None:
    """400 draws of 64 correlated pixels: the first figure scatters by about 0.3, the second by 0.02.

    The draw's spectrum, J^2 in place of J, and three steps of conjugate gradients cost a few per cent of the variance.
    """
    error, variance = figures(name, TweedieMatheron())
    assert error < 2.5
    assert abs(variance - 1) < 0.08


@dataclass(frozen=True)
class Mean(TweedieMatheron):
    """Planted: the conditional mean in place of the draw, as MMPS has it."""

    def step(self, problem, state, k, noise):  # type: ignore[no-untyped-def]
        return super().step(problem, state, k, lambda p="", s=None: noise(p, s) * (p == ""))


@dataclass(frozen=True)
class Forgets(TweedieMatheron):
    """Planted: the simulated measurement has no noise of its own."""

    def step(self, problem, state, k, noise):  # type: ignore[no-untyped-def]
        return super().step(
            problem, state, k, lambda p="", s=None: noise(p, s) * (p != "measurement")
        )


@pytest.mark.parametrize("planted", [Mean, Forgets])
def test_planted_mistakes_are_seen(planted: type[TweedieMatheron]) -> None:
    error, variance = figures("blur", planted(num_steps=12))
    exact = figures("blur", TweedieMatheron(num_steps=12))
    assert abs(exact[1] - 1) < 0.08
    assert not (error < 2.5 and abs(variance - 1) < 0.08)


@pytest.mark.parametrize("name", ["blur", "denoise"])
def test_rows_do_not_know_each_other(name: str) -> None:
    operator, y = measured(name)
    batch = torch.cat([y, 0.5 * y + 0.2, y.flip(-1)])
    problem = Problem(
        field(), Likelihood(operator, batch, torch.tensor([0.05, 0.02, 0.4])[:, None, None, None])
    )
    whole, alone = (
        driver.run(
            TweedieMatheron(num_steps=6),
            problem,
            2,
            batch_size=b,
            dtype=torch.float64,
            progress=False,
        )
        for b in (6, 1)
    )
    # float64: rounding of sums in another order, times what 6 steps amplify.
    assert torch.allclose(whole.samples, alone.samples, rtol=0, atol=1e-9)


def test_denoising_starts_at_the_noise_of_the_measurement() -> None:
    operator, y = measured("denoise")
    problem = Problem(field(), Likelihood(operator, y, SIGMA_Y))
    seen: list[float] = []

    class Watched(GaussianField):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            seen.append(float(torch.as_tensor(sigma).max()))
            return super().denoise(x, sigma, **condition)

    prior = Watched(SHAPE, std=0.5, scale=0.5, shift=0.5)
    problem = Problem(prior, Likelihood(operator, y, SIGMA_Y))
    result = driver.run(TweedieMatheron(num_steps=5), problem, 1, progress=False)
    assert seen[0] == pytest.approx(SIGMA_Y / 0.5)  # normalised units
    assert seen == sorted(seen, reverse=True)
    assert result.nfe == 5
    assert result.manifest["vjp_calls"] == 5  # a draw at each level, nothing to solve


class Turned(LinearOperator):
    """An orthonormal map that is not the identity: a rotation of neighbouring pixels."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([0.6 * a - 0.8 * b, 0.8 * a + 0.6 * b], -1).flatten(-2)

    def adjoint(self, y: Tensor) -> Tensor:
        a, b = y[..., ::2], y[..., 1::2]
        return torch.stack([0.6 * a + 0.8 * b, -0.8 * a + 0.6 * b], -1).flatten(-2)


class Doubled(Turned):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return 2 * super().adjoint(y)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [(Identity(), 1.0), (Turned(), 1.0), (Doubled(), 2.0), (OPERATORS["blur"], None)],
)
def test_orthonormal_maps_are_told_with_their_scale(
    operator: LinearOperator, expected: float | None
) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.empty(1, *SHAPE, dtype=dtype)
        scale = orthonormal_scale(operator, x, x)
        assert (scale is None) == (expected is None)
        assert scale is None or scale == pytest.approx(expected, rel=1e-5)


class Crooked(Prior):
    """A denoiser whose Jacobian is no covariance: not symmetric."""

    turn: Tensor
    shape, sigma_min, sigma_max, sigma_data = SHAPE, 0.01, 20.0, 0.5

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        self.register_buffer("turn", torch.randn(64, 64, generator=source) / 8)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        crooked = (x.flatten(1) @ self.turn.to(x.dtype)).reshape(x.shape)
        return (x + 0.3 * crooked) * 0.25 / (0.25 + level**2)


def test_crooked_jacobians_end_finite() -> None:
    """More steps than the default, with a Jacobian that no covariance has; sigma_y is a hundredth of the data."""
    y = torch.zeros(1, *SHAPE)
    problem = Problem(Crooked(), Likelihood(GaussianBlur(sigma=1.0), y, 0.01))
    result = driver.run(TweedieMatheron(num_cg=8), problem, 4, progress=False)
    assert bool(torch.isfinite(result.samples).all())
    assert float(result.samples.abs().max()) < 20


def test_products_with_the_jacobian_are_those_of_the_matrix() -> None:
    """J v by a difference and J^T v by the graph, of a linear denoiser; a difference divides float64's rounding."""
    prior, source = Crooked(), torch.Generator().manual_seed(4)
    x, v = torch.randn(2, 3, *SHAPE, generator=source, dtype=torch.float64)
    levels = torch.tensor([0.02, 0.5, 9.0], dtype=torch.float64)
    tangent = Tangent(Problem(prior, shape=SHAPE), x, levels)
    size = (0.25 / (0.25 + levels**2))[:, None, None]
    matrix = size * (torch.eye(64, dtype=torch.float64) + 0.3 * prior.turn.double().mT)
    assert not torch.allclose(matrix, matrix.mT, atol=0.1)
    expected = (matrix @ v.flatten(1)[..., None])[..., 0]
    transposed = (matrix.mT @ v.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(tangent.push(v.flatten(1)), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(tangent.pull(v.flatten(1)), transposed, rtol=0, atol=1e-12)
    both = tangent.symmetric(v.flatten(1))
    torch.testing.assert_close(both, (expected + transposed) / 2, rtol=0, atol=1e-9)
    assert not bool(tangent.push(torch.zeros(3, 64, dtype=torch.float64)).any())


def test_noise_may_vary_within_a_measurement() -> None:
    """No preconditioner then; as many steps as unknowns solve exactly."""
    prior, operator = field(), OPERATORS["blur"]
    _, y = measured("blur")
    sigma = torch.linspace(0.02, 0.2, 64, dtype=torch.float64).reshape(SHAPE)
    problem = Problem(prior, Likelihood(operator, y, sigma))
    solver = TweedieMatheron(num_cg=30)
    result = driver.run(solver, problem, DRAWS, dtype=torch.float64, progress=False)
    basis = torch.eye(64, dtype=torch.float64).reshape(64, *SHAPE)
    matrix = operator(0.5 * basis).flatten(1).mT
    covariance = prior.covariance(basis).flatten(1)
    gain = (
        covariance
        @ matrix.mT
        @ torch.linalg.inv(matrix @ covariance @ matrix.mT + sigma.flatten().square().diag())
    )
    mean = gain @ (y - operator(torch.full_like(y, 0.5))).flatten()
    variance = (covariance - gain @ matrix @ covariance).diagonal()
    x = prior.to_normalised(result.samples[0]).flatten(1)
    assert DRAWS * float(((x.mean(0) - mean).square() / variance).mean()) < 2.5
    assert abs(float(x.var(0).mean() / variance.mean()) - 1) < 0.08


def test_the_draw_of_a_white_prior_has_its_covariance() -> None:
    """J = c I: the shift is a sqrt(c) n exactly."""
    prior = ig.priors.Gaussian(torch.zeros(6), torch.eye(6))
    problem = Problem(prior, Likelihood(Identity(), torch.zeros(3, 6), 0.1))
    level = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    n = torch.randn(3, 6, dtype=torch.float64)
    shift, variance = Tangent(problem, torch.zeros(3, 6, dtype=torch.float64), level).draw(n)
    c = 1 / (1 + level**2)
    assert torch.allclose(shift, (level * c.sqrt())[:, None] * n)
    assert torch.allclose(variance, level**2 * c * n.square().mean(1))


def test_levels_are_split_where_the_data_begin() -> None:
    start = torch.tensor([40.0, 1.0, 0.01], dtype=torch.float64)
    levels = split_levels(start, 4.0, 0.02, 12)
    assert levels.shape == (13, 3)
    assert levels[0].tolist() == pytest.approx(start.tolist())
    assert levels[-1].tolist() == [0, 0, 0]
    assert bool((levels.diff(dim=0) <= 1e-12).all())
    assert levels[2, 0].item() == pytest.approx(4.0)  # a sixth of twelve lie above
    assert levels[1, 0].item() == pytest.approx(math.sqrt(40 * 4))
    assert levels[11].tolist() == pytest.approx([0.02, 0.02, 0.01])
    assert torch.equal(levels[:, 1], split_levels(start[1:2], 4.0, 0.02, 12)[:, 0])


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"num_steps": 2.5}, {"num_cg": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ig.errors.InputError, match=next(iter(settings))):
        TweedieMatheron(**settings)


def test_it_needs_a_linear_operator_and_gaussian_noise() -> None:
    y = torch.full((1, *SHAPE), 0.5)
    for operator, noise, text in (
        (lambda x: x**2, ig.noise.Gaussian(0.1), "linear operator"),
        (Identity(), ig.noise.Poisson(0.1), "Gaussian noise"),
    ):
        with pytest.raises(ig.errors.CompatibilityError, match=text):
            ig.solve(y, operator, field(), noise=noise, solver=TweedieMatheron(), progress=False)
