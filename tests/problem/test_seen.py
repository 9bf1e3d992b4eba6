"""Targets that say nothing, simulators that are constant, and members whose finite answers are absurd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import invguide as ig
from invguide import driver
from invguide.errors import InvguideError, RunError
from invguide.likelihood import Likelihood
from invguide.problem.problem import Problem
from invguide.problem.seen import ABSURD, Seen, excess_of
from invguide.solver import Solver
from invguide.solvers import (
    DPG,
    EKI,
    HQS,
    SCG,
    DPSZerothOrder,
    EnKG,
    EnsembleTwisted,
    FeynmanKac,
)

PRIOR = ig.priors.Gaussian(torch.zeros(4).double(), torch.eye(4).double())
Y = torch.tensor([[0.5, -0.5, 1.0]]).double()
BLACK = [
    SCG(num_steps=6, num_candidates=4),
    SCG(num_steps=6, num_candidates=4, select="softmax"),
    DPG(num_steps=6, num_candidates=8),
    DPSZerothOrder(num_steps=6),
    FeynmanKac(num_steps=6, ensemble_size=16),
]
ENSEMBLES = [
    EnKG(num_steps=8, ensemble_size=64),
    EKI(num_steps=8, ensemble_size=64),
    EnsembleTwisted(num_steps=8, ensemble_size=64),
]


def name(solver: Solver) -> str:
    return f"{type(solver).__name__} {getattr(solver, 'select', '')}".strip()


# ---- rules without a finite value


@pytest.mark.parametrize("solver", BLACK, ids=name)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_rule_without_a_finite_value_is_an_error_in_every_method(
    solver: Solver, value: float
) -> None:
    rule = ig.as_reward(lambda x: np.full(len(x), value), differentiable=False)
    problem = Problem(PRIOR, reward=rule)
    with pytest.raises(
        RunError, match=r"was not guided: the reward .* no finite number|impossible|NaN"
    ):
        driver.run(solver, problem, progress=False)


@pytest.mark.parametrize("solver", BLACK, ids=name)
def test_a_rule_that_some_signals_keep_is_none(solver: Solver) -> None:
    """-inf for half of all signals."""
    rule = ig.as_reward(lambda x: np.where(x[:, 0] > 0, 0.0, -np.inf), differentiable=False)
    result = driver.run(solver, Problem(PRIOR, reward=rule), progress=False, seed=1)
    assert bool(result.finished.any())


def test_samples_without_guidance_can_be_dropped() -> None:
    rule = ig.as_reward(lambda x: np.full(len(x), -np.inf), differentiable=False)
    problem = Problem(PRIOR, reward=rule)
    result = driver.run(BLACK[0], problem, 3, progress=False, on_nonfinite="drop")
    assert all(text.startswith("dropped: SCG was not guided") for text in result.status[0])


# ---- constant simulators


@pytest.mark.parametrize("solver", [*BLACK[:4], *ENSEMBLES], ids=name)
def test_a_constant_simulator_is_said_to_be_constant(solver: Solver) -> None:
    box = ig.BlackBox(lambda x: np.array([1.0, 2.0, 3.0]))
    problem = Problem(PRIOR, Likelihood(box, Y, 0.3), shape=(4,))
    try:
        result = driver.run(solver, problem, progress=False)
    except InvguideError as error:
        pytest.fail(f"raised {error}")
    assert any("the operator BlackBox(<lambda>) is constant" in text for text in result.warnings)


@pytest.mark.parametrize("solver", [*BLACK[:4], *ENSEMBLES], ids=name)
def test_a_simulator_that_is_not_constant_is_not_said_to_be(solver: Solver) -> None:
    box = ig.BlackBox(lambda x: 1e-3 * x[:3])
    problem = Problem(PRIOR, Likelihood(box, 1e-3 * Y, 3e-4), shape=(4,))
    result = driver.run(solver, problem, progress=False)
    assert not any("constant" in text for text in result.warnings)


def test_equal_answers_of_a_point_estimator_are_no_sign_of_a_constant() -> None:
    problem = Problem(
        PRIOR, Likelihood(ig.as_operator(lambda x: x[:, :3], shape=(4,), linear=True), Y, 0.3)
    )
    with pytest.warns(UserWarning, match="point estimator"):
        result = driver.run(HQS(num_steps=4), problem, 3, progress=False)
    assert not any("constant" in text for text in result.warnings)


# ---- absurd members


@pytest.mark.slow
@pytest.mark.parametrize("solver", ENSEMBLES, ids=name)
@pytest.mark.parametrize("absurd", [1e30, -9999.0])
def test_absurd_members_are_named_and_left_out(solver: Solver, absurd: float) -> None:
    """What goes in for one signal in sixteen comes out as if the call had failed there, which it says of itself."""

    def simulator(answer: float) -> ig.BlackBox:
        def simulate(x: np.ndarray) -> np.ndarray:
            odd = int(abs(x[3]) * 1e4) % 16 == 0
            return np.full(3, answer) if odd else x[:3]

        return ig.BlackBox(simulate, max_failed=1.0)

    def run(answer: float) -> ig.Result:
        problem = Problem(PRIOR, Likelihood(simulator(answer), Y, 0.3), shape=(4,))
        return driver.run(solver, problem, progress=False, on_nonfinite="drop")

    found, honest = run(absurd), run(np.nan)
    assert any("gave absurd numbers for" in text for text in found.warnings)
    kept = found.finished & honest.finished
    assert int(kept.sum()) > 48
    assert torch.equal(found.samples[kept], honest.samples[kept])
    assert not any("absurd" in text for text in honest.warnings)


def test_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200_000, 5, generator=generator)
    assert float(excess_of(rows).max()) < ABSURD / 100
    t3 = rows / (torch.randn(200_000, 3, generator=generator).square().sum(1, True) / 3).sqrt()
    assert float(excess_of(t3).max()) < ABSURD
    wide = (2 * rows[:, :1]).exp()
    assert float((excess_of(wide) > ABSURD).double().mean()) < 1e-3
    few = torch.cat([rows[:6], torch.full((1, 5), 1e30)])
    assert float(excess_of(few).max()) == 0  # seven cannot tell
    same = torch.zeros(20, 5)
    same[3] = 1.0
    assert float(excess_of(same).max()) == 0  # a rare event, where nothing else ever happens
    rows = rows[:64].clone()
    rows[5, 2], rows[9, 0], rows[11] = -9999.0, 1e30, torch.nan
    seen = Seen()
    kept = seen.without_absurd(rows)
    assert sorted(seen.absurd) == [5, 9]
    assert kept.isnan().all(1).nonzero().flatten().tolist() == [5, 9, 11]


def test_what_was_seen_survives_an_interruption(tmp_path: Path) -> None:
    """A rule that was finite before the interruption only is no error afterwards."""
    calls: list[int] = []

    def rule(x: np.ndarray) -> np.ndarray:
        return np.full(len(x), 1.0 if len(calls) < 2 else np.nan) + np.arange(len(x))

    def count(report: driver.StepReport) -> None:
        calls.append(report.step)
        if len(calls) == 3:
            raise KeyboardInterrupt

    problem = Problem(PRIOR, reward=ig.as_reward(rule, differentiable=False))
    options: dict[str, Any] = {
        "progress": False,
        "checkpoint": tmp_path / "c.pt",
        "checkpoint_every": 1,
    }
    driver.run(BLACK[0], problem, callbacks=[count], **options)
    problem = Problem(PRIOR, reward=ig.as_reward(rule, differentiable=False))
    result = driver.run(BLACK[0], problem, trust=["reward"], **options)
    assert result.status == [["ok"]]
