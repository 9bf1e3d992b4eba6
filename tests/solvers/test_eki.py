"""EKI: exact for a Gaussian prior and a linear operator; failed members; planted bugs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from invguide.driver import run
from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.solvers import EKI, eki
from invguide.verify.targets import Target, gaussian_2d, gaussian_64d


@pytest.fixture(scope="module")
def small() -> Target:
    return gaussian_2d()


@pytest.fixture(scope="module")
def large() -> Target:
    return gaussian_64d()


def ensemble_of(solver: EKI, problem: Problem, seed: int = 0, **options: Any) -> Tensor:
    return run(solver, problem, seed=seed, progress=False, **options).samples[0]


@pytest.mark.parametrize("solver", [EKI(), EKI(num_steps=1), EKI(num_steps=4, tempering="equal")])
def test_exact_for_a_gaussian(solver: EKI, small: Target) -> None:
    """4000 members: three standard errors of mean (0.016 std) and ratio (0.011), twice that for adapting to itself."""
    assert _distance(solver, small) < 1


def _distance(solver: EKI, target: Target) -> float:
    """The largest error of mean and ratio, in what is allowed."""
    x = ensemble_of(replace(solver, ensemble_size=4000), target.problem(), on_nonfinite="drop")
    std = target.posterior.std
    mean = ((x.mean(0) - target.posterior.mean) / std).abs().max() / 0.05
    return float(torch.maximum(mean, (x.std(0) / std - 1).abs().max() / 0.04))


def test_error_falls_with_the_ensemble(large: Target) -> None:
    """As J^-1/2: 32 times as many members are 5.7 times closer; at least 3 asked for."""
    ends = [ensemble_of(EKI(ensemble_size=n), large.problem()) for n in (64, 2048)]
    errors = [float((x.mean(0) - large.posterior.mean).norm()) for x in ends]
    assert errors[1] < errors[0] / 3
    assert (ends[1].std(0) / large.posterior.std - 1).abs().max() < 0.15


def test_the_first_ensemble_is_the_prior(small: Target) -> None:
    """Heun's roll-out in 32 steps: moments of 2000 prior samples, within three standard errors."""
    rows = tuple((0, j) for j in range(2000))
    problem = small.problem()
    x0 = EKI().init(problem, Noise(0, rows, (2,), torch.float64)).x0
    assert x0.mean(0).tolist() == pytest.approx([0.5, -0.3], abs=0.07)
    assert x0.std(0).tolist() == pytest.approx([1.0, 0.5**0.5], rel=0.05)
    assert problem.counters.network == 2000 * 63


def test_tempering_adds_up_and_then_costs_nothing(large: Target) -> None:
    problem = large.problem().rows(torch.zeros(50, dtype=torch.long))
    noise = Noise(0, tuple((0, j) for j in range(50)), (64,), torch.float64)
    solver = EKI(num_steps=40, ensemble_size=50)
    state, weights = solver.init(problem, noise), []
    for k in range(solver.num_steps):
        state, info = solver.step(problem, state, k, noise.at(k))
        weights.append(info.weight)
    taken = [w for w in weights if w > 0]
    assert sum(weights) == pytest.approx(1.0)
    assert 3 < len(taken) < 30
    assert weights[: len(taken)] == taken
    assert problem.counters.forward == 50 * len(taken)
    short = replace(solver, num_steps=2)
    state = short.init(problem, noise)
    for k in range(2):
        state, _ = short.step(problem, state, k, noise.at(k))
    assert state.spent[0] == pytest.approx(1.0)


def test_the_released_step_collapses_onto_y(small: Target) -> None:
    """Golden numbers of 500 steps: errors (0.083, 0.052), ratios (0, 0.89)."""
    solver = EKI(num_steps=500, tempering="normalized", ensemble_size=500)
    x = ensemble_of(solver, small.problem())
    error = x.mean(0) - small.posterior.mean
    assert error.tolist() == pytest.approx([0.083, 0.052], abs=0.06)
    assert (x.std(0) / small.posterior.std).tolist() == pytest.approx([0.0, 0.89], abs=0.06)


class Fragile(Operator):
    differentiable = False

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target, self.calls = target, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.target.operator(x)
        self.calls += 1
        lost = torch.rand(len(x), generator=torch.Generator().manual_seed(self.calls)) < 0.2
        return torch.where(lost[:, None], float("nan"), y)


def test_failures_change_less_than_the_seed(large: Target) -> None:
    solver = EKI(ensemble_size=128)
    means = [ensemble_of(solver, large.problem(), seed=s).mean(0) for s in range(3)]
    between = torch.stack([means[0] - means[1], means[1] - means[2]]).norm(dim=1).mean()
    broken = Problem(large.prior, Likelihood(Fragile(large), large.y, large.sigma_y))
    samples = ensemble_of(solver, broken)
    assert torch.isfinite(samples).all()
    change = (samples.mean(0) - means[0]).norm()
    print(f"change {change:.3f}, between seeds {between:.3f}")
    assert change < between


@pytest.mark.parametrize("batch", [64, 7])
def test_network_batches_lose_no_member(batch: int, large: Target) -> None:
    solver = EKI(ensemble_size=100, num_steps=3)
    whole = ensemble_of(solver, large.problem(), batch_size=100)
    parts = ensemble_of(solver, large.problem(), batch_size=batch)
    assert (whole - parts).abs().max() < 1e-8


class NoPerturbation(EKI):
    def step(self, problem: Problem, state: Any, k: int, noise: Noise) -> Any:
        class Silent:
            def __call__(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
                return torch.zeros(len(state.x0), *shape)

        return super().step(problem, state, k, Silent())


class Overcounts(EKI):
    def _weight(self, residuals: Tensor, k: int, left: float) -> float:
        return 2 * super()._weight(residuals, k, left)


@pytest.mark.parametrize("bug", [NoPerturbation, Overcounts])
def test_planted_bugs_are_caught(bug: type[EKI], small: Target) -> None:
    assert _distance(bug(), small) > 2


def test_planted_wrong_sign_is_caught(monkeypatch, small: Target) -> None:
    real = eki.kalman_gain
    monkeypatch.setattr(eki, "kalman_gain", lambda *arguments: -real(*arguments))
    assert not _distance(EKI(num_steps=2), small) < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble_size": 1}, "ensemble_size is 1; expected a whole number of at least 2"),
        ({"tempering": "adaptiv"}, "tempering is 'adaptiv'; did you mean 'adaptive'"),
        ({"prior_steps": 0}, "prior_steps is 0"),
        ({"step_size": 0.0}, "step_size is 0"),
    ],
)
def test_constructor_validates(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EKI(**options)
