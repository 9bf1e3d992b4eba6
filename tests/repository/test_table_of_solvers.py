"""The table of docs/solvers.md is true: every solver, and what it needs, gives and costs."""

from __future__ import annotations

import pytest
import torch

import invguide.solvers
from invguide import Likelihood, Problem, driver
from invguide.noise import Poisson
from invguide.operators import Identity
from invguide.priors import Gaussian, from_network
from invguide.reward import EditReward
from invguide.rewards import FeatureReward, Motion
from invguide.solver import EnsembleSolver, Requires
from pages import README, ROOT, table

TABLE = table(ROOT / "docs" / "solvers.md", "solver")


def test_every_solver_is_in_the_table():
    assert set(TABLE) == set(invguide.solvers.__all__)


def test_the_readme_names_solvers_that_there_are():
    rows = table(README, "you have")
    names = {name for row in rows.values() for name in row["take"].split("`")}
    named = {name for name in names if name[:1].isupper()}
    assert len(named) >= 6
    assert named <= set(TABLE)


@pytest.mark.parametrize("name", invguide.solvers.__all__)
def test_needs_of_a_solver(name: str):
    kind = getattr(invguide.solvers, name)
    row, requires = TABLE[name], kind.requires
    target = {"likelihood": "measurement", "either": "measurement or reward"}
    assert row["target"] == target.get(requires.target, requires.target)
    assert row["operator"] == needed(requires)
    assert row["gradient of prior"] == ("yes" if requires.prior_vjp else "no")
    if issubclass(kind, EnsembleSolver):
        assert row["gives"] == "an ensemble"
        return
    result = driver.run(kind(), example(requires), 1)
    assert float(row["network calls"]) == result.nfe


class Shrink(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Tanh()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def example(requires: Requires) -> Problem:
    """The smallest problem that such a solver takes."""
    if requires.reward is FeatureReward:
        prior = from_network(Shrink(), "x0", "ve", shape=(2,))
        return Problem(
            prior, reward=FeatureReward(prior, "net.body", lambda f: f["net.body"].sum(1))
        )
    if requires.reward is EditReward:
        prior = Gaussian(torch.zeros(1, 2, 2), torch.eye(4))
        return Problem(prior, reward=Motion(torch.rand(1, 2, 2), torch.ones(2, 2, 2)))
    prior = Gaussian([0.0, 0.0], torch.eye(2))
    if requires.counts:
        prior.symmetric = True
        return Problem(prior, Likelihood(Identity(), torch.ones(1, 2), Poisson(0.2)))
    return Problem(prior, Likelihood(Identity(), torch.zeros(1, 2), 0.5))


def needed(requires: Requires) -> str:
    if requires.target == "none":
        return "any"
    return "linear" if requires.linear else "differentiable" if requires.gradient else "any"
