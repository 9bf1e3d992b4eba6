"""DPG: its estimator against the policy gradient by autograd and against true slopes, its running means, failures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.sampling.zeroth_order import Evaluated, Slope
from invguide.solvers import DPG, Unconditional, dpg
from invguide.solvers.dpg import policy_slope, running_temperature
from invguide.verify.targets import Target, gaussian_2d

F64 = torch.float64
LEVELS = (2.0, 1.0, 0.5, 0.0)
Estimator = Callable[[Tensor, Tensor, float, Tensor], Slope]


@pytest.fixture(scope="module")
def target() -> Target:
    return gaussian_2d()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- the estimator


def by_autograd(values: Tensor, at_d: float, n: Tensor, width: float, z: float) -> Tensor:
    """-Z grad_D mean_k (R_k - b_k) |x_k - D|^2 / (2 r^2) / mean R, as the paper writes it, sample by sample."""
    rewards = torch.exp((values - at_d) / z)
    baselines = torch.stack([(rewards.sum() - r) / (len(rewards) - 1) for r in rewards])
    denoised = torch.zeros_like(n[0]).requires_grad_()
    square = (width * n - denoised).square().flatten(1).sum(1)
    loss = ((rewards - baselines) * square / (2 * width**2)).mean()
    (gradient,) = torch.autograd.grad(loss, denoised)
    return -z * gradient / rewards.mean()


def paper_error(estimator: Estimator) -> float:
    n, values, z = normals(2, 6, 4), 3 * normals(2, 6, seed=1), torch.tensor([2.0, 5.0], dtype=F64)
    found = estimator(values, n, 0.3, z).slope
    expected = [by_autograd(values[b], 0.7, n[b], 0.3, z[b].item()) for b in range(2)]
    return float((found - torch.stack(expected)).abs().max())


def test_estimator_is_the_policy_gradient() -> None:
    assert paper_error(policy_slope) < 1e-12


def wrong_sign(values: Tensor, n: Tensor, width: float, temperature: Tensor) -> Slope:
    return policy_slope(-values, n, width, temperature)


def no_temperature(values: Tensor, n: Tensor, width: float, temperature: Tensor) -> Slope:
    return policy_slope(values, n, width, torch.ones_like(temperature))


def one_temperature(values: Tensor, n: Tensor, width: float, temperature: Tensor) -> Slope:
    return policy_slope(values, n, width, temperature.mean().expand(len(values)))


@pytest.mark.parametrize("bug", [wrong_sign, no_temperature, one_temperature])
def test_planted_mistakes_in_the_estimator_are_caught(bug: Estimator) -> None:
    assert paper_error(bug) > 1e-2


@pytest.mark.parametrize("d", [2, 8, 20])
def test_small_radius_gives_the_true_slope(d: int) -> None:
    """At r -> 0 it is the slope of f, whatever Z: cosine above 0.99 and the right length, from 1e5 candidates."""
    weights, centre = torch.linspace(1, 3, d, dtype=F64), normals(d, seed=1)
    n = normals(1, 100_000, d)
    values = -(weights * (1e-3 * n - centre) ** 2).sum(-1)
    slope = policy_slope(values, n, 1e-3, torch.tensor([4.0], dtype=F64)).slope[0]
    exact = 2 * weights * centre
    # sqrt(d / 1e5) is 0.014 at d = 20: the sine of the angle, and four times the relative scatter of the length.
    assert slope @ exact / (slope.norm() * exact.norm()) > 0.999
    assert slope.norm() / exact.norm() == pytest.approx(1.0, abs=0.02)


def test_wide_radius_gives_the_slope_of_the_smoothed_target() -> None:
    """log E exp(f / Z) of a Gaussian f is known in closed form: the curvature is that of Z / c + r^2."""
    width, z, c = 0.5, 2.0, 3.0
    n = normals(1, 200_000, 2)
    centre = torch.tensor([1.0, -0.5], dtype=F64)
    values = -0.5 * c * (width * n - centre).square().sum(-1)
    slope = policy_slope(values, n, width, torch.tensor([z], dtype=F64)).slope[0]
    # 200 000 candidates with weights that vary by a factor of a few: half a percent.
    assert torch.allclose(slope, z * centre / (z / c + width**2), rtol=0.03)


def test_huge_values_do_not_overflow_and_failures_are_left_out() -> None:
    n, z = normals(1, 6, 3), torch.tensor([1.0], dtype=F64)
    values = torch.tensor([[1e6, 1e6 - 1, torch.nan, 1e6 - 2, -torch.inf, 1e6 - 5]], dtype=F64)
    kept = [0, 1, 3, 4, 5]
    found = policy_slope(values, n, 0.1, z)
    finite = policy_slope(values[:, kept].clamp_min(0) - 1e6, n[:, kept], 0.1, z)
    assert found.directions.tolist() == [4]
    assert torch.allclose(found.slope, finite.slope, rtol=1e-9)
    for hopeless in (torch.nan, -torch.inf):
        slope = policy_slope(torch.full_like(values, hopeless), n, 0.1, z).slope
        assert not slope.any()


# ---- temperature and momentum


def test_temperature_is_a_running_mean_per_sample() -> None:
    """m chi2 / 2 with a measurement, the spread of the candidates without; its first value as it is."""
    values = torch.tensor([[0.0, 2.0, 4.0], [1.0, 1.0, torch.nan], [torch.nan] * 3], dtype=F64)
    seen = Evaluated(torch.zeros(3), torch.tensor([3.0, 5.0, torch.nan], dtype=F64), values)
    first = running_temperature(torch.zeros(3, dtype=F64), seen, 10.0)
    assert torch.allclose(first, torch.tensor([15.0, 25.0, 0.0], dtype=F64))
    later = running_temperature(torch.tensor([1.0, 2.0, 3.0], dtype=F64), seen, 10.0)
    assert torch.allclose(later, torch.tensor([2.4, 4.3, 3.0], dtype=F64))
    reward = seen._replace(chi2=torch.full((3,), torch.nan, dtype=F64))
    spread = running_temperature(torch.zeros(3, dtype=F64), reward, 1.0)
    assert torch.allclose(spread, torch.tensor([(8 / 3) ** 0.5, 0.0, 0.0], dtype=F64))


class OnlyTheLast(DPG):
    """The planted bug, as released: each step mixes in the last raw gradient, not the running mean."""

    def step(self, problem, state, k, noise):
        after, info = super().step(problem, state, k, noise)
        fresh = dpg.policy_slope.fresh[-1]  # pyright: ignore[reportFunctionMemberAccess]
        return after._replace(slope=fresh), info


def momentum_error(kind: type[DPG], target: Target, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest difference between the slope after three steps and the recursion written out."""
    fresh: list[Tensor] = []

    def recorded(*arguments: Tensor) -> Slope:
        estimate = policy_slope(*arguments)  # type: ignore[arg-type]
        fresh.append(estimate.slope)
        return estimate

    recorded.fresh = fresh  # pyright: ignore[reportFunctionMemberAccess]
    solver = kind(3, momentum=0.6, num_candidates=8, schedule=LEVELS)
    with monkeypatch.context() as patch:
        patch.setattr(dpg, "policy_slope", recorded)
        state = after_steps(solver, target.problem(), 2 * normals(3, 2), 3)[0]
    expected = fresh[0]
    for k in (1, 2):
        beta = 0.6 * (1 - k / 3)
        expected = beta * expected + (1 - beta) * fresh[k]
    return float((state.slope - expected).abs().max())


def after_steps(solver, problem: Problem, x: Tensor, count: int):
    noise = Noise(0, tuple((0, s) for s in range(len(x))), tuple(x.shape[1:]), x.dtype)
    part = problem.repeat(len(x), 1)
    state, info = solver.init(part, noise)._replace(x=x), None
    for k in range(count):
        state, info = solver.step(part, state, k, noise.at(k))
    return state, info


def test_momentum_is_a_running_mean(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert momentum_error(DPG, target, monkeypatch) < 1e-12
    assert momentum_error(OnlyTheLast, target, monkeypatch) > 1e-2


# ---- the sampler


@pytest.mark.slow
def test_default_is_close_to_the_posterior(target: Target) -> None:
    """The bias is that of DPS; 300 samples add 0.03 to the means and 4 % to the spreads."""
    result = driver.run(DPG(), target.problem(), 300, batch_size=300, progress=False)
    assert (result.samples[0].mean(0) - target.posterior.mean).abs().max() < 0.1
    ratio = result.samples[0].std(0) / target.posterior.std
    assert ratio.min() > 0.85
    assert ratio.max() < 1.1


def test_official_step_has_constant_length_per_sample(target: Target) -> None:
    """guidance_scale times the noise level, along J^T slope, for each sample on its own."""
    x = 3 * normals(6, 2)
    solver = DPG(3, weight="official", guidance_scale=0.7, num_candidates=4000, schedule=LEVELS)
    state, _ = after_steps(solver, target.problem(), x, 1)
    move = state.denoised - target.prior.denoise(x, 2.0)
    assert torch.allclose(move.norm(dim=1), torch.full((6,), 1.4, dtype=F64))
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=F64)
    jacobian = covariance @ torch.linalg.inv(covariance + 4 * torch.eye(2))
    # The slope lies along the measured axis, up to sqrt(1 / 4000).
    expected = jacobian[0] / jacobian[0].norm()
    assert ((move @ expected).abs() > 0.99 * 1.4).all()


def test_without_guidance_it_is_unconditional(target: Target) -> None:
    ours = driver.run(DPG(20, guidance_scale=0.0), target.problem(), 4, progress=False).samples
    plain = driver.run(Unconditional(20), target.problem(), 4, progress=False).samples
    assert torch.equal(ours, plain)


def test_a_staircase_is_climbed(target: Target) -> None:
    """A reward that is flat almost everywhere: no derivative, but a slope over the radius."""

    def stairs(x: Tensor) -> Tensor:
        return 2 * torch.floor(2 * x[:, 0])

    results = [
        driver.run(
            solver,
            Problem(target.prior, reward=as_reward(stairs, differentiable=False)),
            60,
            batch_size=60,
            progress=False,
        ).samples[0]
        for solver in (DPG(30, num_candidates=32), Unconditional(30))
    ]
    # Under the prior 2 floor(2 x) has mean 1.5 and deviation 4 (0.5 for the mean of 60); exp(reward) shifts x by
    # about 4 deviations of 1, were it linear.
    assert stairs(results[0]).mean() > stairs(results[1]).mean() + 4


def run_in_batches(size: int, weight: str = "adaptive") -> Tensor:
    prior = ig.priors.Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.5, 0.3])))
    y = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    problem = Problem(prior, Likelihood(Identity(), y, 0.2))
    solver = DPG(6, num_candidates=8, weight=weight)
    return driver.run(solver, problem, 3, batch_size=size, dtype=F64, progress=False).samples


def test_planted_bug_the_norm_over_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As released; that "official" without it keeps rows apart is in tests/solvers/test_contract.py."""
    monkeypatch.setattr(dpg, "norm", lambda a: a.norm().expand(len(a)))
    assert (run_in_batches(1, "official") - run_in_batches(6, "official")).abs().max() > 1e-3


class Fragile(Operator):
    """The first coordinate; refuses gradients and fails (NaN) for a fraction of its inputs."""

    differentiable = False

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        fails = x.sum(1, keepdim=True).abs() * 1e3 % 1 < self.fraction
        return x[:, :1].masked_fill(fails, torch.nan)


def fragile_problem(target: Target, fraction: float) -> Problem:
    return Problem(target.prior, Likelihood(Fragile(fraction), target.y, 0.3))


@pytest.mark.parametrize("weight", dpg.WEIGHTS)
def test_failures_now_and_then_change_little(weight: str, target: Target) -> None:
    """A fifth of all calls fail: the samples move by less than two seeds differ."""
    solver = DPG(30, num_candidates=16, weight=weight)
    whole, other, broken = (
        driver.run(
            solver, fragile_problem(target, fraction), 50, seed=seed, batch_size=50, progress=False
        ).samples
        for fraction, seed in ((0.0, 0), (0.0, 1), (0.2, 0))
    )
    assert torch.isfinite(broken).all()
    moved = (broken - whole).square().mean().sqrt()
    assert moved < 0.5 * (other - whole).square().mean().sqrt()


def test_without_survivors_the_step_is_unguided_and_counted(target: Target) -> None:
    """And the running means wait: what was known before the failure is still there after it."""
    solver = DPG(3, num_candidates=4, schedule=LEVELS)
    x = 2 * normals(3, 2)
    before, _ = after_steps(solver, target.problem(), x, 1)
    noise = Noise(0, tuple((0, s) for s in range(3)), (2,), F64).at(1)
    part = fragile_problem(target, 1.1).repeat(3, 1)
    after, info = solver.step(part, before, 1, noise)
    plain, _ = Unconditional(3, schedule=LEVELS).step(part, before, 1, noise)  # type: ignore[arg-type]
    assert torch.equal(after.x, plain.x)
    assert info.unguided.all()
    assert info.failed.tolist() == [4, 4, 4]
    assert torch.equal(after.slope, before.slope)
    assert torch.equal(after.temperature, before.temperature)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "norm"}, "weight is 'norm'"),
        ({"num_candidates": 1}, "num_candidates is 1"),
        ({"smoothing": 0.0}, "smoothing is 0"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
    ],
)
def test_constructor_validates(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DPG(**settings)
