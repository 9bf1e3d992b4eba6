"""Distances against scipy and closed forms; targets against their definition; the table against known samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.schedule import make_sigmas
from invguide.solver import EnsembleSolver, Requires, Solver
from invguide.solvers import HQS, SCG, FeynmanKac, Unconditional
from invguide.verify import (
    HiddenPosterior,
    MatrixOperator,
    Target,
    TiltedPlane,
    black_box_targets,
    conformance,
    gaussian_2d,
    gaussian_64d,
    is_black_box,
    mean_error,
    mixture_1d,
    mixture_25,
    sliced_wasserstein,
    standard_targets,
    std_ratio,
    three_blobs,
    unweighted,
    verify,
    verify_black_box,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---- distances


@pytest.mark.parametrize("counts", [(50, 50), (50, 83), (7, 1), (1, 1)])
def test_one_dimension_is_scipy(counts: tuple[int, int]):
    a, b = randn(counts[0], 1), 2 * randn(counts[1], 1) + 0.3
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert sliced_wasserstein(a, b, projections=3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [40, 57])
def test_projections_are_averaged_and_ties_are_fine(count: int):
    a, b = torch.randint(3, (40, 5)).double(), torch.randint(4, (count, 5)).double()
    source = torch.Generator().manual_seed(4)
    directions = torch.randn(20, 5, generator=source, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    expected = np.mean(
        [wasserstein_distance((a @ v).numpy(), (b @ v).numpy()) for v in directions]
    )
    assert sliced_wasserstein(a, b, projections=20, seed=4) == pytest.approx(expected, rel=1e-10)
    assert sliced_wasserstein(a, b, 20, 4) != sliced_wasserstein(a, b, 20, 5)


def test_a_shift_costs_its_mean_projection():
    """SW1 of a sample and itself moved by c is |c| E|u_1|, u uniform on the sphere of R^d."""
    d, c = 6, torch.tensor([3.0, 0, 0, 4.0, 0, 0]).double()
    a = randn(30, d)
    expected = 5 * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    # E|u_1|^2 = 1/d bounds the variance of one projection.
    error = 5 / math.sqrt(d * 4000)
    assert abs(sliced_wasserstein(a, a + c, projections=4000) - expected) < 4 * error
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, (a + c).reshape(30, 2, 3).flatten(1)) > 0


def test_moment_scores():
    mean, std = randn(2, 3), torch.rand(2, 3).double() + 0.5
    draws = mean + std * randn(20_000, 2, 3)
    assert mean_error(draws, mean, std) < 3 / math.sqrt(20_000)
    assert mean_error(draws + 0.5 * std, mean, std) == pytest.approx(0.5, abs=0.02)
    widened = mean + (draws - mean) * torch.tensor([[1.0], [4.0]])
    ratio, low, high = std_ratio(widened, std)
    assert (ratio, low, high) == pytest.approx((2.0, 1.0, 4.0), rel=0.03)


@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 4)), ((0, 2), (3, 2)), ((3,), (3,))])
def test_distance_errors(a: tuple[int, ...], b: tuple[int, ...]):
    with pytest.raises(ShapeError, match="with the same shape"):
        sliced_wasserstein(torch.zeros(a), torch.zeros(b))


# ---- targets


@pytest.mark.parametrize("shape", [(3, 6), (6, 6), (6, 2)])
def test_matrix_operator(shape: tuple[int, int]):
    M = randn(*shape)
    A = MatrixOperator(M, (1, shape[1]))
    x, y = randn(5, 1, shape[1]), randn(5, shape[0])
    torch.testing.assert_close(A(x), x[:, 0] @ M.mT)
    left, right = (A(x) * y).sum(), (x * A.adjoint(y)).sum()
    assert abs(left - right) <= 1e-12 * A(x).norm() * y.norm()
    svd = A.svd(x)
    torch.testing.assert_close(svd.U(svd.s * svd.V_adjoint(x)), A(x))
    torch.testing.assert_close(svd.V(svd.s * svd.U_adjoint(y)), A.adjoint(y))
    ridge = torch.linspace(0.1, 1, 5).double()
    dense = M @ M.mT + ridge[:, None, None] * torch.eye(shape[0])
    torch.testing.assert_close(A.solve(y, ridge), torch.linalg.solve(dense, y))
    torch.testing.assert_close(A.pinv(y)[:, 0], y @ torch.linalg.pinv(M).mT)
    assert A.input_shape((shape[0],)) == (1, shape[1])
    assert A(x.float()).dtype == torch.float32
    assert "matrix" in A.state_dict()  # runs are told apart by it
    with pytest.raises(ShapeError, match="does not hold"):
        MatrixOperator(M, (7,))
    with pytest.raises(ShapeError, match=r"\(m, d\)"):
        MatrixOperator(torch.zeros(3))


def test_toys_are_the_golden_ones():
    a, b = gaussian_2d(), mixture_1d()
    assert isinstance(a.posterior, Gaussian)
    assert isinstance(b.posterior, GaussianMixture)
    np.testing.assert_allclose(a.posterior.mean, [1.41743, 0.25046], atol=5e-6)
    np.testing.assert_allclose(a.posterior.std, [0.28735, 0.41198], atol=5e-6)
    assert float(b.posterior.weights[1]) == pytest.approx(0.86234, abs=5e-6)
    assert (a.sigma_y, float(a.y), b.sigma_y, float(b.y)) == (0.3, 1.5, 1.0, 0.5)


def test_gaussian_64d_is_as_described():
    target = gaussian_64d()
    assert isinstance(target.prior, Gaussian)
    assert isinstance(target.operator, MatrixOperator)
    values = torch.linalg.eigvalsh(target.prior.covariance).flip(0)
    torch.testing.assert_close(values, 1 / torch.arange(1.0, 65.0).double())
    assert target.operator.matrix.shape == (32, 64)
    assert float(target.operator.matrix.std()) == pytest.approx(1 / 8, rel=0.05)
    assert torch.equal(target.y, gaussian_64d().y)
    assert not torch.equal(target.y, gaussian_64d(seed=1).y)


@pytest.mark.parametrize("d", [8, 80])
@pytest.mark.parametrize("dy", [1, 2, 4])
def test_mixture_25_is_as_described(d: int, dy: int):
    target = mixture_25(d, dy, seed=3)
    assert isinstance(target.prior, GaussianMixture)
    assert isinstance(target.operator, MatrixOperator)
    means = target.prior.means
    assert means.shape == (25, d)
    assert len({tuple(row.tolist()) for row in means[:, :2]}) == 25
    assert torch.equal(means, means[:, :2].repeat(1, d // 2))
    assert set(means.flatten().tolist()) == {-16.0, -8.0, 0.0, 8.0, 16.0}
    assert torch.equal(target.prior.covariance, torch.eye(d).double())
    s = torch.linalg.svdvals(target.operator.matrix)
    assert s.shape == (dy,)
    assert 0 < s[-1] <= s[0] <= 1
    assert 0 < target.sigma_y < s[0]
    assert torch.equal(target.prior.weights, _weights(mixture_25(d, dy, seed=4)))
    assert not torch.equal(target.y, mixture_25(d, dy, seed=4).y)
    assert torch.equal(target.y, mixture_25(d, dy, seed=3).y)
    for wrong in ({"d": 7}, {"dy": 9}, {"dy": 0}):
        with pytest.raises(ShapeError, match="must be even"):
            mixture_25(**wrong)


def _weights(target: Target) -> Tensor:
    assert isinstance(target.prior, GaussianMixture)
    return target.prior.weights


@pytest.mark.parametrize("make", [gaussian_2d, mixture_1d, gaussian_64d, mixture_25])
def test_posterior_density_is_prior_times_likelihood(make):
    target = make()
    x = target.posterior.sample(40, seed=1)
    likelihood = target.problem().rows(torch.zeros(40, dtype=torch.long)).likelihood.log_prob(x)
    constant = target.posterior.log_prob(x) - target.prior.log_prob(x) - likelihood
    torch.testing.assert_close(constant, constant[:1].expand(40), rtol=1e-5, atol=1e-5)


# ---- the table


class DrawState(NamedTuple):
    x: Tensor


class DrawInfo(NamedTuple):
    pass


POSTERIOR = gaussian_2d().posterior


@dataclass(frozen=True)
class Draw(Solver[DrawState]):
    """Exact draws of toy A's posterior, moved and stretched, from `loss` calls of the network."""

    requires: ClassVar[Requires] = Requires(gradient=False)
    num_steps: int = 2
    move: float = 0.0
    stretch: float = 1.0
    blow_up: bool = False

    def init(self, problem: Problem, noise: Noise) -> DrawState:
        assert isinstance(POSTERIOR, Gaussian)
        root = torch.linalg.cholesky(POSTERIOR.covariance)
        x = self.stretch * noise("x") @ root.mT + self.move * POSTERIOR.std
        return DrawState(POSTERIOR.mean + x)

    def step(
        self, problem: Problem, state: DrawState, k: int, noise: Noise
    ) -> tuple[DrawState, DrawInfo]:
        problem.denoise(state.x, 1.0)
        return DrawState(state.x / (0.0 if self.blow_up else 1.0)), DrawInfo()

    def estimate(self, state: DrawState) -> Tensor:
        return state.x


@dataclass(frozen=True)
class DrawEnsemble(Draw, EnsembleSolver[DrawState]):
    """As an ensemble whose members share one error: visible only when many ensembles are pooled."""

    requires: ClassVar[Requires] = Requires(gradient=False)
    ensemble_size: int = 50

    def init(self, problem: Problem, noise: Noise) -> DrawState:
        assert len(noise.rows) == self.ensemble_size
        return DrawState(super().init(problem, noise).x)


@dataclass(frozen=True)
class NeedsReward(Draw):
    requires: ClassVar[Requires] = Requires(target="reward", gradient=False)


class OracleState(NamedTuple):
    x: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class Oracle(Solver[OracleState]):
    """Euler's method on the probability flow of the exact posterior: the control that must come out right."""

    requires: ClassVar[Requires] = Requires(gradient=False)
    num_steps: int = 200

    def init(self, problem: Problem, noise: Noise) -> OracleState:
        x = problem.prior.sigma_max * noise("init")
        return OracleState(x, x)

    def step(
        self, problem: Problem, state: OracleState, k: int, noise: Noise
    ) -> tuple[OracleState, DrawInfo]:
        a, b = make_sigmas(
            "karras", self.num_steps, problem.prior.sigma_min, problem.prior.sigma_max
        )[k : k + 2]
        assert isinstance(POSTERIOR, Gaussian)
        problem.counters.network += len(state.x)
        denoised = POSTERIOR.denoise(state.x, a)
        return OracleState(denoised + b / a * (state.x - denoised), denoised), DrawInfo()

    def estimate(self, state: OracleState) -> Tensor:
        return state.denoised


def test_table_tells_right_from_wrong():
    solvers = {
        "right": Draw(),
        "moved": Draw(move=1.0),
        "narrow": Draw(stretch=0.5),
        "pooled": DrawEnsemble(),
        "oracle": Oracle(),
        "reward": NeedsReward(),
        "infinite": Draw(blow_up=True),
    }
    n = 1000
    table = verify(solvers, [gaussian_2d()], num_samples=n, seed=1, progress=False)
    rows = {row.solver: row for row in table.rows}
    assert list(rows) == ["(exact)", "(prior)", *solvers]
    for name in ("(exact)", "right", "pooled", "oracle"):
        row = rows[name]
        assert row.samples == n
        assert row.note == ""
        assert row.mean_error < 4 / math.sqrt(n)
        # Std of a sample standard deviation: 1 / sqrt(2 n), 2.2 %; the oracle's 200 steps add 1 %.
        assert row.std_ratio == pytest.approx(1, abs=0.08)
        assert row.distance < 2 * row.floor
    assert rows["moved"].mean_error == pytest.approx(1, abs=0.1)
    assert rows["narrow"].std_ratio == pytest.approx(0.5, abs=0.04)
    for name in ("moved", "narrow", "(prior)"):
        assert rows[name].distance > 4 * rows[name].floor
    assert rows["(prior)"].std_high == pytest.approx(1 / 0.28735, rel=0.1)
    assert (rows["right"].nfe, rows["oracle"].nfe, rows["(exact)"].nfe) == (2, 200, 0)
    assert rows["reward"].note.startswith("does not apply")
    assert math.isnan(rows["reward"].distance)
    assert rows["infinite"].note == f"diverged: {n} of {n} samples lost"


def test_table_prints_and_repeats():
    def make() -> str:
        return str(
            verify(
                [Draw(), Oracle(num_steps=5)],
                num_samples=50,
                progress=False,
                targets=[gaussian_2d()],
            )
        )

    text = make()
    assert text == make()
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 4
    assert [part.strip() for part in lines[0].split("|")][1:9] == [
        "target", "solver", "mean error", "std ratio", "(range)", "SW1", "floor", "NFE",
    ]  # fmt: skip
    table = verify([Draw()], [gaussian_2d()], num_samples=50, progress=False)
    assert table.row("Draw", "gaussian-2d").samples == 50
    with pytest.raises(InputError, match="no row for solver 'x'"):
        table.row("x", "gaussian-2d")


def test_verify_errors_and_defaults():
    with pytest.raises(InputError, match="Two solvers are named 'Draw'"):
        verify([Draw(), Draw(move=1.0)])
    with pytest.raises(InputError, match="at least 2"):
        verify([Draw()], num_samples=1)
    names = [target.name for target in standard_targets()]
    assert len(set(names)) == len(names) == 4


# ---- black boxes


def planes() -> list[TiltedPlane]:
    return [target for target in black_box_targets() if isinstance(target, TiltedPlane)]


def test_tilted_planes_are_prior_times_exp_reward():
    """Against importance sampling of the prior: self-normalised means of x, |x|^2 and the reward."""
    for target in planes():
        x = three_blobs().sample(200_000, seed=3)
        tilt = target.reward(x).softmax(0)
        law = target.sample(50_000, seed=4)
        for moment in (lambda x: x[:, 0], lambda x: x.square().sum(1), target.reward):
            # Effective sizes are above 20 000: five standard errors of values with spread below 4 are 0.14.
            assert float(moment(law).mean()) == pytest.approx(float(tilt @ moment(x)), abs=0.14)
        assert float(target.reward(law).mean()) == pytest.approx(target.expected, abs=0.05)


def test_total_variation_of_known_laws():
    target = planes()[0]
    n = 20_000
    equal = torch.full((n,), 1 / n).double()
    exact = target.sample(n, seed=1)
    # Between a histogram of n exact samples and the truth: sum of E|error| / 2 = sum sqrt(p (1 - p) / (2 pi n)).
    p = target._exact
    floor = float((p * (1 - p) / (2 * math.pi * n)).sqrt().sum())
    assert target.distance(exact, equal) == pytest.approx(floor, rel=0.35)
    # All mass in one cell, then all of it outside the grid.
    assert target.distance(torch.tensor([[0.5, 0.5]]), torch.ones(1)) == pytest.approx(
        1 - float(p[6 * 12 + 6])
    )
    assert target.distance(torch.full((3, 2), 50.0), torch.full((3,), 1 / 3)) > 0.999
    # Weights are what makes samples of the prior right.
    draws = target.prior.sample(n, seed=2)
    assert target.distance(draws, equal) > 0.5
    assert target.distance(draws, target.reward(draws).softmax(0)) < 0.05


def test_unweighted_copies_by_weight():
    x = torch.arange(4.0)[:, None]
    assert unweighted(x, torch.tensor([0.5, 0.0, 0.25, 0.25])).flatten().tolist() == [0, 0, 2, 3]
    assert unweighted(x, torch.full((4,), 0.25)) is x


def test_hidden_operators_are_black_boxes():
    target = HiddenPosterior(mixture_25())
    problem = target.problem()
    assert not problem.differentiable
    assert not problem.linear
    x = torch.randn(1, 8, dtype=torch.float64).requires_grad_()
    assert not problem.evaluate(x)[0].requires_grad
    # E[log p(y | x)] over the posterior, in closed form: Gaussian algebra for each component.
    posterior, inner = target.target.posterior, target.target
    assert isinstance(posterior, GaussianMixture)
    assert isinstance(inner.operator, MatrixOperator)
    A = inner.operator.matrix
    square = (inner.y - posterior.means @ A.mT).square().sum(1)
    square = square + (A @ posterior.covariance @ A.mT).trace()
    exact = -0.5 * float(posterior.weights @ square) / inner.sigma_y**2
    # 20 000 samples of a quantity with spread of about 0.7 and, rarely, far modes.
    assert target.expected == pytest.approx(exact, abs=0.05)


@dataclass(frozen=True)
class Weighted(Draw, EnsembleSolver[DrawState]):
    """The prior's own draws, weighted by the likelihood: right only where weights are used."""

    requires: ClassVar[Requires] = Requires(gradient=False)
    ensemble_size: int = 1500
    ignore: bool = False

    def init(self, problem: Problem, noise: Noise) -> DrawState:
        assert isinstance(problem.prior, Gaussian)
        root = torch.linalg.cholesky(problem.prior.covariance)
        return DrawState(problem.prior.mean + noise("x") @ root.mT)

    def log_weights(self, state: DrawState) -> Tensor | None:
        return None if self.ignore else -0.5 * ((1.5 - state.x[:, 0]) / 0.3) ** 2


@pytest.mark.slow
def test_weights_are_used_by_both_tables():
    solvers = {"weighted": Weighted(), "ignored": Weighted(ignore=True)}
    first = verify(solvers, [gaussian_2d()], num_samples=1500, progress=False)
    second = verify_black_box(solvers, [HiddenPosterior(gaussian_2d())], 1500, progress=False)
    # The chi2 check of the driver drops prior draws far from y, which weigh nothing.
    for table, target in ((first, "gaussian-2d"), (second, "hidden gaussian-2d")):
        good, bad = table.row("weighted", target), table.row("ignored", target)
        assert good.distance < 4 * good.floor
        assert bad.distance > 10 * bad.floor


def test_black_box_table_tells_right_from_wrong():
    solvers = [
        Unconditional(20),
        FeynmanKac(30, ensemble_size=7),
        SCG(20, num_candidates=4),
        Draw(),
    ]
    target = planes()[2]
    table = verify_black_box(solvers[1:3], [target], 300, progress=False)
    rows = {row.solver: row for row in table.rows}
    assert list(rows) == ["(exact)", "(prior)", "FeynmanKac", "SCG"]
    assert {row.samples for row in table.rows} == {300}  # whatever the ensemble size was
    assert rows["(exact)"].distance < 1.5 * rows["(exact)"].floor
    assert rows["FeynmanKac"].distance < 2 * rows["FeynmanKac"].floor
    assert rows["(prior)"].distance > 3 * rows["(prior)"].floor
    assert rows["SCG"].log_target > rows["(prior)"].log_target + 1
    assert (rows["FeynmanKac"].nfe, rows["SCG"].nfe) == (30, 1 + 19 * 4)
    # FeynmanKac looks 7 times with 8 draws, and once at the end.
    assert rows["FeynmanKac"].calls == pytest.approx(57, abs=0.01)
    assert rows["SCG"].calls == pytest.approx(19 * 4, abs=0.01)
    assert [is_black_box(solver) for solver in solvers] == [False, True, True, True]
    text = str(table)
    assert text == str(verify_black_box(solvers[1:3], [target], 300, progress=False))
    assert len({len(line) for line in text.splitlines()}) == 1


def test_black_box_table_leaves_out_what_cannot_run():
    solvers = {"reward": NeedsReward(), "likelihood": Draw(), "lost": Draw(blow_up=True)}
    hidden = HiddenPosterior(gaussian_2d())
    table = verify_black_box(solvers, [planes()[1], hidden], 20, progress=False)
    names = [(row.target, row.solver) for row in table.rows]
    assert names == [
        *[("indicator", name) for name in ("(exact)", "(prior)", "reward")],
        *[(hidden.name, name) for name in ("(exact)", "(prior)", "likelihood", "lost")],
    ]
    assert table.row("lost", hidden.name).note == "diverged: 20 of 20 samples lost"
    assert math.isnan(table.row("lost", hidden.name).distance)
    with pytest.raises(InputError, match="at least 2"):
        verify_black_box([Draw()], num_samples=1)


@pytest.mark.slow
def test_conformance_prints_what_was_asked_for():
    few = {"num_samples": 10, "ensemble_size": 10}
    first, second = conformance([HQS(2), SCG(2)], **few)
    assert {row.solver for row in first.rows} == {"(exact)", "(prior)", "HQS"}
    assert {row.solver for row in second.rows} == {"(exact)", "(prior)", "SCG", "SCG softmax"}
    assert {row.target for row in second.rows} == {t.name for t in black_box_targets()}
    (only,) = conformance([SCG(2)], ["hidden mixture-25 d=80 dy=1"], **few)
    assert {row.solver for row in only.rows} == {"(exact)", "(prior)", "SCG", "SCG softmax"}
    (only,) = conformance([SCG(2)], ["gaussian-2d"], **few)
    assert {row.solver for row in only.rows} == {"(exact)", "(prior)", "SCG"}
    with pytest.raises(InputError, match="did you mean 'staircase'"):
        conformance([SCG(2)], ["stairs"])
