"""Noise laws against dense algebra, scipy and their own draws; every solver takes each, or says which do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import invguide as ig
from invguide.api import make_solver
from invguide.errors import CompatibilityError, InputError, ShapeError
from invguide.likelihood import Likelihood
from invguide.noise import (
    BlockGaussian,
    CorrelatedGaussian,
    Gaussian,
    Laplace,
    LowRankGaussian,
    NoiseModel,
    Poisson,
    PoissonGaussian,
    Rician,
    StudentT,
    Uniform,
)
from invguide.operators import GaussianBlur, Identity
from invguide.problem import problem as problem_module
from invguide.problem.problem import Problem
from invguide.problem.proximal import proximal
from invguide.solver import Solver
from small_runs import FEW, MEASURING, small_prior

F64 = torch.float64
SHAPE, M = (3, 4, 5), 60
FIELD = ig.priors.GaussianField((1, 6, 6), scale=0.2, shift=0.5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(size: int) -> Tensor:
    root = randn(size, size, seed=1)
    return root @ root.mT / size + 0.1 * torch.eye(size, dtype=F64)


def correlated() -> dict[str, tuple[NoiseModel, Tensor]]:
    """Laws, and their covariance as dense algebra over `y.flatten(1)`."""
    full, channels, pairs = covariance(M), covariance(3), covariance(15)
    factor = randn(*SHAPE, 2, seed=2)
    flat = factor.reshape(M, 2)
    by_axes = torch.zeros(*SHAPE, *SHAPE, dtype=F64)  # axes 0 and 2 belong together
    for row in range(4):
        by_axes[:, row, :, :, row, :] = pairs.reshape(3, 5, 3, 5)
    return {
        "full": (CorrelatedGaussian(full), full),
        "channels": (
            CorrelatedGaussian(channels, axes=0),
            torch.kron(channels, torch.eye(20, dtype=F64)),
        ),
        "two axes": (CorrelatedGaussian(pairs, axes=(0, 2)), by_axes.reshape(M, M)),
        "blocks": (
            BlockGaussian([covariance(k) for k in (1, 7, 30, 22)]),
            torch.block_diag(*(covariance(k) for k in (1, 7, 30, 22))),
        ),
        "low rank": (
            LowRankGaussian(0.5, factor),
            0.25 * torch.eye(M, dtype=F64) + flat @ flat.mT,
        ),
    }


@pytest.mark.parametrize("known", [None, (M, 3), (M, 7)])
@pytest.mark.parametrize("name", ["full", "channels", "two axes", "blocks", "low rank"])
def test_whitened_residuals_are_those_of_dense_algebra(
    name: str, known: tuple[int, int] | None
) -> None:
    law, C = correlated()[name]
    y, x = randn(2, *SHAPE, seed=3), randn(2, *SHAPE, seed=4)
    mask = None if known is None else (torch.arange(M) % known[1] > 0).reshape(SHAPE)
    likelihood = Likelihood(Identity(), y, law, mask)
    kept = torch.arange(M) if mask is None else mask.flatten().nonzero()[:, 0]
    # Of what is known, the covariance is the part of C that belongs to it.
    part, r = C[kept][:, kept], (y - x).flatten(1)[:, kept]
    square = (r * torch.linalg.solve(part, r.mT).mT).sum(1)
    whitened = likelihood.whitened(x)
    assert whitened.shape == (2, len(kept))
    assert torch.allclose(whitened.square().sum(1), square, rtol=1e-10)
    assert torch.allclose(likelihood.log_prob(x), -square / 2, rtol=1e-10)
    assert torch.allclose(likelihood.chi2(x), square / len(kept), rtol=1e-10)
    if name in ("full", "blocks"):
        L = torch.linalg.cholesky(part)
        dense = torch.linalg.solve_triangular(L, r.mT, upper=False).mT
        assert (whitened - dense).abs().max() < 1e-10
    assert torch.allclose(law.bind(y).sigma(x, y).flatten(1), C.diagonal().sqrt(), rtol=1e-10)


@pytest.mark.parametrize("name", ["full", "channels", "two axes", "blocks", "low rank"])
def test_whitening_has_its_adjoint_and_makes_the_noise_white(name: str) -> None:
    law, C = correlated()[name]
    bound = law.bind(torch.zeros(1, *SHAPE, dtype=F64))
    identity = torch.eye(M, dtype=F64).reshape(M, *SHAPE)
    W = bound.whiten(identity).flatten(1).mT  # type: ignore[attr-defined]
    adjoint = bound.whiten_adjoint(identity).flatten(1).mT  # type: ignore[attr-defined]
    assert (W @ C @ W.mT - torch.eye(M)).abs().max() < 1e-10
    assert (adjoint - W.mT).abs().max() < 1e-12


def test_complex_noise_counts_both_parts() -> None:
    root = torch.complex(randn(4, 4, seed=1), randn(4, 4, seed=2))
    C = root @ root.mH + torch.eye(4)
    y = torch.complex(randn(1, 4, seed=3), randn(1, 4, seed=4))
    square = (y.conj() @ torch.linalg.solve(C, y.mT)).real
    likelihood = Likelihood(Identity(), y, CorrelatedGaussian(C))
    assert torch.allclose(likelihood.log_prob(torch.zeros_like(y)), -square[0] / 2, rtol=1e-10)
    assert likelihood.size == 8


def test_blocks_of_each_measurement_and_complex_ones() -> None:
    """Row i has the covariances of measurement i, also after `rows`; of complex y both parts count."""
    each = torch.stack([covariance(4), 2 * covariance(4)])
    root = torch.complex(randn(3, 3, seed=1), randn(3, 3, seed=2))
    hermitian = root @ root.mH + torch.eye(3)
    y = torch.complex(randn(2, 7, seed=3), randn(2, 7, seed=4))
    law = BlockGaussian([each, hermitian])
    bound = law.bind(y).rows(torch.tensor([1, 0, 1]))
    for row, measurement in enumerate((1, 0, 1)):
        C = torch.block_diag(each[measurement].to(y.dtype), hermitian)
        r = y[measurement]
        square = (r.conj() @ torch.linalg.solve(C, r)).real
        density = bound.log_density(0 * y[[1, 0, 1]], y[[1, 0, 1]])[row]
        assert abs(density + square / 2) < 1e-10 * square


def test_covariances_that_cannot_be_are_refused() -> None:
    y = torch.zeros(1, 2, 3)
    with pytest.raises(
        ShapeError, match=r"blocks of 2, 3 numbers are 5 together; .*\(2, 3\) has 6"
    ):
        BlockGaussian([torch.eye(2), torch.eye(3)]).bind(y)
    with pytest.raises(
        InputError, match=r"expected covariances of shape .* got one of shape \(2, 3\)"
    ):
        BlockGaussian([torch.eye(2), torch.ones(2, 3)])
    with pytest.raises(InputError, match="not positive definite"):
        BlockGaussian([torch.eye(2), -torch.eye(4)]).bind(y)
    with pytest.raises(ShapeError, match=r"expected \(6, 6\)"):
        CorrelatedGaussian(torch.eye(5)).bind(y)
    with pytest.raises(InputError, match="not positive definite"):
        CorrelatedGaussian(torch.ones(6, 6)).bind(y)
    with pytest.raises(InputError, match="not finite and symmetric"):
        CorrelatedGaussian(torch.arange(36.0).reshape(6, 6)).bind(y)
    with pytest.raises(ShapeError, match="axes="):
        CorrelatedGaussian(torch.eye(2), axes=4).bind(y)
    with pytest.raises(ShapeError, match="the factor has shape"):
        LowRankGaussian(1.0, torch.ones(5, 2)).bind(y)


# ---- draws of each law at a known signal: (law, draws)

TRUTH = torch.linspace(0.0, 3.0, 4000, dtype=F64)[None]  # a tenth of it is next to black


def draws() -> dict[str, tuple[NoiseModel, Tensor]]:
    source, x = np.random.default_rng(0), TRUTH.numpy()
    normal = source.standard_normal(x.shape)
    counts = source.poisson(x / 0.05)
    complex_noise = 0.3 * (normal + 1j * source.standard_normal(x.shape))
    cauchy = source.standard_t(1.0, x.shape)
    found = {
        "Poisson": (Poisson(0.05), 0.05 * counts),
        "PoissonGaussian, few": (PoissonGaussian(0.05, 0.02), 0.05 * counts + 0.02 * normal),
        "PoissonGaussian, much": (PoissonGaussian(0.05, 0.3), 0.05 * counts + 0.3 * normal),
        "Laplace": (Laplace(0.2), x + source.laplace(0, 0.2, x.shape)),
        "StudentT": (StudentT(0.2), x + 0.2 * source.standard_t(3.0, x.shape)),
        "Cauchy": (StudentT(0.2, dof=1.0), x + 0.2 * cauchy),
        "Rician": (Rician(0.3), np.abs(x + complex_noise)),
        "Uniform": (Uniform(0.2), x + source.uniform(-0.2, 0.2, x.shape)),
        "Gaussian": (Gaussian(0.2), x + 0.2 * normal),
    }
    return {name: (law, torch.tensor(y)) for name, (law, y) in found.items()}


@pytest.mark.parametrize("name", sorted(draws()))
def test_chi2_of_the_truth_is_one(name: str) -> None:
    law, y = draws()[name]
    likelihood = Likelihood(Identity(), y, law)
    squares = likelihood.noise.squares(TRUTH, y)
    assert squares is not None
    error = float(squares.std()) / squares.numel() ** 0.5
    assert abs(float(likelihood.chi2(TRUTH)) - 1) < 3 * error
    assert error < 0.1  # else nothing is said


def theirs(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    if name == "Poisson":
        return stats.poisson.logpmf((y / 0.05).round(), x / 0.05)
    if name.startswith("PoissonGaussian"):
        sigma = 0.02 if "few" in name else 0.3
        k = np.arange(400)[:, None]
        terms = stats.poisson.pmf(k, x / 0.05) * stats.norm.pdf(y, 0.05 * k, sigma)
        return np.log(terms.sum(0))
    if name == "Laplace":
        return stats.laplace.logpdf(y, x, 0.2)
    if name == "Rician":
        return stats.rice.logpdf(y, x / 0.3, scale=0.3)
    return stats.t.logpdf(y, {"StudentT": 3.0, "Cauchy": 1.0}[name], x, 0.2)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("Poisson", 1e-8),
        ("PoissonGaussian, few", 1e-6),  # counts beyond 6 sigma are left out
        ("PoissonGaussian, much", 0.1),  # shifted counts, third moments differ
        ("Laplace", 1e-10),
        ("StudentT", 1e-10),
        ("Cauchy", 1e-10),
        ("Rician", 1e-8),
    ],
)
def test_log_densities_are_those_of_scipy(name: str, allowed: float) -> None:
    law, y = draws()[name]
    y, x = y[:, 400::40], TRUTH[:, 400::40]
    bound = law.bind(y)
    for i in range(y.shape[1]):
        one, at = y[0, i].reshape(1, 1), (0.9 * x[0, i], x[0, i])
        part = law.bind(one)
        ours = [float(part.log_density(a.reshape(1, 1), one)) for a in at]
        exact = [float(theirs(name, one.numpy()[0], a.numpy()[None])[0]) for a in at]
        assert ours[1] - ours[0] == pytest.approx(exact[1] - exact[0], abs=allowed)
    assert bound.log_density(x, y).shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(draws()))
def test_log_densities_are_bounded_above(name: str) -> None:
    law, _ = draws()[name]
    y = torch.tensor([[0.0], [0.05], [1.0]], dtype=F64)
    bound = law.bind(y)
    best = bound.log_density(torch.linspace(-2, 4, 6001, dtype=F64).expand(3, 1, -1)[:, 0, :1], y)
    for i in range(3):
        one, law_i = y[i : i + 1], bound.rows(torch.tensor([i]))
        grid = torch.cat(
            [torch.linspace(-2, 4, 2001, dtype=F64), torch.tensor([-1e6, -50.0, 50.0, 1e6])]
        )
        values = torch.stack([law_i.log_density(v.reshape(1, 1), one)[0] for v in grid])
        assert int(values.argmax()) < 2001  # near y, not far away
        assert values.isfinite().all()
    assert best.isfinite().all()


def test_counts_of_none_are_likeliest_at_rate_zero() -> None:
    law, none = Poisson(0.1), torch.zeros(1, 1)
    values = [float(law.log_density(torch.tensor([[r]]), none)) for r in (0.0, -5.0, -500.0, 0.1)]
    assert values[0] == 0
    assert max(values[1:]) < 0


# ---- missing entries


def test_missing_entries_count_for_nothing() -> None:
    y, x = randn(2, 6, seed=0), randn(2, 6, seed=1)
    mask = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]])
    told = torch.where(mask > 0, y, torch.nan)
    laws: tuple[NoiseModel, ...] = (Gaussian(0.3), Laplace(0.2), StudentT(0.2), Uniform(3.0))
    for law in laws:
        likelihood = Likelihood(Identity(), told, law, mask)
        arrays = np.ma.MaskedArray(y.numpy(), mask.numpy() == 0)
        same = Likelihood(Identity(), arrays, law)
        for i in range(2):
            kept = mask[i] > 0
            part = Likelihood(Identity(), y[i : i + 1, kept], law)
            log_prob, chi2 = part.evaluate(x[i : i + 1, kept])
            blank = Likelihood(Identity(), torch.zeros(1, 1, dtype=F64), law)
            missing = int((~kept).sum()) * blank.log_prob(torch.zeros(1, 1, dtype=F64))
            assert torch.allclose(likelihood.log_prob(x)[i], log_prob + missing)
            assert torch.allclose(likelihood.chi2(x)[i], chi2[0], equal_nan=True)
        assert torch.equal(likelihood.log_prob(x), same.log_prob(x))
    with pytest.raises(InputError, match="nothing of measurement 1 is known"):
        Likelihood(Identity(), y, 0.1, torch.tensor([[1] * 6, [0] * 6]))
    with pytest.raises(InputError, match=r"values other than 0 and 1, such as 0\.5"):
        Likelihood(Identity(), y, 0.1, 0.5 * torch.ones(6))
    with pytest.raises(ShapeError, match="the mask has shape"):
        Likelihood(Identity(), y, 0.1, torch.ones(5))


def test_a_masked_measurement_has_the_exact_posterior_of_what_is_known() -> None:
    shape, source = (1, 6, 6), small_prior(F64)
    blur, mask = GaussianBlur(sigma=0.7), (torch.arange(36) % 3 > 0).reshape(shape)
    law = CorrelatedGaussian(0.01 * covariance(36))
    y = blur(randn(1, *shape, seed=5))
    result = ig.solve(
        torch.where(mask, y, torch.nan), blur, source, noise=law, mask=mask, progress=False
    )
    assert "ExactPosterior" in str(result.manifest["solver"])
    A = blur(torch.eye(36, dtype=F64).reshape(36, *shape)).flatten(1).mT
    kept = mask.flatten()
    A, C = A[kept], (0.01 * covariance(36))[kept][:, kept]
    gain = source.covariance @ A.mT @ torch.linalg.inv(A @ source.covariance @ A.mT + C)
    exact = gain @ y.flatten()[kept]
    assert torch.allclose(result.samples.flatten(), exact, atol=1e-8)


# ---- data steps and solvers


@pytest.mark.parametrize("name", ["full", "low rank"])
def test_the_data_step_of_correlated_noise_is_dense_algebra(name: str) -> None:
    law, C = correlated()[name]
    blur, x, y = GaussianBlur(sigma=0.7), randn(2, *SHAPE, seed=3), randn(2, *SHAPE, seed=4)
    A = blur(torch.eye(M, dtype=F64).reshape(M, *SHAPE)).flatten(1).mT
    z = proximal(Likelihood(blur, y, law), x, 0.3).flatten(1)
    r = y.flatten(1) - x.flatten(1) @ A.mT
    exact = x.flatten(1) + r @ torch.linalg.inv(A @ A.mT + C / 0.3) @ A
    assert (z - exact).abs().max() < 1e-4  # conjugate gradients stop at 1e-6 of the residual


@pytest.mark.slow
@pytest.mark.parametrize("law", [Laplace(0.05), StudentT(0.05)])
def test_the_data_step_of_outliers_is_stationary(law: NoiseModel) -> None:
    """Of one number each, where the best point is found by search."""
    y, x = torch.tensor([[0.0, 1.0, 3.0]], dtype=F64), torch.zeros(1, 3, dtype=F64)
    z = proximal(Likelihood(Identity(), y, law), x, 0.04)
    grid = torch.linspace(-0.5, 3.5, 40001, dtype=F64)
    for i in range(3):
        one = y[:, i : i + 1]
        values = torch.stack(
            [law.bind(one).log_density(v.reshape(1, 1), one)[0] for v in grid[::40]]
        )
        best = grid[::40][(values - grid[::40] ** 2 / 0.08).argmax()]
        assert abs(float(z[0, i] - best)) < 0.02


def test_the_noise_in_signals_is_found_once_for_a_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HQS asks in every step; other rows and another reward are told their own."""
    found: list[int] = []
    find = problem_module.noise_in_signals

    def counted(problem: Problem) -> Tensor | None:
        found.append(len(problem.y))
        return find(problem)

    monkeypatch.setattr(problem_module, "noise_in_signals", counted)
    y, sigma = randn(3, 1, 6, 6, seed=5), torch.tensor([0.1, 0.2, 0.4])[:, None, None, None]
    problem = Problem(FIELD, Likelihood(Identity(), y, sigma))
    for _ in range(3):
        level = problem.noise_level
        assert torch.allclose(level, sigma.flatten().to(level) / problem.prior.scale)  # type: ignore[union-attr]
    part = problem.rows(torch.tensor([2, 0]))
    assert torch.equal(part.noise_level, level[[2, 0]])  # type: ignore[arg-type, index]
    assert found == [3, 2]
    ig.solve(y, Identity(), FIELD, noise=Gaussian(0.1), solver="hqs", progress=False)
    assert len(found) <= 5, "not once for each of 30 steps"


@pytest.mark.parametrize("kind", [">f4", "<f8", "u2", np.longdouble])
def test_parameters_may_be_arrays_of_any_kind(kind: Any) -> None:
    given = np.array([[[1, 2, 3]]], kind)[..., ::-1]
    law = Gaussian(given).bind(torch.zeros(2, 1, 1, 3))
    assert law.sigma_y[0].flatten().tolist() == [3, 2, 1]
    labels = np.array([3, 1], kind)
    told = Problem(
        FIELD, Likelihood(Identity(), randn(2, 1, 6, 6), 0.1), condition={"label": labels}
    )
    assert told.condition["label"].tolist() == [3, 1]


LAWS: dict[str, NoiseModel] = {
    "BlockGaussian": BlockGaussian([0.02 * covariance(k) for k in (5, 31)]),
    "CorrelatedGaussian": CorrelatedGaussian(0.02 * covariance(36)),
    "LowRankGaussian": LowRankGaussian(0.1, 0.2 * torch.ones(1, 6, 6)),
    "Poisson": Poisson(0.05),
    "PoissonGaussian": PoissonGaussian(0.05, 0.1),
    "Laplace": Laplace(0.1),
    "StudentT": StudentT(0.1, dof=2.0),
    "Rician": Rician(0.1),
    "Uniform": Uniform(0.2),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize("law", sorted(LAWS))
def test_every_solver_takes_every_law_or_names_those_that_do(name: str, law: str) -> None:
    settings: dict[str, Any] = FEW.get(name, {"num_steps": 12})
    solver: Solver[Any] = make_solver(name, **settings)
    shape = (1, 6, 6)
    x = 1.5 + 0.4 * randn(1, *shape, seed=6)
    y = 0.05 * torch.poisson(x / 0.05, generator=torch.Generator().manual_seed(0))
    source = ig.priors.Gaussian(torch.full(shape, 1.5, dtype=F64), small_prior(F64).covariance)
    likelihood = Likelihood(GaussianBlur(sigma=0.7), y, LAWS[law])
    problem = Problem(source, likelihood)
    if solver.requires.gaussian * ("Gaussian" not in law or law == "PoissonGaussian") or (
        solver.requires.orthonormal or (law == "StudentT" and solver.requires.residuals)
    ):
        with pytest.raises(CompatibilityError, match="solvers that would do: "):
            ig.driver.run(solver, problem, progress=False)
        return
    result = ig.driver.run(solver, problem, progress=False)
    assert result.samples.isfinite().all()
    drawn = source.sample(100).reshape(100, *shape)
    blank = likelihood.rows(torch.zeros(100, dtype=torch.long)).log_prob(drawn)
    assert float(result.log_prob.max()) > float(blank.median())  # better than draws of the prior
