"""DPSZerothOrder: the estimators against their exact moments, DPS as its limit, failures, and planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.operators import HDR, Identity
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.sampling import zeroth_order as candidates
from invguide.sampling.step_size import open_variance
from invguide.sampling.zeroth_order import Slope, fit_parabola
from invguide.solver import Solver
from invguide.solvers import DPS, DPSZerothOrder, Unconditional, dps_zeroth_order
from invguide.solvers.dps_zeroth_order import central_slope, forward_slope
from invguide.verify.targets import Target, gaussian_2d

F64 = torch.float64
Estimator = Callable[[Tensor, Tensor, float], Slope]


@pytest.fixture(scope="module")
def target() -> Target:
    return gaussian_2d()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def around(
    f: Callable[[Tensor], Tensor], x0: Tensor, u: Tensor, width: float, kind: str
) -> Tensor:
    """Values of f at the candidates of x0, as the solver asks for them."""
    signs = torch.cat([u, -u], 1) if kind == "central" else u
    return f(x0 + width * signs)


ESTIMATORS = {"forward": forward_slope, "central": central_slope}


# ---- the estimators


def moments(kind: str, estimator: Estimator, q: int = 12, d: int = 20) -> tuple[float, float]:
    """Squared error of the mean over |c|^2, and total variance over its exact value, for a linear function c x."""
    rows, width = 4000, 0.3
    c = normals(d, seed=1)
    u = normals(rows, q // 2 if kind == "central" else q, d)
    values = around(lambda x: x @ c + 5.0, normals(d, seed=2), u, width, kind)
    slope, directions = estimator(values, u, width)
    exact = (d + 1) * c.square().sum() / directions[0]
    error = (slope.mean(0) - c).square().sum() / c.square().sum()
    return error.item(), (slope.var(0).sum() / exact).item()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_linear_function_is_unbiased_with_the_exact_variance(kind: str) -> None:
    """q candidates are q - 1 directions (forward, one is spent on the mean) or q / 2 (central)."""
    error, variance = moments(kind, ESTIMATORS[kind])
    # The mean of 4000 is off by 21 / (4000 n) |c|^2 on average: 0.0005 for n = 11, 0.0009 for n = 6, here with a
    # margin of 2.5 (its relative scatter is sqrt(2 / 20)). A variance from 4000 x 20 numbers is good to about 2 %.
    assert error < 2.5 * 21 / (4000 * (11 if kind == "forward" else 6))
    assert variance == pytest.approx(1.0, abs=0.05)


def wrong_count(values: Tensor, u: Tensor, width: float) -> Slope:
    slope, directions = forward_slope(values, u, width)
    return Slope(slope * directions[0] / values.shape[1], directions)


def no_mean(values: Tensor, u: Tensor, width: float) -> Slope:
    count = torch.full((len(u),), u.shape[1] - 1)
    return Slope(torch.einsum("bk,bkd->bd", values, u) / (count[:, None] * width), count)


def same_sign(values: Tensor, u: Tensor, width: float) -> Slope:
    plus, minus = values.chunk(2, 1)
    return central_slope(torch.cat([plus, plus + (plus - minus)], 1), u, width)


@pytest.mark.parametrize(
    ("kind", "bug"), [("forward", wrong_count), ("forward", no_mean), ("central", same_sign)]
)
def test_planted_mistakes_in_the_estimators_are_caught(kind: str, bug: Estimator) -> None:
    error, variance = moments(kind, bug)
    assert error > 0.005 or abs(variance - 1) > 0.1


@pytest.mark.parametrize(("count", "reference"), [(64, 0.15), (1024, 0.57), (10000, 0.92)])
def test_cosine_to_the_true_slope(count: int, reference: float) -> None:
    """1 / sqrt(1 + d / q'), and the figures that others measured at d = 1000 by central differences."""
    d = 1000
    c, u = normals(d, seed=1), normals(1, count // 2, d)
    values = around(lambda x: x @ c, torch.zeros(d, dtype=F64), u, 0.01, "central")
    slope = central_slope(values, u, 0.01).slope[0]
    cosine = (slope @ c / (slope.norm() * c.norm())).item()
    # One draw scatters by 1 / sqrt(d) = 0.03.
    assert cosine == pytest.approx((1 + d / (count / 2)) ** -0.5, abs=0.07)
    assert cosine == pytest.approx(reference, abs=0.07)


def test_central_differences_do_not_see_curvature() -> None:
    """A large curvature that all candidates share swamps differences from f(D), and neither of ours."""
    d, width = 20, 0.5
    c, u = normals(d, seed=1), normals(1, 2000, d)

    def curved(x: Tensor) -> Tensor:
        return x @ c - 50 * x.square().sum(-1)

    zero = torch.zeros(d, dtype=F64)
    central = central_slope(around(curved, zero, u, width, "central"), u, width).slope[0]
    forward = forward_slope(around(curved, zero, u, width, "forward"), u, width).slope[0]
    from_d = torch.einsum("k,kd->d", curved(width * u[0]), u[0]) / (len(u[0]) * width)
    # The curvature adds width^2 50 (chi-square with d degrees: mean d, deviation sqrt(2 d)) to each rise.
    assert (central - c).norm() < 0.15 * c.norm()
    assert 2 * (forward - c).norm() < (from_d - c).norm()


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_failed_candidates_are_left_out(kind: str) -> None:
    u = normals(1, 8, 5)
    values = normals(1, 16 if kind == "central" else 8, seed=3)
    lost = [1, 6]
    kept = [i for i in range(8) if i not in lost]
    broken = values.clone()
    broken[0, lost[0]] = torch.nan
    broken[0, -2 if kind == "central" else lost[1]] = torch.inf  # the partner of candidate 6
    columns = kept + [8 + i for i in kept] if kind == "central" else kept
    expected = ESTIMATORS[kind](values[:, columns], u[:, kept], 0.1)
    found = ESTIMATORS[kind](broken, u, 0.1)
    assert torch.equal(found.directions, expected.directions)
    assert torch.allclose(found.slope, expected.slope, atol=1e-12)
    assert not ESTIMATORS[kind](torch.full_like(values, torch.nan), u, 0.1).slope.any()


# ---- the step along the estimate


def test_parabola_through_what_is_known() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=F64)
    heights = (3e3 + 7 * t - 11 * t**2).repeat(4, 1)
    heights[1, [0, 3]] = torch.nan
    heights[2, [1, 2]] = -torch.inf
    heights[3, 1:4] = torch.nan
    linear, drop = fit_parabola(t, heights)
    assert torch.allclose(linear, torch.tensor([7.0, 7, 7, 0], dtype=F64), atol=1e-8)
    assert torch.allclose(drop, torch.tensor([11.0, 11, 11, 1], dtype=F64), atol=1e-8)


def one_step(problem: Problem, solver: Solver[Any], x: Tensor) -> tuple[Any, Any]:
    """State and info after the first of two steps from x at level 2."""
    noise = Noise(0, tuple((0, s) for s in range(len(x))), tuple(x.shape[1:]), x.dtype)
    part = problem.repeat(len(x), 1)
    state = solver.init(part, noise)._replace(x=x)
    return solver.step(part, state, 0, noise.at(0))


LEVELS = (2.0, 1.0, 0.0)


def test_steep_rewards_move_no_farther_than_the_level_leaves_open(target: Target) -> None:
    """Without the bound, a slope of a million moves D by millions; a flat reward does not move it at all."""
    x = 2 * normals(50, 2)
    solver = DPSZerothOrder(2, schedule=LEVELS)
    for reward, moves in ((lambda x: 1e6 * x[:, 0], True), (lambda x: 0 * x[:, 0], False)):
        problem = Problem(target.prior, reward=as_reward(reward, differentiable=False))
        after, info = one_step(problem, solver, x)
        move = (after.denoised - target.prior.denoise(x, 2.0)).norm(dim=1)
        assert not info.unguided.any()
        bound = open_variance(problem, 2.0) ** 0.5 * (2**0.5 + 3)
        assert move.max() <= bound * (1 + 1e-9)
        assert (move.min() > 0.9 * bound) == moves
        assert moves or move.max() == 0


# ---- the limit of many candidates


@pytest.mark.parametrize("difference", ESTIMATORS)
def test_many_candidates_give_the_samples_of_dps(difference: str, target: Target) -> None:
    """The same noise, so sample by sample; the error falls like 1 / sqrt(candidates)."""
    dps = driver.run(DPS(20), target.problem(), 30, progress=False).samples
    errors = []
    for count in (64, 4096):
        solver = DPSZerothOrder(20, num_candidates=count, difference=difference)
        ours = driver.run(solver, target.problem(), 30, batch_size=30, progress=False).samples
        errors.append((ours - dps).square().mean().sqrt().item())
    # Posterior standard deviations are 0.29 and 0.41; sqrt(4096 / 64) = 8, which 30 samples see within a third.
    assert errors[1] < 0.02
    assert 5 < errors[0] / errors[1] < 13


def test_default_is_close_to_the_posterior(target: Target) -> None:
    """As close as DPS, whose bias it has: means within 0.06, spreads some percent off (300 samples add 4 %)."""
    result = driver.run(DPSZerothOrder(), target.problem(), 300, batch_size=300, progress=False)
    assert (result.samples[0].mean(0) - target.posterior.mean).abs().max() < 0.1
    ratio = result.samples[0].std(0) / target.posterior.std
    assert ratio.min() > 0.85
    assert ratio.max() < 1.1
    assert result.manifest["vjp_calls"] == result.manifest["network_calls"] == 300 * 100
    # Per step: D, the candidates, four points along the step; and one at the end, and one of a blank signal.
    assert result.manifest["forward_calls"] == 300 * (100 * (1 + 128 + 4) + 1) + 1


def wrong_sign(values: Tensor, u: Tensor, width: float) -> Slope:
    slope, directions = forward_slope(values, u, width)
    return Slope(-slope, directions)


def no_width(values: Tensor, u: Tensor, width: float) -> Slope:
    return forward_slope(values, u, width**2)


def test_step_against_dps_and_planted_mistakes(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step with many candidates is that of DPS; a wrong sign, width, or a missing chain rule is not."""
    x = 2 * normals(4, 2)
    solver = DPSZerothOrder(2, num_candidates=20000, schedule=LEVELS)
    expected = one_step(target.problem(), DPS(2, schedule=LEVELS), x)[0].x

    def error() -> float:
        return float((one_step(target.problem(), solver, x)[0].x - expected).abs().max())

    # The cosine is off by 1e-4, the direction by 1e-2; the shift of D is of order 1.
    assert error() < 0.03
    for bug in (wrong_sign, no_width):
        with monkeypatch.context() as patch:
            patch.setattr(dps_zeroth_order, "forward_slope", bug)
            assert error() > 0.05
    with monkeypatch.context() as patch:
        patch.setattr(
            dps_zeroth_order,
            "denoise_with_vjp",
            lambda problem, x, sigma: (problem.denoise(x, sigma), lambda slope: slope),
        )
        assert error() > 0.05


# ---- rows, gradients, failures


def run_in_batches(size: int) -> Tensor:
    prior = ig.priors.Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.5, 0.3])))
    y = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    problem = Problem(prior, Likelihood(Identity(), y, 0.2))
    solver = DPSZerothOrder(6, num_candidates=8)
    return driver.run(solver, problem, 3, batch_size=size, dtype=F64, progress=False).samples


def test_planted_bug_a_mean_over_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/solvers/test_contract.py asks of every solver: it sees a sum over all rows."""

    def coupled(values: Tensor, u: Tensor, width: float) -> Slope:
        return forward_slope(values / values.std(), u, width)

    monkeypatch.setattr(dps_zeroth_order, "forward_slope", coupled)
    assert (run_in_batches(1) - run_in_batches(6)).abs().max() > 1e-3


class NoGradients(Operator):
    """A simulator that refuses tensors with a history, as numpy code does."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        return torch.from_numpy(x.numpy()[:, :1].copy())

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2,)


def test_forward_model_is_called_without_gradients(target: Target) -> None:
    """Also on a machine where gradients are on; the answer is that of the same operator with a gradient."""
    ours = ig.solve(
        target.y,
        NoGradients(),
        target.prior,
        sigma_y=0.3,
        solver=DPSZerothOrder(5),
        progress=False,
    )
    same = driver.run(DPSZerothOrder(5), target.problem(), 1, progress=False)
    assert torch.allclose(ours.samples, same.samples, atol=1e-12)
    with torch.enable_grad():
        one_step(target.problem(), DPSZerothOrder(2, schedule=LEVELS), normals(3, 2))


class Fragile(Operator):
    """The first coordinate; fails (NaN) for this fraction of its inputs, whichever they are."""

    differentiable = False

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, x: Tensor) -> Tensor:
        fails = x.sum(1, keepdim=True).abs() * 1e3 % 1 < self.fraction
        return x[:, :1].masked_fill(fails, torch.nan)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2,)


def solve(target: Target, operator: Operator, seed: int = 0, **run) -> ig.Result:
    solver = DPSZerothOrder(run.pop("num_steps", 30), num_candidates=16)
    return ig.solve(
        target.y,
        operator,
        target.prior,
        sigma_y=0.3,
        solver=solver,
        seed=seed,
        progress=False,
        **run,
    )


def test_failures_now_and_then_change_little(target: Target) -> None:
    """A fifth of all calls fail: the samples move by less than two seeds differ, and explain y."""
    whole, other = (solve(target, Fragile(0.0), seed, num_samples=50) for seed in (0, 1))
    broken = solve(target, Fragile(0.2), num_samples=50)
    assert broken.finished.all()
    assert torch.isfinite(broken.samples).all()
    moved = (broken.samples - whole.samples).square().mean().sqrt()
    assert moved < 0.5 * (other.samples - whole.samples).square().mean().sqrt()
    # The mean of 50 samples of deviations 0.29 and 0.41 has standard errors of 0.04 and 0.06.
    assert ((broken.mean - whole.mean).abs() < torch.tensor([0.08, 0.12])).all()


def test_a_function_that_raises(target: Target) -> None:
    """As a black box, exceptions and all; the same samples as where the same inputs give NaN."""

    def first(x: np.ndarray) -> np.ndarray:
        if abs(float(x.sum())) * 1e3 % 1 < 0.2:
            raise RuntimeError("the mesh is tangled")
        return x[:1]

    box = ig.BlackBox(first, retries=0, max_failed=1.0, shape=(2,))
    ours = solve(target, box, num_steps=5, num_samples=2)
    same = solve(target, Fragile(0.2), num_steps=5, num_samples=2)
    assert 0.1 * box.ledger.calls < box.ledger.failures < 0.3 * box.ledger.calls
    assert torch.allclose(ours.samples, same.samples, atol=1e-9)


def test_without_survivors_the_step_is_unguided_and_counted(target: Target) -> None:
    y = target.y.expand(3, 1)
    likelihood = Likelihood(Fragile(1.1), y, 0.3)
    x = 2 * normals(3, 2)
    solver = DPSZerothOrder(2, num_candidates=4, schedule=LEVELS)
    after, info = one_step(Problem(target.prior, likelihood), solver, x)
    plain, _ = one_step(target.problem(), Unconditional(2, schedule=LEVELS), x)
    assert torch.equal(after.x, plain.x)
    assert info.unguided.all()
    assert info.failed.tolist() == [4, 4, 4]


def test_where_d_itself_fails_its_candidates_stand_in(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole of the simulator exactly at D: chi2 of the candidates is used, and the step hardly changes."""
    x = 2 * normals(4, 2)
    solver = DPSZerothOrder(2, num_candidates=512, smoothing=0.05, schedule=LEVELS)
    whole, _ = one_step(target.problem(), solver, x)
    evaluate = candidates.evaluate_each

    def with_a_hole(problem: Problem, points: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, chi2 = evaluate(problem, points)
        if points.shape[1] == 513:  # not the four along the step
            log_prob[:, 0] = chi2[:, 0] = torch.nan
        return log_prob, chi2

    monkeypatch.setattr(candidates, "evaluate_each", with_a_hole)
    holed, info = one_step(target.problem(), solver, x)
    assert info.log_prob.isnan().all()
    assert (holed.x - whole.x).abs().max() < 0.1 * (whole.x - x).abs().max()


def test_saturated_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """An over-exposed picture: the slope is zero where y is clipped, and steps without a bound leave the data."""
    prior, operator = ig.load_prior("natural-tiny"), HDR(2.0, pivot=0.5)
    ramp = torch.linspace(0.1, 0.9, 32).expand(1, 3, 32, 32)
    y = operator(ramp) + 0.03 * torch.randn(1, 3, 32, 32)

    def error() -> float:
        solver = DPSZerothOrder(20, num_candidates=48)
        result = ig.solve(
            y, operator, prior, sigma_y=0.03, solver=solver, num_samples=2, progress=False
        )
        return float((result.samples - ramp).square().mean().sqrt())

    assert error() < 0.2
    monkeypatch.setattr(candidates, "open_variance", lambda problem, a: 1e8)
    assert error() > 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"difference": "backward"}, "difference is 'backward'"),
        ({"num_candidates": 1}, "num_candidates is 1"),
        ({"num_candidates": 5, "difference": "central"}, "an even number"),
        ({"smoothing": 0.0}, "smoothing is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
    ],
)
def test_constructor_validates(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DPSZerothOrder(**settings)
