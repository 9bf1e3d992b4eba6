"""Digits of a class that is asked for; prior, classifier and judge are learned here, from scikit-learn's 8 x 8 digits.

The prior is a mixture fitted to all digits without labels; the reward is a small network that has seen half of them
with labels; the judge, a support vector machine, has seen the other half and never takes part in the guidance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from invguide import driver
from invguide.priors import GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.solver import Solver
from invguide.solvers import (
    DPS,
    Dreamguider,
    ECMGuidance,
    EluCD,
    SymplecticAdjoint,
    Unconditional,
    UniversalGuidance,
)

pytest.importorskip("sklearn")

EACH = 20  # samples of every class; the standard error of an accuracy of 0.9 over 200 is 0.02


class Digits(NamedTuple):
    prior: GaussianMixture
    classifier: nn.Module
    judge: Any


@pytest.fixture(scope="module")
def digits() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture as Fit
    from sklearn.svm import SVC

    torch.manual_seed(0)
    values, classes = load_digits(return_X_y=True)
    images = torch.tensor(values / 16, dtype=torch.float64).reshape(-1, 1, 8, 8)
    labels = torch.tensor(classes)
    mean, std = float(images.mean()), float(images.std())
    flat = ((images - mean) / std).flatten(1).numpy()
    fit = Fit(30, covariance_type="tied", reg_covar=1e-3, random_state=0, max_iter=30).fit(flat)
    prior = GaussianMixture(
        torch.tensor(fit.means_).reshape(-1, 1, 8, 8),
        torch.tensor(fit.covariances_),
        torch.tensor(fit.weights_),
        scale=std,
        shift=mean,
    )
    order = torch.randperm(len(images))
    ours, theirs = order[: len(order) // 2], order[len(order) // 2 :]
    judge = SVC(gamma=0.1).fit(images[theirs].flatten(1).numpy(), labels[theirs].numpy())
    assert judge.score(images[ours].flatten(1).numpy(), labels[ours].numpy()) > 0.97
    classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 10)
    ).double()
    optimiser = torch.optim.Adam(classifier.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(500):
        rows = ours[torch.randint(len(ours), (128,))]
        blur = 0.5 * torch.rand(128, 1, 1, 1) * torch.randn(128, 1, 8, 8, dtype=torch.float64)
        nn.functional.cross_entropy(classifier(images[rows] + blur), labels[rows]).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        assert (classifier(images[theirs]).argmax(1) == labels[theirs]).double().mean() > 0.93
    return Digits(prior, classifier.requires_grad_(False), judge)


def accuracy(digits: Digits, solver: Solver) -> float:
    """Share of the samples that the judge takes for the class that was asked for."""
    hits = 0
    for label in range(10):

        def reward(x: Tensor, label: int = label) -> Tensor:
            return digits.classifier(x).log_softmax(1)[:, label]

        problem = Problem(digits.prior, reward=as_reward(reward))
        samples = driver.run(solver, problem, EACH, seed=label, progress=False).samples[0]
        hits += int((digits.judge.predict(samples.flatten(1).numpy()) == label).sum())
    return hits / (10 * EACH)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        SymplecticAdjoint(20),
        UniversalGuidance(20),
        DPS(20),
        ECMGuidance(50),  # these three without any gradient of the network
        Dreamguider(20),
        EluCD(20),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_class_that_is_asked_for(digits: Digits, solver: Solver):
    """With the default strength, which nobody has tuned to digits."""
    found = accuracy(digits, solver)
    print(type(solver).__name__, found)
    assert found >= 0.9


def test_without_guidance_it_is_one_in_ten(digits: Digits):
    assert accuracy(digits, Unconditional(20)) == pytest.approx(0.1, abs=0.065)


def test_planted_bug_an_upside_down_gradient_is_caught(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
):
    right = Problem.guide

    def wrong(self: Problem, x: Tensor, sigma: float):
        guidance = right(self, x, sigma)
        return guidance._replace(gradient=guidance.gradient.flip(-2))

    monkeypatch.setattr(Problem, "guide", wrong)
    assert accuracy(digits, UniversalGuidance(20)) < 0.8


def test_backward_part_alone(digits: Digits):
    """One step of the inner optimiser each time, and no gradient of the network."""
    solver = UniversalGuidance(20, guidance_scale=0.0, num_backward_steps=1)
    assert accuracy(digits, solver) >= 0.9
