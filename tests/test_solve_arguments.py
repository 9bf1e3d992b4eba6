"""One call more: a reward beside the measurement, a start with its noise level, conditions in plain form, pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import invguide as ig
from invguide.errors import CompatibilityError, InputError, ShapeError
from invguide.operators import Identity
from invguide.priors import Gaussian
from invguide.solvers import DPS, HQS, EnsembleTwisted, TweedieMatheron

F64 = torch.float64
MEAN, COVARIANCE = (
    torch.tensor([0.5, -0.3], dtype=F64),
    torch.tensor([[1.0, 0.6], [0.6, 1.0]]).to(F64),
)
Y, SIGMA = torch.tensor([[1.0, 0.2]], dtype=F64), 0.5
CENTRE, WIDTH = torch.tensor([-0.5, 0.8], dtype=F64), 0.7


def closeness(x: Tensor) -> Tensor:
    return -((x - CENTRE.to(x)) ** 2).sum(1) / (2 * WIDTH**2)


def product(with_reward: bool) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the Gaussian prior times the measurement, times the exponential of the reward."""
    precision = torch.linalg.inv(COVARIANCE) + torch.eye(2) / SIGMA**2
    shift = torch.linalg.solve(COVARIANCE, MEAN) + Y[0] / SIGMA**2
    if with_reward:
        precision, shift = precision + torch.eye(2) / WIDTH**2, shift + CENTRE / WIDTH**2
    return torch.linalg.solve(precision, shift), torch.linalg.inv(precision)


def black(x: np.ndarray) -> np.ndarray:
    return -((x - CENTRE.numpy()) ** 2).sum(1) / (2 * WIDTH**2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "black box"])
def test_measurement_and_reward_are_the_product_posterior(kind: str) -> None:
    reward: Any = closeness if kind == "torch" else black
    solver: Any = DPS(num_steps=60) if kind == "torch" else EnsembleTwisted(ensemble_size=400)
    errors = []
    for with_reward in (False, True):
        result = ig.solve(
            Y,
            Identity(),
            Gaussian(MEAN, COVARIANCE),
            sigma_y=SIGMA,
            reward=reward if with_reward else None,
            solver=solver,
            num_samples=400,
            progress=False,
        )
        mean, covariance = product(with_reward)
        deviation = covariance.diagonal().sqrt()
        errors.append(float(((result.mean[0] - mean) / deviation).abs().max()))
        assert torch.allclose(result.std[0], deviation, rtol=0.25)
        if with_reward:
            samples = result.samples[0]
            assert result.reward is not None
            assert torch.allclose(result.reward[0], closeness(samples), atol=1e-8)
            assert "; reward -" in result.diagnosis
            assert "chi2 " in result.diagnosis
    # 400 samples: a standard error is 0.05 deviations, of particles somewhat more.
    assert errors[1] < max(errors[0], 0.2)


def test_solvers_that_would_ignore_the_reward_are_refused() -> None:
    with pytest.raises(CompatibilityError, match="would ignore the reward"):
        ig.solve(
            Y,
            Identity(),
            Gaussian(MEAN, COVARIANCE),
            sigma_y=SIGMA,
            reward=closeness,
            solver="HQS",
        )


# ---- init


def test_a_start_is_kept_as_far_as_its_noise_level_lets_it() -> None:
    """SDEdit on a Gaussian: x + sigma n, denoised, is drawn from p(x0 | x + sigma n)."""
    prior, start = Gaussian(torch.zeros(2), torch.eye(2, dtype=F64)), torch.tensor([[3.0, -3.0]])
    for level in (0.3, 1.0):
        result = ig.guide(
            prior,
            lambda x: 0.0 * x.sum(1),
            solver="Unconditional",
            init=start,
            init_noise=level,
            num_samples=2000,
            progress=False,
        )
        share = 1 / (1 + level**2)  # x0 | x has mean share x and variance level^2 share
        spread = (share**2 * level**2 + level**2 * share) ** 0.5
        assert torch.allclose(result.mean[0], share * start[0].double(), atol=0.1)
        assert torch.allclose(result.std[0], torch.full((2,), spread, dtype=F64), rtol=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "solver", [DPS(num_steps=20), HQS(num_steps=8), TweedieMatheron(), "REDDiff"]
)
def test_warm_starts_reach_the_posterior(solver: Any) -> None:
    mean, covariance = product(False)
    result = ig.solve(
        Y,
        Identity(),
        Gaussian(MEAN, COVARIANCE),
        sigma_y=SIGMA,
        solver=solver,
        init=mean[None],
        init_noise=0.6,
        num_samples=1 if getattr(solver, "point_estimate", True) else 200,
        progress=False,
    )
    assert ((result.mean[0] - mean) / covariance.diagonal().sqrt()).abs().max() < 1
    assert result.samples.isfinite().all()


def test_starts_that_cannot_be_are_refused() -> None:
    def run(**settings: Any) -> None:
        ig.solve(Y, Identity(), Gaussian(MEAN, COVARIANCE), sigma_y=SIGMA, **settings)

    with pytest.raises(InputError, match="belong together"):
        run(init=Y)
    with pytest.raises(InputError, match="init_noise is 1e\\+06"):
        run(init=Y, init_noise=1e6)
    with pytest.raises(ShapeError, match="init has shape"):
        run(init=torch.zeros(3, 2), init_noise=0.3)
    with pytest.raises(CompatibilityError, match=r"cannot start from signals .* DPS"):
        run(init=Y, init_noise=0.3, solver="ExactPosterior")


# ---- conditions


class Labelled(Gaussian):
    """Its mean is the label."""

    def denoise(self, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
        label = condition["label"].to(x)[:, None]
        return super().denoise(x - label, sigma) + label


@pytest.mark.parametrize(
    "label", [3, 3.0, [3], (3,), np.int64(3), np.array([3]), torch.tensor(3), torch.tensor([3, 3])]
)
def test_conditions_are_taken_in_any_plain_form(label: Any) -> None:
    prior = Labelled(torch.zeros(2), 0.01 * torch.eye(2, dtype=F64))
    y = torch.zeros(2, 2, dtype=F64)
    result = ig.solve(
        y,
        Identity(),
        prior,
        sigma_y=100.0,
        solver=DPS(num_steps=20),
        condition={"label": label},
        progress=False,
    )
    assert (result.samples - 3).abs().max() < 0.6


def test_conditions_that_are_none_are_refused() -> None:
    prior = Labelled(torch.zeros(2), torch.eye(2, dtype=F64))
    for label, error in (("cat", InputError), ([1, 2, 3], ShapeError), (None, InputError)):
        with pytest.raises(error, match="condition 'label'"):
            ig.solve(torch.zeros(2, 2), Identity(), prior, sigma_y=1.0, condition={"label": label})
