"""What the core does for methods whose samples are one ensemble: size, weights, network batches, black boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide import driver
from invguide.api import choose_solver
from invguide.errors import CompatibilityError, DivergenceError, InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.noise import LogDensity
from invguide.operators import Identity, Inpainting
from invguide.prior import Prior
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solver import EnsembleSolver, Requires, Solver
from invguide.solvers import EKI, EnKG


class CrowdState(NamedTuple):
    x: Tensor  # (J, *shape)
    log_weights: Tensor  # (J,)


class CrowdInfo(NamedTuple):
    sigma: float


@dataclass(frozen=True)
class Crowd(EnsembleSolver[CrowdState]):
    """Draw from the prior in one step and weigh by the target: importance sampling."""

    requires: ClassVar[Requires] = Requires(target="either", gradient=False)
    num_steps: int = 2
    ensemble_size: int = 5

    def init(self, problem: Problem, noise: Noise) -> CrowdState:
        x = problem.sigma_data * noise("init")
        return CrowdState(x, x.new_zeros(len(x)))

    def step(
        self, problem: Problem, state: CrowdState, k: int, noise: Noise
    ) -> tuple[CrowdState, CrowdInfo]:
        problem.denoise(state.x, 1.0)
        log_prob = problem.evaluate(state.x)[0].nan_to_num(nan=-torch.inf)
        return CrowdState(state.x, log_prob), CrowdInfo(1.0)

    def estimate(self, state: CrowdState) -> Tensor:
        return state.x

    def log_weights(self, state: CrowdState) -> Tensor:
        return state.log_weights


Solver.registry.pop("Crowd")  # other tests look at what is registered


class Recorder(Prior):
    """A white prior that remembers the batches it was asked for."""

    shape = (2,)
    sigma_min, sigma_max, sigma_data = 0.01, 10.0, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        assert all(len(value) == len(x) for value in condition.values())
        return x / (1 + torch.as_tensor(sigma).reshape(-1, 1) ** 2)


class Failing(Operator):
    """A black box that fails for the members whose first coordinate is above a limit."""

    differentiable = False

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.calls, self.folder = limit, 0, None

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        self.calls += len(x)
        return torch.where(x[:, :1] > self.limit, float("nan"), x)

    def keep(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def summary(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def progress_text(self) -> str:
        return f"{self.calls} calls"


def problem(operator: Operator | None = None, rows: int = 1) -> Problem:
    y = torch.linspace(0, 1, rows * 2).reshape(rows, 2)
    return Problem(Recorder(), Likelihood(operator or Identity(), y, 0.5), shape=(2,))


def test_the_ensemble_is_the_sample_count() -> None:
    result = driver.run(Crowd(ensemble_size=7), problem(rows=3), progress=False)
    assert result.samples.shape == (3, 7, 2)
    assert driver.run(Crowd(), problem(), 5, progress=False).samples.shape == (1, 5, 2)
    with pytest.raises(
        InputError, match=r"num_samples=4 and Crowd\(ensemble_size=5\) disagree.*ensemble_size=4"
    ):
        driver.run(Crowd(), problem(), 4, progress=False)


def test_a_solver_by_name_takes_num_samples_as_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Solver.registry, "Crowd", Crowd)
    result = ig.solve(
        torch.zeros(1, 2), Identity(), Recorder(), sigma_y=1.0, solver="crowd", num_samples=9,
        progress=False,
    )  # fmt: skip
    assert result.samples.shape == (1, 9, 2)


@pytest.mark.parametrize(("members", "batch"), [(100, 64), (48, 64), (7, 1)])
def test_network_batches_lose_no_member(members: int, batch: int) -> None:
    one, many = problem(), problem()
    whole = driver.run(Crowd(ensemble_size=members), one, batch_size=members, progress=False)
    parts = driver.run(Crowd(ensemble_size=members), many, batch_size=batch, progress=False)
    assert torch.equal(whole.samples, parts.samples)
    assert isinstance(many.prior, Recorder)
    assert sum(many.prior.batches) == 2 * members
    assert max(many.prior.batches) <= batch


def test_conditions_and_levels_are_split_with_their_rows() -> None:
    label, sigma = torch.arange(5), torch.linspace(0.1, 2, 5)
    whole = Problem(Recorder(), shape=(2,), condition={"label": label})
    parts = Problem(Recorder(), shape=(2,), condition={"label": label})
    parts.batch_size = 2
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    # One square, sum and quotient per number, each rounded once.
    assert torch.allclose(whole.denoise(x, sigma), parts.denoise(x, sigma), rtol=1e-6, atol=0)


def test_repeat_lays_candidates_out_by_sample() -> None:
    repeated = problem(rows=3).repeat(2, 3)
    assert torch.equal(repeated.y, problem(rows=3).y[[0, 0, 1, 1, 2, 2]])


def test_mean_and_std_are_weighted() -> None:
    """Against numpy's weighted average and the unbiased variance for reliability weights."""
    result = driver.run(Crowd(ensemble_size=200), problem(), progress=False)
    x, log_weights = result.samples[0].double(), result.log_weights[0].double()
    weights = (log_weights - log_weights.max()).exp()
    weights /= weights.sum()
    mean = (weights[:, None] * x).sum(0)
    variance = (weights[:, None] * (x - mean) ** 2).sum(0) / (1 - (weights**2).sum())
    assert torch.allclose(result.weights[0].double(), weights, atol=1e-6)
    assert torch.allclose(result.mean[0].double(), mean, atol=1e-5)
    assert torch.allclose(result.std[0].double(), variance.sqrt(), atol=1e-5)
    assert (x.mean(0) - mean).abs().max() > 0.1  # unweighted would be noticed
    # Gaussian x Gaussian: mean y / (1 + sigma_y^2); 200 particles know it to about 0.05.
    assert torch.allclose(mean, torch.tensor([0.0, 0.8]).double(), atol=0.15)


def test_equal_weights_give_the_plain_moments() -> None:
    solver = ig.solvers.Unconditional(num_steps=3)
    result = driver.run(solver, problem(), 6, progress=False)
    assert torch.allclose(result.mean, result.samples.mean(1))
    assert torch.allclose(result.std, result.samples.std(1))


def test_an_impossible_member_weighs_nothing() -> None:
    reward = as_reward(lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), differentiable=False)
    result = driver.run(
        Crowd(ensemble_size=50), Problem(Recorder(), reward=reward, shape=(2,)), progress=False
    )
    assert (result.mean[0, 0] > 0.3).all()
    assert (result.weights[0][result.samples[0, :, 0] <= 0] == 0).all()


def test_failed_members_do_not_spread() -> None:
    operator = Failing(0.5)
    result = driver.run(Crowd(ensemble_size=50), problem(operator), progress=False)
    assert torch.isfinite(result.mean).all()
    assert torch.isnan(result.chi2).any()
    assert bool(result.finished.all())
    assert result.forward_model == [{"calls": operator.calls}]


def test_a_state_that_is_not_finite_stops_the_ensemble() -> None:
    class Broken(Crowd):
        def estimate(self, state: CrowdState) -> Tensor:
            return state.x

        def step(
            self, problem: Problem, state: CrowdState, k: int, noise: Noise
        ) -> tuple[CrowdState, CrowdInfo]:
            weights = state.log_weights.clone()
            weights[0] = float(self.num_steps) * torch.nan
            return CrowdState(state.x, weights), CrowdInfo(1.0)

    with pytest.raises(DivergenceError, match="log_weights"):
        driver.run(Broken(), problem(), progress=False)


def test_finished_calls_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    operator = Failing(9.0)
    driver.run(Crowd(), problem(operator), checkpoint=tmp_path / "run.pt", progress=False)
    assert operator.folder == tmp_path / "run.pt.calls"


# ---- whitened residuals


class Phases(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, 0.2 * x)


def test_whitened_residuals_give_the_likelihood() -> None:
    """-|r|^2 / 2 is log p(y | x), for real and complex y, in normalised units, unknown entries left out."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.complex(x.flip(1), 0.3 * x)
    likelihood = Likelihood(Phases(), y, 0.7)
    r = likelihood.whitened(x)
    assert r.shape == (3, 8)
    assert not r.is_complex()
    assert torch.allclose(-0.5 * r.square().sum(1), likelihood.log_prob(x), rtol=1e-12)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    inpainting = Likelihood(Inpainting(mask=mask), images, 0.1)
    r = inpainting.whitened(images + 0.05)
    assert r.shape == (2, 6)
    assert inpainting.size == 6
    assert torch.allclose(r, torch.full((2, 6), -0.5), atol=1e-5)
    with pytest.raises(InputError, match="LogDensity tells no standard deviation"):
        Likelihood(Identity(), x, LogDensity(lambda p, y: -(p - y).abs().sum(1))).whitened(x)


@pytest.mark.parametrize("solver", [EKI(), EnKG()], ids=lambda s: type(s).__name__)
def test_a_log_density_is_refused_before_the_first_call(solver: Solver) -> None:
    calls: list[int] = []

    class Simulator(Operator):
        differentiable = False

        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x

    law = LogDensity(lambda p, y: -(p - y).abs().sum(1))
    prior = Gaussian(torch.zeros(4), torch.eye(4))
    problem = Problem(prior, Likelihood(Simulator(), torch.zeros(1, 4), law))
    with pytest.raises(CompatibilityError, match=r"deviation of the noise.*EnsembleTwisted"):
        driver.run(solver, problem, progress=False)
    assert not calls
    chosen = choose_solver(problem, 3)  # more measurements than members
    assert not chosen.requires.residuals


# ---- how an ensemble ends


class Stray(Crowd):
    """Ends with some members far outside of the data; the rest as they should be."""

    def estimate(self, state: CrowdState) -> Tensor:
        outside = torch.arange(len(state.x)) < self.strays
        return torch.where(outside[:, None], 100.0, 0.3 + 0.01 * state.x)

    strays = 1

    def log_weights(self, state: CrowdState) -> Tensor:
        return torch.zeros(len(state.x))


def test_a_bad_member_is_dropped_and_the_ensemble_kept() -> None:
    result = driver.run(Stray(), problem(), progress=False)
    assert result.finished[0].tolist() == [False, True, True, True, True]
    assert "dropped: Stray diverged: sample 0" in result.status[0][0]
    assert (result.mean - 0.3).abs().max() < 0.1


def test_an_ensemble_of_mostly_bad_members_is_refused() -> None:
    class Lost(Stray):
        strays = 3

    with pytest.raises(DivergenceError, match="Lost diverged: sample 0"):
        driver.run(Lost(), problem(), progress=False)


def test_a_bad_member_without_weight_does_not_matter() -> None:
    class Light(Stray):
        strays = 4

        def log_weights(self, state: CrowdState) -> Tensor:
            return torch.where(torch.arange(len(state.x)) < 4, -30.0, 0.0)

    result = driver.run(Light(), problem(), progress=False)
    assert bool(result.finished.all())
    assert (result.mean - 0.3).abs().max() < 0.1


@pytest.mark.parametrize(
    ("num_samples", "name"),
    [(None, "EnsembleTwisted"), (64, "EnsembleTwisted"), (2, "DPSZerothOrder")],
)
def test_auto_for_a_black_box(num_samples: int | None, name: str) -> None:
    assert type(choose_solver(problem(Failing(9.0)), num_samples)).__name__ == name


@pytest.mark.parametrize(
    ("num_samples", "name"), [(None, "EnsembleTwisted"), (99, "EnKG"), (100, "EnsembleTwisted")]
)
def test_auto_weighs_no_member_by_more_measurements_than_members(
    num_samples: int | None, name: str
) -> None:
    hidden = ig.BlackBox(lambda x: x.repeat(50), shape=(2,))
    target = Problem(Recorder(), Likelihood(hidden, torch.zeros(1, 100), 0.1))
    assert type(choose_solver(target, num_samples)).__name__ == name


@pytest.mark.parametrize(("num_samples", "name"), [(None, "FeynmanKac"), (8, "SCG")])
def test_auto_for_a_rule(num_samples: int | None, name: str) -> None:
    rule = as_reward(lambda x: x[:, 0], differentiable=False)
    target = Problem(Recorder(), reward=rule, shape=(2,))
    assert type(choose_solver(target, num_samples)).__name__ == name
