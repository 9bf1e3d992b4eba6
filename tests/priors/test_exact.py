"""Closed-form priors against quadrature, autograd, dense algebra in numpy, grids and importance sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from invguide.errors import InputError, RunError, ShapeError
from invguide.forward_operator import LinearOperator
from invguide.priors import Gaussian, GaussianField, GaussianMixture
from invguide.priors.exact import field as field_module

Exact = Gaussian | GaussianMixture | GaussianField
LEVELS = (0.05, 0.5, 3.0, 40.0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_covariance(d: int, count: int | None = None) -> Tensor:
    root = randn(*(() if count is None else (count,)), d, d)
    return root @ root.mT / d + 0.2 * torch.eye(d)


def a_prior(kind: str) -> Exact:
    torch.manual_seed(3)
    weights = torch.tensor([0.2, 0.5, 0.3])
    if kind == "gaussian":
        return Gaussian(randn(4), random_covariance(4))
    if kind == "gaussian-image":
        return Gaussian(randn(1, 2, 3), random_covariance(6))
    if kind == "shared":
        return GaussianMixture(3 * randn(3, 4), random_covariance(4), weights)
    if kind == "full":
        return GaussianMixture(3 * randn(3, 4), random_covariance(4, 3), weights)
    if kind == "full-image":
        return GaussianMixture(randn(3, 1, 2, 2), random_covariance(4, 3), weights)
    if kind == "field":
        return GaussianField((2, 3, 4), std=0.7, mean=0.3)
    return GaussianField((1, 7), slope=1.0)  # one axis, odd


KINDS = ("gaussian", "gaussian-image", "shared", "full", "full-image", "field", "field-1d")


def states(prior: Exact, count: int = 5) -> Tensor:
    return 2 * randn(count, *(n or 0 for n in prior.shape))


def dense_field_covariance(shape: tuple[int, ...], slope: float, std: float) -> np.ndarray:
    """The covariance from its definition: a sum of cosines over the frequencies of the torus."""
    height, width = shape[1:]
    k = np.array(
        [
            (np.fft.fftfreq(height)[i], np.fft.fftfreq(width)[j])
            for i in range(height)
            for j in range(width)
        ]
    )
    power = (1 + max(height, width) ** 2 * (k**2).sum(1)) ** (-slope / 2)
    power *= std**2 / power.mean()
    where = np.array([(i, j) for i in range(height) for j in range(width)])
    offsets = where[:, None] - where[None]
    one = (power * np.cos(2 * np.pi * offsets @ k.T)).mean(-1)
    return np.kron(np.eye(shape[0]), one)


def dense_posterior(
    mean: np.ndarray, covariance: np.ndarray, A: np.ndarray, y: np.ndarray, sigma_y: float
) -> tuple[np.ndarray, np.ndarray]:
    """Information form, which shares no formula with the code: (C^-1 + A^T A / s^2)^-1."""
    precision = np.linalg.inv(covariance) + A.T @ A / sigma_y**2
    out = np.linalg.inv(precision)
    return out @ (np.linalg.solve(covariance, mean) + A.T @ y / sigma_y**2), out


class Blur(LinearOperator):
    """Circular convolution with a fixed asymmetric kernel on the last two axes."""

    taps = ((0, 0, 0.5), (0, 1, 0.3), (1, 0, 0.15), (1, -1, 0.05))

    def forward(self, x: Tensor) -> Tensor:
        return sum((w * x.roll((i, j), (-2, -1)) for i, j, w in self.taps), torch.zeros_like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return sum((w * y.roll((-i, -j), (-2, -1)) for i, j, w in self.taps), torch.zeros_like(y))


class Mask(LinearOperator):
    """Keeps every second entry."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, ::2]

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), torch.Size(self.shape).numel())
        x[:, ::2] = y
        return x.reshape(-1, *self.shape)


class Fourier(LinearOperator):
    """Half of the two-dimensional spectrum: complex measurements."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, norm="ortho")[..., ::2]

    def adjoint(self, y: Tensor) -> Tensor:
        full = y.new_zeros(*y.shape[:-1], 2 * y.shape[-1])
        full[..., ::2] = y
        return torch.fft.ifft2(full, norm="ortho").real


class Swap(Blur):
    """A blur that also exchanges the channels: not a convolution channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))

    def adjoint(self, y: Tensor) -> Tensor:
        return super().adjoint(y).flip(1)


def as_matrix(A: LinearOperator, shape: tuple[int, ...]) -> np.ndarray:
    d = math.prod(shape)
    columns = []
    for i in range(d):
        impulse = torch.zeros(d, dtype=torch.float64)
        impulse[i] = 1
        image = A.forward(impulse.reshape(1, *shape))
        columns.append(
            (torch.view_as_real(image) if image.is_complex() else image).flatten().numpy()
        )
    return np.stack(columns, axis=1)


# ---- the denoiser


@pytest.mark.parametrize("sigma", LEVELS)
def test_mixture_denoiser_is_the_quadrature_of_bayes_rule(sigma: float):
    means, stds, weights = (
        np.array([-2.0, 0.5, 3.0]),
        np.array([0.3, 1.0, 0.1]),
        np.array([0.5, 0.2, 0.3]),
    )
    full = GaussianMixture(means[:, None], (stds**2)[:, None, None], weights)
    shared = GaussianMixture(means[:, None], [[0.09]], weights)
    x0 = np.linspace(-12, 12, 200_001)
    x = np.linspace(-6, 6, 13)
    for prior, widths in ((full, stds), (shared, np.full(3, 0.3))):
        density = sum(
            w * np.exp(-0.5 * ((x0 - m) / s) ** 2) / s for m, s, w in zip(means, widths, weights)
        )
        joint = density * np.exp(-0.5 * ((x[:, None] - x0) / sigma) ** 2)
        expected = (joint * x0).sum(1) / joint.sum(1)
        actual = prior.denoise(torch.from_numpy(x)[:, None], sigma)[:, 0].numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_gaussian_denoiser_is_the_dense_formula():
    prior = a_prior("gaussian")
    assert isinstance(prior, Gaussian)
    m, C, x = prior.mean.numpy(), prior.covariance.numpy(), states(prior)
    for sigma in LEVELS:
        expected = m + (x.numpy() - m) @ np.linalg.inv(C + sigma**2 * np.eye(4)) @ C
        np.testing.assert_allclose(prior.denoise(x, sigma).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_tweedie(kind: str, per_row: bool):
    """D = x + sigma^2 grad log p: ties denoise, score and log_prob together, by autograd."""
    prior = a_prior(kind)
    x = states(prior).requires_grad_()
    for sigma in LEVELS:
        level = sigma * torch.linspace(0.5, 1.5, len(x)).double() if per_row else sigma
        (score,) = torch.autograd.grad(prior.log_prob(x, level).sum(), x)
        variance = torch.as_tensor(level, dtype=torch.float64) ** 2
        variance = variance.reshape(-1, *(1,) * (x.ndim - 1)) if per_row else variance
        torch.testing.assert_close(
            prior.denoise(x, level), x + variance * score, rtol=1e-9, atol=1e-10
        )
        torch.testing.assert_close(prior.score(x, level), score, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["gaussian", "shared", "full", "field"])
def test_log_prob_is_that_of_torch_distributions(kind: str):
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    prior, sigma = a_prior(kind), 0.8
    x = states(prior)
    noise = sigma**2 * torch.eye(x[0].numel()).double()
    if isinstance(prior, GaussianMixture):
        normals = MultivariateNormal(prior.means, prior.covariance + noise)
        law = MixtureSameFamily(Categorical(prior.weights), normals)
    elif isinstance(prior, GaussianField):
        dense = torch.from_numpy(dense_field_covariance((2, 3, 4), 2.0, 0.7))
        law = MultivariateNormal(prior.mean.flatten(), dense + noise)
    else:
        assert isinstance(prior, Gaussian)
        law = MultivariateNormal(prior.mean, prior.covariance + noise)
    torch.testing.assert_close(prior.log_prob(x, sigma), law.log_prob(x.flatten(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str):
    prior = a_prior(kind)
    x = states(prior)
    sigma = torch.linspace(0.1, 2, len(x)).double()
    together = prior.denoise(x, sigma)
    for i in range(len(x)):
        alone = prior.denoise(x[i : i + 1], sigma[i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.denoise(x, 0.0), x)
    assert prior.score(x, 0.0).isfinite().all()
    assert torch.autograd.gradcheck(lambda v: prior.denoise(v, sigma), x.clone().requires_grad_())
    assert prior.dtype == torch.float64
    assert prior.denoise(x.float(), 0.5).dtype == torch.float32
    torch.testing.assert_close(
        prior.denoise(x.float(), 0.5).double(), prior.denoise(x, 0.5), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        prior.float().denoise(x.float(), 0.5).double(),
        a_prior(kind).denoise(x, 0.5),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_range_and_size(kind: str):
    prior = a_prior(kind)
    draws = prior.sample(4000, seed=1)
    assert draws.shape == (4000, *prior.shape)
    flat = draws.flatten(1)
    assert prior.sigma_data == pytest.approx(float(flat.square().mean().sqrt()), rel=0.1)
    moments = torch.linalg.eigvalsh(flat.mT @ flat / len(flat))
    assert prior.sigma_max == pytest.approx(20 * float(moments[-1].sqrt()), rel=0.1)
    assert prior.sigma_min < 1.1e-3 * float(torch.linalg.eigvalsh(flat.mT.cov())[0].sqrt())
    assert torch.equal(draws, prior.sample(4000, seed=1))
    assert not torch.equal(draws, prior.sample(4000, seed=2))


def moment_z_scores(draws: Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Largest |z| over the entries of sample mean and covariance of Gaussian draws.

    Var(S_ij) = (C_ii C_jj + C_ij^2) / n. With at most 400 entries, |z| < 5 fails by chance with
    probability 2e-4; the seeds are fixed, so it never does by turns.
    """
    flat, n = draws.flatten(1).numpy(), len(draws)
    variance = covariance.diagonal()
    z_mean = (flat.mean(0) - mean.reshape(-1)) / np.sqrt(variance / n)
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    return max(np.abs(z_mean).max(), (np.abs(np.cov(flat.T) - covariance) / spread).max())


@pytest.mark.parametrize("kind", ["gaussian", "gaussian-image", "field"])
def test_samples_have_the_stated_moments(kind: str):
    prior = a_prior(kind)
    dense = dense_field_covariance((2, 3, 4), 2.0, 0.7)
    covariance = prior.covariance.numpy() if isinstance(prior, Gaussian) else dense
    draws = prior.sample(20_000, seed=0)
    assert moment_z_scores(draws, prior.mean.numpy(), covariance) < 5
    assert moment_z_scores(1.1 * draws, 1.1 * prior.mean.numpy(), covariance) > 5
    np.testing.assert_allclose(prior.std.flatten(), np.sqrt(covariance.diagonal()))


@pytest.mark.parametrize("kind", ["shared", "full", "full-image"])
def test_mixture_samples(kind: str):
    prior = a_prior(kind)
    assert isinstance(prior, GaussianMixture)
    draws = prior.sample(40_000, seed=0)
    z = (draws.mean(0) - prior.mean) / (prior.std / 200)
    assert z.abs().max() < 5
    # The variance of a squared deviation is below its fourth moment: measured, not assumed.
    square = (draws - prior.mean) ** 2
    z = (square.mean(0) - prior.std**2) / (square.std(0) / 200)
    assert z.abs().max() < 5
    # Each draw has probability r_k of component k; the mean responsibility is the weight.
    r = prior.responsibilities(draws)
    assert ((r.mean(0) - prior.weights) / (r.std(0) / 200)).abs().max() < 5


def test_distant_modes_fade_without_a_clamp():
    prior = GaussianMixture([[-1000.0], [1000.0]], [[1.0]], [1e-3, 0.999])
    near_lower = torch.tensor([[-1000.0], [-999.0]]).double()
    torch.testing.assert_close(
        prior.denoise(near_lower, 1.0), torch.tensor([[-1000.0], [-999.5]]).double()
    )
    posterior = prior.posterior(torch.eye(1), [-1000.0], 0.1)
    # exp(-2e6) is no float64, its logarithm is.
    assert posterior.log_weights[1] < -1e6
    assert posterior.log_weights.isfinite().all()
    assert float(posterior.mean) == pytest.approx(-1000, abs=1e-6)
    assert float(posterior.std) == pytest.approx(math.sqrt(1 / 101))


def test_label_picks_the_component():
    for kind in ("shared", "full"):
        prior = a_prior(kind)
        assert isinstance(prior, GaussianMixture)
        x = states(prior, 4)
        covariance = prior.covariance if kind == "shared" else prior.covariance[2]
        single = Gaussian(prior.means[2], covariance)
        actual = prior.denoise(x, 0.7, label=torch.tensor([2, -1, 2, -1]))
        torch.testing.assert_close(actual[::2], single.denoise(x, 0.7)[::2])
        torch.testing.assert_close(actual[1::2], prior.denoise(x, 0.7)[1::2])


# ---- posteriors


def test_gaussian_posterior_golden():
    """Toy A: numbers computed independently of this package."""
    prior = Gaussian([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])
    posterior = prior.posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([1.5]), 0.3)
    np.testing.assert_allclose(posterior.mean, [1.41743, 0.25046], atol=5e-6)
    np.testing.assert_allclose(posterior.std, [0.28735, 0.41198], atol=5e-6)
    correlation = float(posterior.covariance[0, 1] / posterior.std.prod())
    assert correlation == pytest.approx(0.4185, abs=5e-5)


def test_mixture_posterior_golden():
    """Toy B."""
    prior = GaussianMixture([[-2.0], [2.0]], [[0.09]], [0.5, 0.5])
    posterior = prior.posterior(torch.ones(1, 1), torch.tensor([0.5]), 1.0)
    assert float(posterior.weights[1]) == pytest.approx(0.86234, abs=5e-6)
    np.testing.assert_allclose(posterior.means[:, 0], [-1.79358, 1.87615], atol=5e-6)
    assert float(posterior.covariance.sqrt()) == pytest.approx(0.28735, abs=5e-6)


@pytest.mark.parametrize("kind", ["gaussian", "gaussian-image"])
def test_gaussian_posterior_is_the_information_form(kind: str):
    prior = a_prior(kind)
    assert isinstance(prior, Gaussian)
    d = prior.mean.numel()
    A, y = randn(3, d), randn(3)
    posterior = prior.posterior(A, y, 0.2)
    mean, covariance = dense_posterior(
        prior.mean.numpy().reshape(-1), prior.covariance.numpy(), A.numpy(), y.numpy(), 0.2
    )
    np.testing.assert_allclose(posterior.mean.flatten(), mean, rtol=1e-9)
    np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-8, atol=1e-11)


def grid_posterior(
    prior: GaussianMixture, A: Tensor, y: Tensor, sigma_y: float
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of p(x) p(y | x) summed over a fine grid of the plane."""
    axis = torch.linspace(-9, 9, 901).double()
    x = torch.cartesian_prod(axis, axis)
    log_posterior = prior.log_prob(x) - 0.5 * ((y - x @ A.mT) / sigma_y).square().sum(1)
    p = log_posterior.softmax(0)
    mean = p @ x
    return mean, (x - mean).mT @ (p[:, None] * (x - mean))


@pytest.mark.parametrize("full", [False, True])
def test_mixture_posterior_is_that_of_a_grid(full: bool):
    covariance = torch.stack([0.3 * random_covariance(2) for _ in range(3)])
    prior = GaussianMixture(
        [[-3.0, 1.0], [2.0, 2.0], [0.0, -2.0]],
        covariance if full else covariance[0],
        [0.5, 0.2, 0.3],
    )
    A, y, sigma_y = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([0.4]).double(), 0.9
    posterior = prior.posterior(A, y, sigma_y)
    mean, expected = grid_posterior(prior, A, y, sigma_y)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.std, expected.diagonal().sqrt(), rtol=1e-6, atol=1e-6)
    # Pointwise too: log p(x | y) - log p(x) - log p(y | x) is the same number everywhere.
    x = 2 * randn(50, 2)
    constant = (
        posterior.log_prob(x)
        - prior.log_prob(x)
        + 0.5 * ((y - x @ A.mT) / sigma_y).square().sum(1)
    )
    torch.testing.assert_close(constant, constant[:1].expand(50), rtol=1e-9, atol=1e-9)
    # The grid does notice a missing evidence factor.
    posterior.log_weights = prior.log_weights
    assert (posterior.mean - mean).abs().max() > 0.1


def test_mixture_posterior_is_that_of_importance_sampling():
    prior = a_prior("full-image")
    assert isinstance(prior, GaussianMixture)
    A, y = randn(2, 4), randn(2)
    x = prior.sample(400_000, seed=5)
    log_weight = -0.5 * (y - x.flatten(1) @ A.mT).square().sum(1)
    w = log_weight.softmax(0).reshape(-1, 1, 1, 1)
    estimate = (w * x).sum(0)
    error = ((w * (x - estimate)) ** 2).sum(0).sqrt()  # of a self-normalised estimate
    assert ((prior.posterior(A, y, 1.0).mean - estimate) / error).abs().max() < 4.5


@pytest.mark.parametrize("kind", ["gaussian-image", "full-image"])
def test_posterior_of_operators_units_and_complex_data(kind: str):
    torch.manual_seed(3)
    shape = (1, 2, 4)
    units = {"scale": 0.5, "shift": 0.25}
    m, C = randn(8), random_covariance(8)
    if kind == "gaussian-image":
        prior = Gaussian(m.reshape(shape), C, **units)
    else:
        prior = GaussianMixture(m.reshape(1, *shape), C[None], **units)
    for A in (Fourier(), Mask(shape), Blur()):
        y = A.forward(randn(1, *shape))
        dense = as_matrix(A, shape)
        flat = (torch.view_as_real(y) if y.is_complex() else y).numpy().reshape(-1)
        mean, covariance = dense_posterior(
            (0.5 * m + 0.25).numpy(), 0.25 * C.numpy(), dense, flat, 0.3
        )  # all in data units
        for given in (y, y[0]):
            posterior = prior.posterior(A, given, 0.3)
            np.testing.assert_allclose(
                posterior.to_data(posterior.mean).flatten(), mean, atol=1e-10
            )
            np.testing.assert_allclose(
                0.5 * posterior.std.flatten(), np.sqrt(covariance.diagonal()), atol=1e-10
            )


# ---- fields

SHAPE = (2, 4, 6)
OPERATORS = {"blur": Blur(), "mask": Mask(SHAPE), "fourier": Fourier(), "swap": Swap()}


def field_problem(
    name: str,
) -> tuple[GaussianField, LinearOperator, Tensor, np.ndarray, np.ndarray]:
    """Return prior, operator, y, and the posterior mean and covariance (normalised) in numpy."""
    prior = GaussianField(SHAPE, slope=2.5, std=0.8, mean=0.4, scale=0.5, shift=0.25)
    A = OPERATORS[name]
    clean = A.forward(prior.to_data(prior.sample(1, seed=9)))
    y = clean + 0.1 * torch.randn_like(clean)
    flat = (torch.view_as_real(y) if y.is_complex() else y).numpy().reshape(-1)
    dense = as_matrix(A, SHAPE)
    d = math.prod(SHAPE)
    mean, covariance = dense_posterior(
        np.full(d, 0.4),
        dense_field_covariance(SHAPE, 2.5, 0.8),
        0.5 * dense,
        flat - dense @ np.full(d, 0.25),
        0.1,
    )
    return prior, A, y, mean, covariance


@pytest.mark.parametrize("name", OPERATORS)
def test_field_posterior_mean_and_std(name: str):
    prior, A, y, mean, covariance = field_problem(name)
    posterior = prior.posterior(A, y, 0.1)
    assert (posterior._transfer is not None) == (name == "blur")  # only that is a convolution
    np.testing.assert_allclose(posterior.mean.flatten(), mean, atol=1e-8)
    np.testing.assert_allclose(posterior.std.flatten(), np.sqrt(covariance.diagonal()), atol=1e-8)


@pytest.mark.parametrize("name", OPERATORS)
def test_matheron_samples(name: str):
    prior, A, y, mean, covariance = field_problem(name)
    posterior = prior.posterior(A, y, 0.1)
    draws = posterior.sample(4000, seed=0)
    assert moment_z_scores(draws, mean, covariance) < 5
    assert torch.equal(posterior.sample(3, seed=7), posterior.sample(3, seed=7))


def test_matheron_without_simulated_noise_is_noticed(monkeypatch: pytest.MonkeyPatch):
    prior, A, y, mean, covariance = field_problem("mask")
    draw = field_module.normal

    def quiet(shape: tuple[int, ...], source: torch.Generator, like: Tensor) -> Tensor:
        return draw(shape, source, like) * (shape[1:] == SHAPE)  # the signal's noise, not y's

    monkeypatch.setattr(field_module, "normal", quiet)
    draws = prior.posterior(A, y, 0.1).sample(4000, seed=0)
    assert moment_z_scores(draws, mean, covariance) > 10


@pytest.mark.slow
def test_field_std_from_samples_agrees_with_the_exact_one():
    prior = GaussianField((1, 34, 34))
    y = Blur().forward(prior.sample(1))
    exact, sampled = prior.posterior(Blur(), y, 0.5), prior.posterior(Blur(), y, 0.5)
    expected = exact.std
    sampled._transfer = None  # 1156 entries: no dense matrix either
    torch.testing.assert_close(sampled.mean, exact.mean)
    ratio = sampled.std / expected
    assert (ratio - 1).abs().max() < 5 / math.sqrt(512)
    assert ratio.mean() == pytest.approx(1, abs=0.02)


def test_field_spectrum_is_a_power_law():
    prior = GaussianField((1, 64, 64), slope=3.0, knee=0.1)
    power = torch.fft.fft2(prior.sample(400)).abs().square().mean(0)[0]
    low, high = power[0, 4], power[0, 16]
    assert float((low / high).log2() / 2) == pytest.approx(3, abs=0.3)
    assert float(prior.sample(400).std()) == pytest.approx(1, abs=0.1)


# ---- errors

EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gaussian([0.0, 0.0], torch.eye(3)), ShapeError, r"covariance must be \(2, 2\)"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), InputError, "not symmetric"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), InputError, "eigenvalue is -1"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]]), InputError, "positive definite"),
        (lambda: Gaussian([0.0, math.nan], EYE), InputError, "mean holds NaN"),
        (lambda: GaussianMixture([0.0, 1.0], EYE), ShapeError, r"means must be \(K, d\)"),
        (lambda: GaussianMixture(EYE, torch.eye(3)), ShapeError, r"\(2, 2\) or \(2, 2, 2\)"),
        (lambda: GaussianMixture(EYE, EYE, [1.0]), ShapeError, r"weights must be \(2,\)"),
        (lambda: GaussianMixture(EYE, EYE, [0.5, 0.6]), InputError, "sum to 1.1"),
        (lambda: GaussianMixture(EYE, EYE, [1.5, -0.5]), InputError, "must be positive"),
        (lambda: GaussianMixture(EYE, EYE, [1.0, 0.0]), InputError, "Drop components"),
        (lambda: GaussianField((8,)), InputError, r"a tuple \(C, \.\.\.\), at least 2"),
        (
            lambda: GaussianField((1, 8), std=0.0),
            InputError,
            "std is 0.0; expected a finite number above 0",
        ),
        (lambda: GaussianField((1, 8), slope=5000.0), InputError, "too steep"),
        (lambda: a_prior("gaussian").denoise(randn(2, 3), 1.0), ShapeError, r"shape \(B, 4\)"),
        (lambda: a_prior("field").denoise(randn(2, 3), 1.0), ShapeError, r"\(B, 2, 3, 4\)"),
        (
            lambda: a_prior("gaussian").denoise(randn(2, 4), 1.0, label=EYE),
            InputError,
            "no condition 'label'",
        ),
        (
            lambda: a_prior("full").denoise(randn(2, 4), 1.0, text=EYE),
            InputError,
            "no condition 'text'",
        ),
        (
            lambda: Gaussian([0.0, 0.0], EYE).posterior(EYE, [1.0], 0.1),
            ShapeError,
            "one measurement",
        ),
        (lambda: Gaussian([0.0, 0.0], EYE).posterior(EYE, [1.0, 1.0], 0.0), InputError, "sigma_y"),
        (
            lambda: Gaussian([0.0, 0.0], EYE).posterior(torch.eye(3), [1.0], 1.0),
            ShapeError,
            r"\(m, 2\)",
        ),
        (lambda: GaussianField((1, 8)).posterior(EYE, [1.0], 1.0), InputError, "LinearOperator"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_errors(make, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_adjoint_is_reported():
    class Wrong(Mask):
        def adjoint(self, y: Tensor) -> Tensor:
            return 1.001 * super().adjoint(y)

    with pytest.raises(InputError, match=r"Wrong\.adjoint is not the adjoint"):
        GaussianField(SHAPE).posterior(Wrong(SHAPE), torch.ones(24), 0.1)


def test_a_system_beyond_rounding_is_reported():
    prior = GaussianField(SHAPE, slope=30.0)
    y = Swap().forward(prior.sample(1)) + randn(1, *SHAPE)
    with pytest.raises(RunError, match="was solved to"):
        prior.posterior(Swap(), y, 1e-9)
