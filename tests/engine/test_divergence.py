"""Divergence means divergence: nothing finished is thrown away, real ones are found, who made a NaN is named."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.engine.divergence import (
    Outcome,
    broken_rows,
    judge,
    likely_cause,
    matters,
    size_limit,
)
from invguide.errors import DivergenceError, RunError
from invguide.forward_operator import LinearOperator, Operator
from invguide.likelihood import Likelihood
from invguide.numerics.linear import per_sample
from invguide.operators import Identity
from invguide.prior import Prior
from invguide.priors import Gaussian, GaussianField, GaussianMixture
from invguide.problem.problem import Problem
from invguide.result import Result
from invguide.reward import as_reward
from invguide.solver import EnsembleSolver, Solver, missing_abilities
from invguide.solvers import DPS, HQS, SCG, DiffPIR, EnKG, REDDiff
from invguide.verify.targets import MatrixOperator

D = 16


def quick(kind: type[Solver[Any]], **changes: Any) -> Solver[Any]:
    """A solver with few steps, members, candidates and inner iterations."""
    cheap = {
        "num_steps": 100 if kind is REDDiff else 12,
        "ensemble_size": 24,
        "num_candidates": 4,
        "num_directions": 4,
    }
    cheap |= {"num_iterations": 4, "rollout_max": 4, "rollout_steps": 4}
    known = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in {**cheap, **changes}.items() if k in known})


def run(solver: Solver[Any], problem: Problem, count: int | None = 2, **settings: Any) -> Result:
    size = None if isinstance(solver, EnsembleSolver) else count
    return driver.run(solver, problem, size, progress=False, **settings)


class Untold(Prior):
    """White Gaussian data of any size, from somebody who does not know `sigma_data`."""

    sigma_min: float
    sigma_max: float

    def __init__(self, size: float, shape: tuple[int, ...] = (D,)) -> None:
        super().__init__()
        self.size, self.shape = size, shape
        self.sigma_min, self.sigma_max = 1e-3 * size, 20 * size

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return x / (1 + (per_sample(sigma, x) / self.size) ** 2)


# ---- false divergences


def observed(prior: Prior, size: float, x: Tensor) -> Problem:
    """Half of the numbers are measured, with noise of a tenth of their size."""
    matrix = torch.eye(D, dtype=torch.float64)[: D // 2]
    noise = torch.randn(1, D // 2, dtype=torch.float64)
    operator = MatrixOperator(matrix, (D,))
    return Problem(prior, Likelihood(operator, operator(x) + 0.1 * size * noise, 0.1 * size))


def asking(deviations: float, numbers: int = D) -> Problem:
    """A standard normal, and a reward that wants it `deviations` standard deviations away."""
    reward = as_reward(lambda x: deviations * x.sum(1))  # the exact answer is N(deviations, 1)
    return Problem(Gaussian(torch.zeros(numbers), torch.eye(numbers)), reward=reward)


def well_posed(name: str) -> Problem:
    torch.manual_seed(1)
    signs = torch.sign(torch.randn(2, D, dtype=torch.float64))
    if name.startswith("asking"):
        return asking(float(name.split()[1]))
    if name == "mixture":
        prior = GaussianMixture(16 * signs, torch.eye(D))
        return observed(prior, 16.0, prior.sample(1))
    kind, size = name.split()[0], float(name.split()[1])
    x = size * torch.randn(1, D, dtype=torch.float64)
    if kind == "untold":
        return observed(Untold(size), size, x)
    prior = Gaussian(torch.zeros(D), size**2 * torch.eye(D))
    if kind == "mistold":
        prior.sigma_data = 1.0
    return observed(prior, size, x)


WELL_POSED = [f"{kind} {s}" for kind, s in product(("told", "untold"), ("5", "100", "1e-3"))]
WELL_POSED += ["mistold 5", "mistold 100", "mixture", "asking 5", "asking 8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WELL_POSED)
@pytest.mark.parametrize("kind", sorted(Solver.registry))
def test_nothing_well_posed_diverges(kind: str, name: str) -> None:
    problem, solver = well_posed(name), quick(Solver.registry[kind])
    if missing_abilities(solver.requires, problem):
        pytest.skip("does not apply")
    result = run(solver, problem)
    assert bool(result.finished.all())
    assert bool(torch.isfinite(result.samples).all())


def test_a_sample_of_the_size_that_the_data_have_is_not_odd() -> None:
    for name in ("told 5", "untold 5", "untold 100", "untold 1e-3", "mixture"):
        result = run(DPS(num_steps=30), well_posed(name))
        assert result.manifest["warnings"] == [], name
        assert float(result.chi2.max()) < 3
    assert run(HQS(), well_posed("mistold 100")).warnings == []  # what it tells is not believed


@pytest.mark.parametrize(
    ("solver", "numbers"),
    [
        (DPS(num_steps=30, weight="likelihood"), D),  # exact, as prior and reward are
        (SCG(num_steps=60, num_candidates=64), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_odd_result_is_returned_with_a_warning(solver: Solver[Any], numbers: int) -> None:
    result = run(solver, asking(8.0, numbers), 3)
    assert bool(result.finished.all())
    assert float(result.samples.square().mean().sqrt()) > 7
    assert len(result.warnings) == 3
    assert result.manifest["warnings"] == result.warnings
    assert "ends at rms" in result.warnings[0]
    assert "clean signals have about 1" in result.diagnosis
    assert "(and 2 more)" in result.diagnosis


def test_a_poor_answer_is_returned_with_a_warning() -> None:
    """Without guidance the measurement is ignored; as the noise is small, a blank signal would have been better."""
    y = torch.full((1, D), 0.3, dtype=torch.float64)
    problem = Problem(Gaussian(torch.zeros(D), torch.eye(D)), Likelihood(Identity(), y, 1e-3))
    result = run(DPS(num_steps=20, guidance_scale=0.0), problem)
    assert bool(result.finished.all())
    assert all("explains y less well than a blank signal" in line for line in result.warnings)
    assert "warning: sample 0 of measurement 0" in result.diagnosis


def test_warnings_survive_a_resumed_run(tmp_path: Any) -> None:
    solver, path = DPS(num_steps=30, weight="likelihood"), tmp_path / "run.pt"

    def stop(report: driver.StepReport) -> None:
        if report.rows[0][1] == 1 and report.step == 5:
            raise KeyboardInterrupt

    settings = {"checkpoint": path, "batch_size": 1}
    begun = run(solver, asking(8.0), 2, callbacks=[stop], **settings)
    assert begun.status == [["ok", "interrupted"]]
    ended, whole = run(solver, asking(8.0), 2, **settings), run(solver, asking(8.0), 2)
    assert ended.warnings == whole.warnings
    assert len(whole.warnings) == 2


# ---- real ones


class Power(Operator):
    """x^9, whose slope explodes outside of [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return (3 * x) ** 9


class Exponential(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return (10 * x).exp()


FAR_TOO_LARGE = [
    *(DPS(30, guidance_scale=g, weight="likelihood") for g in (1e2, 1e4, 1e8)),
    *(DPS(30, guidance_scale=g, weight="official") for g in (1e3, 1e5)),
]
PRIORS = ("white", "mixture", "field", "network")


def planted(name: str, operator: Operator) -> Problem:
    if name == "network":
        prior, x = ig.load_prior("natural-tiny"), torch.rand(1, 3, 32, 32)
    else:
        means = 4 * torch.sign(torch.randn(2, D, dtype=torch.float64))
        prior = {
            "white": Gaussian(torch.zeros(D), torch.eye(D)),
            "mixture": GaussianMixture(means, torch.eye(D)),
            "field": GaussianField((1, 8, 8), std=0.5),
        }[name]
        x = prior.sample(1)
    y = operator(x)
    return Problem(prior, Likelihood(operator, y, 0.02 * float(y.std())), shape=tuple(x.shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("solver", FAR_TOO_LARGE, ids=lambda s: f"{s.weight}-{s.guidance_scale:g}")
def test_guidance_far_too_large_is_found(solver: DPS, name: str) -> None:
    """20 of 20, and every sample of each."""
    with pytest.raises(DivergenceError, match=r"DPS diverged: .*guidance_scale=.* is too large"):
        run(solver, planted(name, Identity()))
    dropped = run(solver, planted(name, Identity()), 4, on_nonfinite="drop")
    assert not bool(dropped.finished.any())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("operator", [Power(), Exponential()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("weight", ["likelihood", "official"])
def test_exploding_operators_are_found(weight: str, operator: Operator, seed: int) -> None:
    """20 of 20: what DPS does with its undamped gradients."""
    problem = planted("field", operator)
    with pytest.raises(DivergenceError, match=r"DPS diverged"):
        run(DPS(30, weight=weight, guidance_scale=3.0), problem, 4, seed=seed)


def test_a_planted_mistake_in_the_rules_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that this one replaces: any sample five times larger than the prior tells is lost."""
    monkeypatch.setattr(
        "invguide.engine.inspection.judge",
        lambda outcome, size, *_: judge(outcome, size, 1, 1, False)._replace(
            lost=outcome.rms > 5 * size
        ),
    )
    with pytest.raises(DivergenceError, match="DPS diverged"):
        run(DPS(num_steps=30, weight="likelihood"), asking(8.0))


# ---- the rules


class State(NamedTuple):
    x: Tensor
    moment: Tensor
    log_weights: Tensor


def test_which_rows_of_a_state_are_broken() -> None:
    x, moment, log_weights = torch.ones(6, 2), torch.ones(6, 3), torch.zeros(6)
    x[1, 0], moment[2], log_weights[3] = 2e5, 1e30, -torch.inf  # too large; may be; may be
    x[4, 1], moment[4, 0], log_weights[5] = torch.nan, torch.inf, torch.nan
    found = broken_rows(State(x, moment, log_weights), sigma_max=10.0)
    assert [(b.row, b.name) for b in found] == [(1, "x"), (4, "x"), (5, "log_weights")]
    assert found[0].peak == pytest.approx(2e5)
    assert [b.row for b in broken_rows(State(x, moment, log_weights), sigma_max=30.0)] == [4, 5]


NAN = float("nan")
CASES = {  # rms, chi2, log_prob, chi2 and log_prob of a blank signal: lost, large, poor
    "all is well": ((1.0, 1.0, -50, 400, -2e4), (False, False, False)),
    "large, and y is explained": ((50.0, 1.6, -80, 400, -2e4), (False, True, False)),
    "poor, of the right size": ((1.0, 3e3, -2e5, 400, -2e4), (False, False, True)),
    "large and poor": ((9.0, 3e3, -2e5, 400, -2e4), (True, True, True)),
    "large and poor, but the reward is worth it": ((9.0, 3e3, 7, 400, -2e4), (False, True, True)),
    "large and overflown": ((1e5, torch.inf, -torch.inf, 400, -2e4), (True, True, True)),
    "large and not defined": ((1e5, NAN, NAN, 400, -2e4), (True, True, False)),
    "of the right size and not defined": ((1.0, NAN, NAN, 400, -2e4), (False, False, False)),
    "not finite": ((NAN, NAN, NAN, 400, -2e4), (True, True, False)),
    "a reward asked for it": ((9.0, NAN, 3, NAN, -5), (False, True, False)),
    "larger, and less likely": ((4.0, NAN, -9, NAN, -5), (False, True, False)),
    "far larger, and less likely": ((9.0, NAN, -9, NAN, -5), (True, True, False)),
    "nothing was asked for": ((9.0, NAN, 0, NAN, NAN), (False, True, False)),
    "y is nearly blank itself": ((1.0, 4.0, -200, 1, -50), (False, False, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    values, wanted = CASES[name]
    outcome = Outcome(*(torch.tensor([float(v)]) for v in values))
    verdict = judge(outcome, 1.0, 1000, 100, must_be_finite=name != "nothing was asked for")
    assert tuple(bool(v) for v in verdict) == wanted


def test_signals_of_few_numbers_scatter_more() -> None:
    """Of white signals no longer than 10 numbers, drawn from the prior, less than one in 1e5 is too large."""
    for numbers in (1, 2, 5, 10):
        draws = torch.randn(200_000, numbers, generator=torch.Generator().manual_seed(0))
        assert int((draws.square().mean(1).sqrt() > size_limit(1.0, numbers)).sum()) <= 2
    assert size_limit(3.0, 10**6) == pytest.approx(6.0, rel=1e-4)


def test_members_of_next_to_no_weight_do_not_matter() -> None:
    weights = torch.tensor([0.5, 0.5 - 1e-6, 1e-6])
    assert matters(torch.tensor([True, False, True]), weights).tolist() == [True, False, False]


def test_the_cause_is_guidance_first_where_it_was_raised() -> None:
    assert "guidance_scale" not in likely_cause(HQS())
    assert likely_cause(DPS(guidance_scale=50.0)).endswith(
        "too large for this operator and sigma_y; try 5."
    )
    assert "Else: sigma_y far too small" in likely_cause(DPS())


# ---- how large clean signals are


@pytest.mark.parametrize("size", [1e-3, 0.5, 5.0, 100.0])
@pytest.mark.parametrize("shape", [(1,), (D,), (3, 16, 16)], ids=str)
def test_the_size_of_white_signals(size: float, shape: tuple[int, ...]) -> None:
    """Within the 20 % that are promised, and three standard deviations of the root mean square of 64 numbers."""
    problem = Problem(Untold(size, shape), reward=as_reward(lambda x: x.flatten(1).sum(1)))
    assert problem.sigma_data == pytest.approx(size, rel=0.2 + 3 / 128**0.5)


def test_the_size_of_a_mixture_and_of_photographs() -> None:
    for prior, size in (
        (GaussianMixture(16 * torch.sign(torch.randn(2, D)), torch.eye(D)), 16.0),
        (Gaussian(torch.full((D,), 30.0), torch.eye(D)), 30.0),
    ):
        assert Problem(prior).measured_size() == pytest.approx(size, rel=0.25)
    natural = Problem(ig.load_prior("natural-tiny"), shape=(3, 32, 32)).measured_size()
    assert 0.2 < natural < 1.0  # in [-1, 1]; told: 0.5


def test_measuring_is_counted_once_and_the_same_for_every_batch() -> None:
    problems = [well_posed("untold 5") for _ in range(3)]
    one, many = (run(DPS(num_steps=4), p, 4, batch_size=b) for p, b in zip(problems, (1, 4)))
    assert one.nfe == many.nfe == 4 + 4 * 8 / 4  # four draws of 16 numbers, of 8 steps each
    assert problems[0].sigma_data == problems[1].sigma_data
    split = run(DPS(num_steps=4), problems[2], 4, device=["cpu", "cpu"], batch_size=1)
    assert split.nfe == one.nfe
    assert (split.samples - one.samples).abs().max() < 1e-9 * one.samples.abs().max()
    assert run(DPS(num_steps=4), well_posed("told 5"), 4).nfe == 4


def test_conditions_of_the_first_measurement_are_used() -> None:
    class Scaled(Untold):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            factor = per_sample(condition["size"].to(x), x)
            return factor * super().denoise(x / factor, torch.as_tensor(sigma) / condition["size"])

    y = torch.zeros(2, D)
    condition = {"size": torch.tensor([4.0, 1.0])}
    problem = Problem(Scaled(1.0), Likelihood(Identity(), y, 0.1), condition=condition)
    assert problem.rows(torch.tensor([1])).sigma_data == pytest.approx(4.0, rel=0.4)


def test_a_prior_that_is_not_finite_has_no_size() -> None:
    class Broken(Untold):
        def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
            return x * float("nan")

    with pytest.raises(RunError, match=r"signals drawn from Broken .* are not finite"):
        _ = Problem(Broken(1.0)).sigma_data


# ---- who made it


class Faulty(Operator):
    """NaN, or a slope of NaN, where the first number is positive."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "value":
            return x * torch.where(x[:, :1] > 0, torch.nan, 1.0)
        if self.how == "overflow":
            return x * torch.where(x[:, :1] > 0, 1e30, 1.0).to(x) ** 11
        return x + (x - x.relu()).abs().sqrt()  # the square root of 0


class FaultyPrior(Untold):
    def __init__(self, how: str) -> None:
        super().__init__(1.0)
        self.how, self.sigma_data = how, 1.0

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        denoised = super().denoise(x, sigma)
        low = per_sample(sigma, x) < 1.0
        if self.how == "value":
            return torch.where(low, torch.nan, denoised)
        return denoised + torch.where(low, (x - x.detach()).abs().sqrt(), 0.0)


class FaultyAdjoint(Identity):
    def solve(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        return rhs / 0.0


def faulty(name: str) -> Problem:
    y = torch.full((1, D), 0.5, dtype=torch.float64)
    plain = Untold(1.0)
    plain.sigma_data = 1.0
    kind, _, how = name.partition(" ")
    if kind == "operator":
        return Problem(plain, Likelihood(Faulty(how), y, 0.1))
    if kind == "prior":
        return Problem(FaultyPrior(how), Likelihood(Identity(), y, 0.1))
    if kind == "adjoint":
        return Problem(plain, Likelihood(FaultyAdjoint(), y, 0.1))
    if kind == "density":
        law = lambda p, y: -(p - y).square().sum(1) * torch.where(p[:, 0] > 0, torch.nan, 1)  # noqa: E731
        return Problem(plain, Likelihood(Identity(), y, law))

    def root(x: Tensor) -> Tensor:
        return (
            -(x - x.detach()).square().sum(1).sqrt()
            if how == "gradient"
            else (x - 99).log().sum(1) * x[:, 0]
        )

    return Problem(plain, reward=as_reward(root))


NAMED = {
    "operator value": "the operator Faulty returned NaN for sample 0 of measurement 0 at step .* of 20, given a finite",
    "operator overflow": "the operator Faulty returned infinity for sample 0 .*; keep its input inside its domain",
    "operator gradient": "the gradient of the operator Faulty is NaN for sample 0 .*no gradient at 0.*epsilon",
    "prior value": r"the prior FaultyPrior returned NaN at noise level 0\.\d+ for sample 0 .* at step",
    "prior gradient": r"the prior FaultyPrior has a gradient of NaN at noise level \d+ for sample 0",
    "density": "the log density returned NaN for sample 0 of measurement 0 at step",
    "reward value": r"the reward as_reward\(root\) returned NaN for sample 0 of measurement 0 at step",
    "reward gradient": r"the gradient of the reward as_reward\(root\) is NaN for sample 0 .*epsilon",
}


@pytest.mark.parametrize("name", NAMED)
def test_whoever_made_a_nan_is_named(name: str) -> None:
    with pytest.raises(DivergenceError, match=NAMED[name]) as caught:
        run(DPS(num_steps=20), faulty(name), 1)
    assert "guidance_scale" not in str(caught.value)


def test_a_data_step_that_is_not_finite_is_named() -> None:
    with pytest.raises(DivergenceError, match="data step through the operator FaultyAdjoint gave"):
        run(DiffPIR(num_steps=10), faulty("adjoint"))


def test_the_row_that_failed_is_named_and_the_others_are_kept() -> None:
    """Rows whose first number never is positive finish; what is said of the rest does not depend on the batch."""
    problem = faulty("operator value")
    results = [
        run(DPS(20), problem, 12, on_nonfinite="drop", batch_size=b, seed=3) for b in (12, 5)
    ]
    assert results[0].status == results[1].status
    for s, text in enumerate(results[0].status[0]):
        named = f"dropped: DPS diverged: the operator Faulty returned NaN for sample {s} of"
        assert text == "ok" or text.startswith(named)


def test_a_target_that_is_undefined_at_a_good_sample_is_a_warning() -> None:
    """HQS takes no step that is not finite; the operator has no value where it ends."""
    result = run(HQS(num_steps=4), faulty("operator value"))
    lines = [w for w in result.warnings if "the operator Faulty returned NaN" in w]
    assert bool(result.finished.all())
    assert lines == result.warnings == [w for w in lines if w.startswith("sample ")]
    assert len(lines) == int(result.chi2.isnan().sum())


def test_a_black_box_is_not_called_again() -> None:
    """Its calls may take hours; the prior that fails before it is named all the same."""
    calls: list[int] = []

    class Simulator(Identity):
        differentiable = False

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x

    y = torch.full((1, D), 0.5, dtype=torch.float64)
    problem = Problem(FaultyPrior("value"), Likelihood(Simulator(), y, 0.1))
    solver = EnKG(ensemble_size=8, num_steps=10, window=(0.05, 0.2))
    with pytest.raises(DivergenceError, match="the prior FaultyPrior returned NaN"):
        run(solver, problem)
    assert len(calls) == sum(solver.guided(k) for k in range(10))


def test_growth_is_not_blamed_on_the_operator_that_overflows() -> None:
    """What is finite and enormous has gone astray before it is squared."""

    class Square(LinearOperator):
        def forward(self, x: Tensor) -> Tensor:
            return (x**9).to(torch.float32).to(x)

        def adjoint(self, y: Tensor) -> Tensor:
            return y

    problem = Problem(
        Gaussian(torch.zeros(D), torch.eye(D)),
        Likelihood(Square(), torch.ones(1, D, dtype=torch.float64), 0.1),
    )
    solver = DPS(20, weight="likelihood", guidance_scale=1e6)
    with pytest.raises(DivergenceError, match=r"guidance_scale=1e\+06 is too large.*try 100000"):
        run(solver, problem)
