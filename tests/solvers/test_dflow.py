"""DFlow against closed forms: for a Gaussian prior and a linear operator, its optimum is one linear solve.

With Euler's method the roll-out of a Gaussian prior N(m, C) is affine, m + M z, M a product of 2 x 2 matrices that is
written out here. Tolerance of optima: 1e-6, what L-BFGS leaves in float64 after a few dozen steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.api import load_prior
from invguide.errors import CompatibilityError, InputError
from invguide.likelihood import Likelihood
from invguide.noise import Poisson
from invguide.numerics import lbfgs
from invguide.operators import Identity
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solvers import DFlow, dflow
from invguide.system.memory import peak_memory
from invguide.verify.distances import sliced_wasserstein
from invguide.verify.targets import gaussian_2d, gaussian_64d

MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
MEASURED = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
Y, SIGMA_Y = 1.5, 0.3
LEVELS = (40.0, 10.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0)
EULER = DFlow(25, 7, "euler", schedule=LEVELS)


def flow() -> tuple[Tensor, Tensor]:
    """Offset and matrix of the roll-out from z to x0: x' = (b/a) x + (1 - b/a) (m + J (x - m))."""
    offset, matrix = torch.zeros(2, dtype=torch.float64), LEVELS[0] * EYE
    for a, b in pairwise(LEVELS):
        J = COVARIANCE @ torch.linalg.inv(COVARIANCE + a**2 * EYE)
        step = b / a * EYE + (1 - b / a) * J
        offset = step @ offset + (1 - b / a) * (MEAN - J @ MEAN)
        matrix = step @ matrix
    return offset, matrix


def optimum(centre: Tensor, y: Tensor) -> Tensor:
    """x0 of argmin |y - A (offset + M z)|^2 / (2 sigma_y^2) + |z - centre|^2 / 2, rows of centre and y."""
    offset, matrix = flow()
    seen = MEASURED @ matrix
    hessian = EYE + seen.mT @ seen / SIGMA_Y**2
    pull = centre + (y - MEASURED @ offset) @ seen / SIGMA_Y**2
    return offset + torch.linalg.solve(hessian, pull.mT).mT @ matrix.mT


def run(solver: DFlow, problem: Problem, count: int, **more):
    return driver.run(solver, problem, count, progress=False, **more)


# ---- closed forms


def gaussian_error(solver: DFlow) -> float:
    samples = run(solver, gaussian_2d().problem(), 4).samples[0]
    expected = optimum(torch.zeros(1, 2), torch.tensor([[Y]], dtype=torch.float64))
    return float((samples - expected).abs().max())


def test_gaussian_prior_gives_the_most_likely_noise():
    assert gaussian_error(EULER) < 1e-6


def test_which_is_the_posterior_mean():
    """Of every seed; the error is that of 20 calls of the network and of the ends of the schedule."""
    for target in (gaussian_2d(), gaussian_64d()):
        samples = run(DFlow(40), target.problem(), 2).samples[0]
        assert (samples - target.posterior.mean).abs().max() < 0.01
        assert samples.std(0).max() < 1e-3


def test_without_a_prior_it_stays_on_the_data():
    """Golden numbers of an independent implementation: mean error (0.083, 0.052) on this problem, x_0 on y."""
    target = gaussian_2d()
    samples = run(DFlow(20, prior_weight=0.0), target.problem(), 300).samples[0]
    assert (samples[:, 0] - Y).abs().max() < 1e-3
    error = (samples.mean(0) - target.posterior.mean).tolist()
    assert error == pytest.approx([0.083, 0.052], abs=0.08)  # 300 samples: 0.025 each
    assert samples[:, 1].std() > 0.2


def draws(count: int) -> tuple[Tensor, Tensor]:
    noise = Noise(0, tuple((0, s) for s in range(count)), (2,), torch.float64)
    return noise("init"), Y + SIGMA_Y * noise("measurement", (1, 1))[..., 0]


def randomised_error(solver: DFlow) -> float:
    samples = run(solver, gaussian_2d().problem(), 6).samples[0]
    return float((samples - optimum(*draws(6))).abs().max())


def test_randomised_draws_one_by_one():
    assert randomised_error(replace(EULER, randomised=True)) < 1e-6


def test_randomised_draws_are_the_posterior():
    """Of the closed form: mean and covariance of x0 over e and c are those given y under N(offset, M M^T)."""
    offset, matrix = flow()
    prior = matrix @ matrix.mT
    gain = prior @ MEASURED.mT / (prior[0, 0] + SIGMA_Y**2)
    samples = optimum(*draws(20_000))
    mean = offset + gain[:, 0] * (Y - offset[0])
    covariance = prior - gain @ MEASURED @ prior
    assert (samples.mean(0) - mean).abs().max() < 0.012  # standard errors: 0.003
    assert (samples.mT.cov() - covariance).abs().max() < 0.012
    wide = gaussian_64d()
    found = run(DFlow(20, randomised=True), wide.problem(), 100).samples[0]
    assert (
        sliced_wasserstein(found, wide.posterior.sample(100, seed=1)) < 0.03
    )  # exact samples: 0.02


def test_linear_reward():
    """max c.x0 - |z|^2 / 2 is at z = M^T c."""
    c = torch.tensor([1.0, -2.0], dtype=torch.float64)
    problem = Problem(gaussian_2d().prior, reward=as_reward(lambda x: x @ c.to(x.dtype)))
    offset, matrix = flow()
    found = run(EULER, problem, 3).samples[0]
    assert (found - offset - matrix @ matrix.mT @ c).abs().max() < 1e-6


def test_chi_prior_keeps_the_norm_of_noise():
    """Where the measurement tells nothing, |z| = sqrt(d - 1), in the direction that it started in."""
    d = 50
    prior = Gaussian(torch.zeros(d), torch.eye(d, dtype=torch.float64))
    problem = Problem(prior, Likelihood(Identity(), torch.zeros(1, d).double(), 1e6))
    solver = DFlow(15, 5, regulariser="chi")
    noise = Noise(0, ((0, 0),), (d,), torch.float64)
    state = start = solver.init(problem, noise)
    with torch.no_grad():
        for k in range(15):
            state, _ = solver.step(problem, state, k, noise.at(k))
    assert state.z.norm().item() == pytest.approx((d - 1) ** 0.5, abs=1e-5)
    assert torch.cosine_similarity(state.z, start.z).item() == pytest.approx(1.0, abs=1e-6)


def test_the_objective_never_falls():
    seen = []
    solver = DFlow(20, 5)
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.05 * torch.eye(2).double())
    problem = Problem(mixture, reward=as_reward(lambda x: 3 * x.sin().sum(1)))
    run(solver, problem, 20, callbacks=[lambda report: seen.append(report.info.log_density)])
    assert (torch.stack(seen).diff(dim=0) >= 0).all()
    assert seen[-1].min() > 5.5  # the better mode, from every start: seen[0] is -7 to 6


# ---- planted bugs


class Coupled(DFlow):
    """One line search for a batch."""

    def _evaluate(self, problem, z, centre):
        x0, value, slope, chi2 = super()._evaluate(problem, z, centre)
        return x0, value.mean().expand_as(value), slope, chi2


class NoChainRule(DFlow):
    def _evaluate(self, problem, z, centre):
        x0, value, _, chi2 = super()._evaluate(problem, z, centre)
        return x0, value, problem.gradient(x0)[2] - z, chi2


class HalfPrior(DFlow):
    def _evaluate(self, problem, z, centre):
        return replace(DFlow(**self.fields()), prior_weight=0.5)._evaluate(problem, z, centre)

    def fields(self) -> dict:
        return {key: value for key, value in self.settings.items() if key != "solver"}


class NoCentre(DFlow):
    def _evaluate(self, problem, z, centre):
        return super()._evaluate(problem, z, 0 * centre)


def settings(**more) -> dict:
    fields = {key: value for key, value in EULER.settings.items() if key != "solver"}
    return {**fields, **more}


@pytest.mark.parametrize("bug", [NoChainRule, HalfPrior])
def test_planted_bugs_are_caught(bug: type[DFlow]):
    assert gaussian_error(bug(**settings())) > 1e-3


def test_planted_bugs_in_randomisation_are_caught(monkeypatch: pytest.MonkeyPatch):
    assert randomised_error(NoCentre(**settings(randomised=True))) > 1e-2
    monkeypatch.setattr(dflow, "_perturbed", lambda problem, noise: problem)
    assert randomised_error(replace(EULER, randomised=True)) > 1e-2


def test_planted_coupling_is_caught():
    assert chunk_difference(Coupled(8, 4)) > 1e-4


# ---- rows, resume, memory


def nonlinear() -> Problem:
    prior = GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.1 * torch.eye(2).double())
    y = torch.tensor([[0.3, 0.8], [-0.5, 0.1]], dtype=torch.float64)
    return Problem(prior, Likelihood(Identity(), y, torch.full_like(y, 0.3)))


def chunk_difference(solver: DFlow) -> float:
    runs = [run(solver, nonlinear(), 3, batch_size=size).samples for size in (6, 4, 1)]
    return max(float((r - runs[0]).abs().max()) for r in runs)


@pytest.mark.slow
@pytest.mark.parametrize("randomised", [False, True])
def test_resume(randomised: bool, tmp_path: Path):
    solver = DFlow(9, 4, randomised=randomised)
    whole = run(solver, nonlinear(), 2)

    def stop(report) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    path = tmp_path / "run.ckpt"
    part = run(solver, nonlinear(), 2, checkpoint=path, callbacks=[stop])
    assert not part.finished.any()
    assert torch.equal(run(solver, nonlinear(), 2, checkpoint=path).samples, whole.samples)


@pytest.fixture(scope="module")
def network() -> Prior:
    prior = load_prior("natural-tiny")
    prior.min_size = 8  # its pictures make no sense there, but its calls do
    return prior


def test_memory_does_not_grow_with_the_steps(network: Prior):
    """Of optimisation and roll-out; the roll-out keeps one state per step, small beside the network's graph."""
    y = torch.rand(1, 3, 8, 8)
    problem = Problem(network, Likelihood(Identity(), y, 0.1), shape=(3, 8, 8))
    run(DFlow(1, 2), problem, 1)  # whatever is remembered from a first call
    short, long, often = (
        peak_memory(
            partial(run, DFlow(steps, n, memory=2), problem, 1, device="cpu"), torch.device("cpu")
        )
        for steps, n in ((1, 2), (1, 6), (2, 2))
    )
    assert long - short < 4 * 2 * y.nbytes
    assert long < 1.2 * short
    assert often < 1.1 * short


def test_float32_and_complex_measurements(network: Prior):
    class Spectrum(Identity):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x, norm="ortho")

        def adjoint(self, y: Tensor) -> Tensor:
            raise NotImplementedError

    x = torch.rand(1, 3, 8, 8)
    likelihood = Likelihood(Spectrum(), Spectrum()(x) + 0.05, 0.3)
    problem = Problem(network, likelihood, shape=(3, 8, 8))
    solver = DFlow(4, 5, randomised=True)
    result = run(solver, problem, 2)
    assert result.samples.dtype == torch.float32
    assert (result.chi2 < 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goes_on_after_it_has_converged(dtype: torch.dtype):
    """To an optimum at 0 without rounding, where steps, turns and their products underflow."""
    likelihood = Likelihood(Identity(), torch.zeros(1, 2), 0.5)
    result = run(
        DFlow(30, 4), Problem(Gaussian([0.0, 0.0], torch.eye(2)), likelihood), 2, dtype=dtype
    )
    assert result.samples.abs().max() < 1e-6


def test_calls():
    result = run(DFlow(5, 4), gaussian_2d().problem(), 2)
    assert result.nfe == 5 * 2 * 4
    assert result.manifest["vjp_calls"] == 2 * 5 * 4


# ---- L-BFGS


def test_newton_step_is_the_product_formula():
    """H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T from gamma I, as dense matrices."""
    s, g = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    root = torch.randn(5, 5, dtype=torch.float64)
    y = s @ (root @ root.mT + torch.eye(5, dtype=torch.float64))
    s[0, 0] = y[0, 0] = 0  # an empty entry
    found = lbfgs.newton_step(g, s, y)
    for b in range(2):
        H = (s[b, -1] @ y[b, -1]) / (y[b, -1] @ y[b, -1]) * torch.eye(5, dtype=torch.float64)
        for i in range(b == 0, 3):
            rho = 1 / (s[b, i] @ y[b, i])
            V = torch.eye(5, dtype=torch.float64) - rho * torch.outer(y[b, i], s[b, i])
            H = V.mT @ H @ V + rho * torch.outer(s[b, i], s[b, i])
        assert torch.allclose(found[b], -H @ g[b], atol=1e-10)
    assert torch.equal(lbfgs.newton_step(g, 0 * s, 0 * y), -g)


def test_history_takes_only_what_bends_upwards():
    old = torch.arange(6.0).reshape(3, 2, 1)
    step = torch.ones(3, 1)
    turn = torch.tensor([[2.0], [-2.0], [2.0]])
    moved = torch.tensor([True, True, False])
    steps, turns = lbfgs.remember(old, 10 * old, step, turn, moved)
    assert steps[..., 0].tolist() == [[1, 1], [2, 3], [4, 5]]
    assert turns[..., 0].tolist() == [[10, 2], [20, 30], [40, 50]]


def test_lengths_shrink_to_the_bottom_of_a_parabola():
    """f = -2 t + 5 t^2, lowest at 0.2; then a bottom far below a tenth, and no bottom at all."""
    one = torch.ones(3)
    rise = torch.tensor([3.0, 1e6, float("nan")])
    assert lbfgs.shorten(one, -2 * one, rise).tolist() == pytest.approx([0.2, 0.1, 0.1])


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_inner_steps": 0}, "num_inner_steps is 0"),
        ({"memory": 0}, "memory is 0; expected a whole number of at least 1"),
        ({"method": "hun"}, "method is 'hun'; did you mean 'heun'"),
        ({"regulariser": "gausian"}, "regulariser is 'gausian'; did you mean"),
        ({"prior_weight": -1.0}, "prior_weight is -1"),
        ({"prior_weight": float("nan")}, "prior_weight is nan"),
        ({"randomised": True, "regulariser": "chi"}, "leave regulariser='gaussian'"),
        ({"randomised": True, "prior_weight": 0.5}, "and prior_weight=1"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        DFlow(**settings)


def test_randomised_needs_gaussian_noise():
    prior = Gaussian([1.0, 1.0], 0.01 * torch.eye(2))
    counts = Likelihood(Identity(), torch.ones(1, 2), Poisson(1.0))
    reward = Problem(prior, reward=as_reward(lambda x: x.sum(1)))
    for problem in (Problem(prior, counts), reward):
        with pytest.raises(InputError, match=r"DFlow\(randomised=True\) perturbs a measurement"):
            run(DFlow(2, 2, randomised=True), problem, 1)


def test_black_boxes_are_refused():
    problem = Problem(nonlinear().prior, reward=as_reward(lambda x: x.sum(1), False))
    with pytest.raises(CompatibilityError, match="black box"):
        run(DFlow(), problem, 1)


def test_constant_rewards_are_named():
    problem = Problem(nonlinear().prior, reward=as_reward(lambda x: torch.ones(len(x))))
    with pytest.raises(InputError, match="its gradient is None"):
        run(DFlow(2, 2), problem, 1)
