"""EnKG: identities, golden numbers of independent implementations, failed members, planted bugs.

Golden numbers are those of a numpy implementation on two Gaussian toys (two correlated coordinates, the first one
measured; 64 coordinates with variances 1/k, 32 random projections).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from invguide import solve
from invguide.blackbox import BlackBox
from invguide.driver import run
from invguide.errors import CompatibilityError, DivergenceError, InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.sampling import ensemble, particles
from invguide.schedule import make_sigmas
from invguide.solvers import EnKG, Unconditional, enkg
from invguide.verify.distances import sliced_wasserstein
from invguide.verify.targets import Target, gaussian_2d, gaussian_64d, mixture_25

ONE_STEP: dict[str, Any] = {
    "num_steps": 3,
    "schedule": (2.0, 1.5, 1.0, 0.0),
    "window": (0, 1),
    "rollout_max": 1,
    "ensemble_size": 20,
}
QUICK = EnKG(num_steps=20, ensemble_size=48, rollout_max=4)
RELEASED = EnKG(
    num_steps=80,
    correction="normalized",
    guidance_scale=2.0,
    num_updates=2,
    window=(0.05, 0.95),
    rollout_divisor=4,
    schedule=tuple(make_sigmas("karras", 80, 0.002, 80.0).tolist()),
)


@pytest.fixture(scope="module")
def small() -> Target:
    return gaussian_2d()


@pytest.fixture(scope="module")
def large() -> Target:
    return gaussian_64d()


def ensemble_of(solver: EnKG, problem: Problem, seed: int = 0, **options: Any) -> Tensor:
    return run(solver, problem, seed=seed, progress=False, **options).samples[0]


def relative_error(samples: Tensor, target: Target) -> float:
    mean = target.posterior.mean
    return float((samples.mean(0) - mean).norm() / mean.norm())


def misfit(samples: Tensor, target: Target) -> float:
    residual = (target.y - target.operator(samples)) / target.sigma_y
    return float(residual.square().mean().sqrt())


# ---- identities


def test_one_step_is_the_dense_kalman_step_on_the_roll_out(large: Target) -> None:
    """Roll-out of one step: Phi is the denoiser, which is affine for a Gaussian, so the move is known in full."""
    assert _step_error(EnKG(**ONE_STEP), large) < 1e-10


def test_a_linear_map_keeps_its_promises(large: Target) -> None:
    """The second update of a step finds the residuals that the first one promised: nobody is resampled."""
    twice = {**ONE_STEP, "num_updates": 2, "ensemble_size": 40}
    problem = large.problem().rows(torch.zeros(40, dtype=torch.long))
    noise = Noise(3, tuple((0, j) for j in range(40)), (64,), torch.float64)
    start = enkg.EnKGState(
        1.5 * noise("start"), noise("start"), torch.full((40,), enkg.UNKNOWN).double()
    )
    ends = [
        EnKG(**twice, ess_threshold=threshold).step(problem, start, 1, noise.at(1))[0]
        for threshold in (0.9, 1.0)
    ]
    promised = ends[0].expected
    residuals = problem.whitened(problem.denoise(_before(ends[0], problem), 1.5))
    assert (residuals.square().sum(1) / promised - 1).abs().max() < 1e-10
    assert torch.equal(ends[0].x, ends[1].x)
    assert (ends[1].expected == enkg.UNKNOWN).all()


def _before(state: enkg.EnKGState, problem: Problem) -> Tensor:
    """x before the Euler step from 1.5 to 1.0 of `ONE_STEP`: x_b = D + (x - D) / 1.5."""
    return state.denoised + (state.x - state.denoised) * 1.5


def _step_error(solver: EnKG, target: Target) -> float:
    """Error of D(x) after the guided step from level 1.5, relative to the size of the move."""
    rows = tuple((0, j) for j in range(solver.ensemble_size))
    problem = target.problem().rows(torch.zeros(len(rows), dtype=torch.long))
    noise = Noise(3, rows, (64,), torch.float64)
    x = 1.5 * noise("start")
    state, _ = solver.step(
        problem, enkg.EnKGState(x, x, torch.full((len(x),), enkg.UNKNOWN)), 1, noise.at(1)
    )
    jacobian = problem.prior.denoise(
        torch.eye(64).double(), 1.5
    )  # of a zero-mean Gaussian, symmetric
    matrix = target.operator.matrix @ jacobian / target.sigma_y  # type: ignore[operator]
    residuals = target.y / target.sigma_y - x @ matrix.mT
    centred = x - x.mean(0)
    covariance = centred.mT @ centred / len(x)
    system = matrix @ covariance @ matrix.mT + 2 * torch.eye(32).double()  # half of the weight
    wanted = residuals + 2**0.5 * noise.at(1)("perturbation 0", (32,))
    moved = x + wanted @ torch.linalg.solve(system, matrix @ covariance)
    return float((state.denoised - moved @ jacobian).norm() / (moved - x).norm())


def test_permuted_members_give_the_permuted_ensemble(large: Target) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    problem = large.problem().rows(torch.zeros(16, dtype=torch.long))
    ends = []
    for members in (torch.arange(16), order):
        noise = Noise(0, tuple((0, int(j)) for j in members), (64,), torch.float64)
        solver = replace(QUICK, ensemble_size=16, num_steps=6)
        state = solver.init(problem, noise)
        for k in range(solver.num_steps):
            state, _ = solver.step(problem, state, k, noise.at(k))
        ends.append(state.denoised)
    assert (ends[0][order] - ends[1]).abs().max() < 1e-8  # sums in another order


@pytest.mark.parametrize(("members", "batch"), [(100, 64), (48, 64), (48, 7)])
def test_network_batches_lose_no_member(members: int, batch: int, large: Target) -> None:
    solver = replace(QUICK, ensemble_size=members)
    whole = ensemble_of(solver, large.problem(), batch_size=members)
    parts = ensemble_of(solver, large.problem(), batch_size=batch)
    assert (parts.std(1) > 0.05).all()
    assert (whole - parts).abs().max() < 1e-8


def test_without_guidance_it_is_the_probability_flow(large: Target) -> None:
    vague = replace(large, sigma_y=10.0)  # the driver takes samples that contradict y for diverged
    ours = ensemble_of(replace(QUICK, guidance_scale=0.0), vague.problem())
    flow = run(Unconditional(20, eta=0.0), vague.problem(), 48, progress=False)
    assert (ours - flow.samples[0]).abs().max() < 1e-10
    assert flow.nfe == 20


def _scaled(target: Target, factor: float) -> Problem:
    class Scaled(Operator):
        def forward(self, x: Tensor) -> Tensor:
            return factor * target.operator(x)

    return Problem(target.prior, Likelihood(Scaled(), factor * target.y, factor * target.sigma_y))


def test_units_cancel(large: Target) -> None:
    for solver in (QUICK, replace(QUICK, correction="normalized")):
        plain = ensemble_of(solver, _scaled(large, 1.0))
        assert (plain - ensemble_of(solver, _scaled(large, 1e3))).abs().max() < 1e-6


def test_the_normalised_step_knows_no_noise_level(large: Target) -> None:
    solver = replace(QUICK, correction="normalized")
    other = replace(large, sigma_y=100 * large.sigma_y)
    assert (
        ensemble_of(solver, large.problem()) - ensemble_of(solver, other.problem())
    ).abs().max() < 1e-6


def test_calls_are_those_of_the_released_settings() -> None:
    """1588 network and 142 forward calls per member (published configuration); the driver adds a last one."""
    members, solver = 4, replace(RELEASED, ensemble_size=4)
    calls = run(solver, gaussian_2d().problem(), progress=False, on_nonfinite="drop").manifest
    assert calls["network_calls"] == 1588 * members
    guided = sum(RELEASED.guided(k) for k in range(80)) * 2
    assert guided == 142
    assert guided * members <= calls["forward_calls"] <= (guided + 1) * members + 1


@pytest.mark.parametrize("decay", [1.0, 0.2])
def test_the_weights_of_all_updates_add_up(decay: float) -> None:
    solver = replace(QUICK, guidance_scale=1.7, num_updates=3, decay=decay)
    steps = [k for k in range(20) if solver.guided(k)]
    assert 3 * sum(solver.strength(k) for k in steps) == pytest.approx(1.7)
    assert solver.strength(steps[-1]) <= solver.strength(steps[0])


# ---- exact posteriors and golden numbers


def test_kalman_is_exact_for_a_gaussian(small: Target) -> None:
    """1000 members: mean to 0.06, ratio to 0.1, of which the 50 Euler steps and their roll-outs take most."""
    samples = ensemble_of(EnKG(ensemble_size=1000), small.problem())
    error = samples.mean(0) - small.posterior.mean
    ratio = samples.std(0) / small.posterior.std
    assert error.abs().max() < 0.06
    assert (ratio - 1).abs().max() < 0.1


def _three_numbers_of_six_unknowns(solver: EnKG, sigma_y: float, dtype: torch.dtype):
    """chi2, errors in posterior deviations of the mean, and least and largest ratio of deviations."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    truth, noise = (torch.randn(1, n, generator=generator, dtype=torch.float64) for n in (6, 3))
    y = truth @ matrix.mT + sigma_y * noise
    precision = torch.eye(6).double() + matrix.mT @ matrix / sigma_y**2
    mean = torch.linalg.solve(precision, matrix.mT @ y[0]) / sigma_y**2
    box = BlackBox(lambda x: x @ matrix.numpy().T)
    prior = Gaussian(torch.zeros(6).double(), torch.eye(6).double())
    found = solve(
        y,
        box,
        prior,
        sigma_y=sigma_y,
        shape=(6,),
        solver=solver,
        seed=0,
        dtype=dtype,
        progress=False,
    )
    samples = found.samples[0].double()
    root = torch.linalg.cholesky(precision)
    spread = torch.linalg.eigvalsh(root.mT @ torch.cov(samples.mT) @ root).sqrt()
    chi2 = ((y - samples @ matrix.mT) / sigma_y).square().mean()
    return float(chi2), (root.mT @ (samples.mean(0) - mean)).abs(), spread


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sigma_y", [0.1, 0.03, 0.01, 0.003, 0.001])
def test_any_noise_of_a_small_exact_problem(sigma_y: float, dtype: torch.dtype) -> None:
    """128 members: deviations of a sampled covariance lie within 1 +- sqrt(6 / 128), and as much again for the
    covariances that the gains took; the mean within 4 / sqrt(128), likewise doubled; chi2 near that of the noise."""
    chi2, errors, spread = _three_numbers_of_six_unknowns(EnKG(), sigma_y, dtype)
    assert 0.7 < chi2 < 1.4
    assert errors.max() < 8 / 128**0.5
    assert spread.min() > 1 - 2 * (6 / 128) ** 0.5
    assert spread.max() < 1 + 2 * (6 / 128) ** 0.5


def test_planted_rough_roll_outs_are_caught() -> None:
    """Promises of longer steps than the run takes are not kept: the misfit grows as 1 / sigma_y."""
    rough = EnKG(num_steps=50, rollout_divisor=3, rollout_max=20)
    assert _three_numbers_of_six_unknowns(rough, 0.01, torch.float64)[0] > 10


def test_golden_numbers_of_two_coordinates(small: Target) -> None:
    """Released step of size 0.1: errors (0.09, 0.23), ratios (0.02, 0.76); they scatter by 0.05 between seeds."""
    solver = replace(RELEASED, guidance_scale=0.1, num_updates=1, ensemble_size=200)
    samples = ensemble_of(solver, small.problem())
    error = samples.mean(0) - small.posterior.mean
    ratio = samples.std(0) / small.posterior.std
    assert error.tolist() == pytest.approx([0.09, 0.23], abs=0.1)
    assert ratio.tolist() == pytest.approx([0.02, 0.76], abs=0.05)


def test_the_released_size_overshoots_and_collapses(small: Target) -> None:
    """Size 2: error 0.17 of the measured coordinate, 2.2 and more of the other one; ratios (0, 0.06)."""
    solver = replace(RELEASED, ensemble_size=200)
    samples = ensemble_of(solver, small.problem(), on_nonfinite="drop")
    error = samples.mean(0) - small.posterior.mean
    assert float(error[0]) == pytest.approx(0.17, abs=0.05)
    assert float(error[1].abs()) > 1
    assert (samples.std(0) / small.posterior.std).tolist() == pytest.approx([0.0, 0.06], abs=0.05)


def test_golden_numbers_of_64_coordinates(large: Target) -> None:
    """512 members, relative error of the mean: Kalman 0.18 to 0.24, released step of size 0.5 0.35."""
    kalman = ensemble_of(EnKG(ensemble_size=512), large.problem())
    assert relative_error(kalman, large) < 0.24
    assert 0.83 < (kalman.std(0) / large.posterior.std).log().mean().exp() < 1.0
    assert 0.7 < misfit(kalman, large) < 1.2
    gentle = replace(RELEASED, guidance_scale=0.5, num_updates=1, ensemble_size=512)
    assert relative_error(ensemble_of(gentle, large.problem()), large) == pytest.approx(
        0.35, abs=0.08
    )


def test_more_members_are_closer_and_wider(large: Target) -> None:
    solver = replace(QUICK, num_steps=30)
    sizes = (32, 128, 512)
    ends = [ensemble_of(replace(solver, ensemble_size=n), large.problem()) for n in sizes]
    errors = [relative_error(x, large) for x in ends]
    spreads = [float((x.std(0) / large.posterior.std).log().mean().exp()) for x in ends]
    print(errors, spreads)
    assert errors[0] > errors[1] > errors[2]
    assert spreads[0] < spreads[1] < spreads[2] < 1.05


def test_perturbation_and_inflation_keep_the_spread(large: Target) -> None:
    def spread(solver: EnKG) -> float:
        x = ensemble_of(solver, large.problem())
        return float((x @ large.operator.matrix.mT).std(0).mean())  # type: ignore[operator]

    assert spread(replace(QUICK, perturb=False)) < spread(QUICK)
    assert spread(QUICK) < spread(replace(QUICK, inflation=1.02))


# ---- failed members


class Fragile(Operator):
    """The target's operator as a black box that fails where told to."""

    differentiable = False

    def __init__(self, target: Target, fails: Any) -> None:
        super().__init__()
        self.target, self.fails, self.calls = target, fails, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.target.operator(x)
        y[self.fails(x, self.calls)] = float("nan")
        self.calls += 1
        return y


def _one(x: Tensor, call: int) -> Tensor:
    return torch.arange(len(x)) == 5


def _fifth(x: Tensor, call: int) -> Tensor:
    return torch.rand(len(x), generator=torch.Generator().manual_seed(call)) < 0.2


@pytest.mark.parametrize("fails", [_one, _fifth], ids=["one member", "20 percent at random"])
def test_failures_change_less_than_the_seed(fails: Any, large: Target) -> None:
    solver = replace(QUICK, ensemble_size=128)
    means = torch.stack([ensemble_of(solver, large.problem(), seed=s).mean(0) for s in range(4)])
    broken = Problem(large.prior, Likelihood(Fragile(large, fails), large.y, large.sigma_y))
    samples = ensemble_of(solver, broken)
    assert torch.isfinite(samples).all()
    between = torch.cdist(means, means)[~torch.eye(4, dtype=torch.bool)].mean()
    change = (samples.mean(0) - means[0]).norm()
    print(f"change {change:.3f}, between seeds {between:.3f}")
    assert change < 0.5 * between, f"{change:.2f} changed, {between:.2f} between seeds"


def test_a_simulator_that_raises(large: Target) -> None:
    def simulate(x: Tensor) -> Tensor:
        if x[0] > 0.1:
            raise RuntimeError("did not converge")
        return large.operator(x[None])[0]

    plain = ensemble_of(QUICK, large.problem())
    box = BlackBox(simulate, retries=0, max_failed=0.9, shape=(64,))
    problem = Problem(large.prior, Likelihood(box, large.y, large.sigma_y))
    samples = ensemble_of(QUICK, problem)
    assert torch.isfinite(samples).all()
    other = ensemble_of(QUICK, large.problem(), seed=1)
    assert box.ledger.failures > 10
    assert (samples.mean(0) - plain.mean(0)).norm() < (other - plain).mean(0).norm()


def test_a_simulator_that_always_fails_is_an_error(large: Target) -> None:
    broken = Fragile(large, lambda x, call: torch.arange(len(x)) > 0)
    problem = Problem(large.prior, Likelihood(broken, large.y, large.sigma_y))
    with pytest.raises(DivergenceError, match="1 of 48 members of the ensemble survived"):
        ensemble_of(QUICK, problem)


# ---- planted bugs: each of the checks above notices


class WrongSign(EnKG):
    def _update(self, problem, x, *rest):
        moved, *others = super()._update(problem, x, *rest)
        return 2 * x - moved, *others


class NextLevel(EnKG):
    """Off by one: the roll-out starts at the level that the step leads to."""

    def rollout_levels(self, problem, k):
        return super().rollout_levels(problem, k + 1)


class WholeWeight(EnKG):
    """Every step takes the whole likelihood, which is then counted as often as there are steps."""

    def strength(self, k: int) -> float:
        return 2 * super().strength(k)


@pytest.mark.parametrize("bug", [WrongSign, NextLevel, WholeWeight])
def test_planted_bugs_in_a_step_are_caught(bug: type[EnKG], large: Target) -> None:
    error = _step_error(bug(**ONE_STEP), large)
    print(error)
    assert error > 1e-3


def test_planted_covariance_of_failed_members_is_caught(monkeypatch, large: Target) -> None:
    """Zeros in place of failed predictions: the change exceeds that between seeds, which the test above asks for."""
    real = ensemble.correct

    def zeros(
        x: Tensor, residuals: Tensor, innovations: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        return real(x, residuals.nan_to_num(), innovations.nan_to_num(), *rest, **more)

    monkeypatch.setattr(enkg, "correct", zeros)
    with pytest.raises(AssertionError, match="between"):
        test_failures_change_less_than_the_seed(_fifth, large)


def test_planted_lost_remainder_is_caught(monkeypatch, large: Target) -> None:
    real = ensemble.roll_out

    def forgets(problem: Problem, x: Tensor, *rest: Any) -> Tensor:
        x0 = real(problem, x, *rest)
        x0[len(x) // 64 * 64 :] = 0.0
        return x0

    solver = replace(QUICK, ensemble_size=100)
    whole = ensemble_of(solver, large.problem())
    monkeypatch.setattr(enkg, "roll_out", forgets)
    parts = ensemble_of(solver, large.problem(), on_nonfinite="drop")
    assert not torch.allclose(parts, whole, atol=0.1)


# ---- a small cell of the mixture benchmark, and bad input


@pytest.mark.slow
def test_mixture_as_a_black_box() -> None:
    """Sliced W1 on two instances, far below the prior's and the normalised step's at the same network calls."""
    ours, released, prior = 0.0, 0.0, 0.0
    for seed in (1, 4):
        target = mixture_25(8, 4, seed)
        problem = Problem(
            target.prior,
            Likelihood(
                Fragile(target, lambda x, call: torch.zeros(len(x), dtype=torch.bool)),
                target.y,
                target.sigma_y,
            ),
        )
        exact = target.posterior.sample(200, seed=9)
        solver = EnKG(ensemble_size=200)
        ours += sliced_wasserstein(ensemble_of(solver, problem), exact)
        inversebench = replace(
            RELEASED,
            ensemble_size=200,
            num_steps=50,
            window=(0, 1),
            rollout_divisor=8,
            schedule="karras",
        )
        released += sliced_wasserstein(
            ensemble_of(inversebench, problem, on_nonfinite="drop").nan_to_num(), exact
        )
        prior += sliced_wasserstein(target.prior.sample(200, seed=8), exact)
    print(ours, released, prior)
    assert ours < 0.5 * released < 0.5 * prior


def _distance_of_modes(solver: EnKG) -> float:
    """Sliced W1 over three instances with one measurement, which several far modes explain to different degrees."""
    total = 0.0
    for seed in (0, 1, 4):
        target = mixture_25(8, 1, seed)
        samples = ensemble_of(solver, target.problem(), on_nonfinite="drop")
        total += sliced_wasserstein(samples, target.posterior.sample(300, seed=9))
    return total


def test_modes_are_weighed() -> None:
    """Resampling by what the linearisation missed takes two thirds of the error away."""
    solver = EnKG(ensemble_size=300)
    weighed, moved = (_distance_of_modes(s) for s in (solver, replace(solver, ess_threshold=1)))
    print(weighed, moved)
    assert weighed < 0.5 * moved


def test_planted_sign_of_the_weights_is_caught(monkeypatch) -> None:
    monkeypatch.setattr(enkg, "flattened", lambda w, threshold: particles.flattened(-w, threshold))
    with pytest.raises((AssertionError, DivergenceError)):
        test_modes_are_weighed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble_size": 1}, "ensemble_size is 1; expected a whole number of at least 2"),
        ({"ess_threshold": 0.0}, "ess_threshold is 0.0; expected a number above 0 and at most 1"),
        ({"correction": "kalmann"}, "correction is 'kalmann'; did you mean 'kalman'"),
        ({"window": (0.5, 0.5)}, "window is"),
        ({"num_steps": 1}, "none of num_steps=1 is inside"),
        ({"num_updates": 0}, "num_updates is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"inflation": 0.9}, "inflation is 0.9"),
    ],
)
def test_constructor_validates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnKG(**options)


def test_a_reward_alone_is_refused(small: Target) -> None:
    problem = Problem(small.prior, reward=as_reward(lambda x: x.sum(1)))
    with pytest.raises(CompatibilityError, match="needs a measurement"):
        run(QUICK, problem, progress=False)
