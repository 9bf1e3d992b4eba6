"""ECMGuidance: steps by hand, the clip, the noise that is kept, and a network that cannot be differentiated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.prior import Prior
from invguide.priors import Gaussian
from invguide.problem.data_size import measuring_calls
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solvers import DPS, ECMGuidance, Unconditional, ecm_guidance
from invguide.verify.targets import gaussian_2d

Y = torch.tensor([0.3, -0.7, 2.5], dtype=torch.float64)


def quadratic() -> Problem:
    prior = Gaussian(torch.zeros(3), torch.eye(3))
    return Problem(prior, reward=as_reward(lambda x: -0.5 * (x - Y).square().sum(1)))


# ---- one step by hand


X, LEVELS = torch.tensor([[1.3, -2.0]], dtype=torch.float64), (2.0, 1.0, 0.0)
NOISE = Noise(0, ((0, 0),), (2,), torch.float64).at(0)


def one_step(solver: ECMGuidance) -> Tensor:
    """State after one step from 2 to 1 on a Gaussian with its first coordinate measured."""
    problem = gaussian_2d().problem().rows(torch.tensor([0]))
    state = solver.init(problem, NOISE.at(-1))._replace(x=X)
    return solver.step(problem, state, 0, NOISE)[0].x


def expected_step(weight: str) -> Tensor:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    denoised = mean + (X - mean) @ torch.linalg.inv(covariance + 4 * torch.eye(2)) @ covariance
    variance = 0.3**2
    slope = torch.cat([1.5 - denoised[:, :1], torch.zeros(1, 1)], 1) / variance
    if weight == "official":
        shift = 0.2 * slope
    else:
        # Second moment of the prior, both coordinates; one measurement with A A^T = 1.
        size = (1 + 0.5**2 + 0.5 + 0.3**2) / 2
        level = 4 * size / (4 + size)
        chi2 = float(slope.square().sum()) * variance
        shift = 0.2 * level / (1 + min(chi2, level / variance)) * slope
    return denoised + 0.25 * (X - denoised) + 0.75**0.5 * NOISE() + shift


def step_solver(weight: str) -> ECMGuidance:
    return ECMGuidance(2, 0.2, 5.0, weight, schedule=LEVELS)  # too far for the clip


@pytest.mark.parametrize("weight", ["adaptive", "official"])
def test_step_against_the_closed_form(weight: str):
    assert (one_step(step_solver(weight)) - expected_step(weight)).abs().max() < 1e-10


def half(guidance):
    return guidance._replace(slope=0.5 * guidance.slope, gradient=0.5 * guidance.gradient)


def downhill(guidance):
    return guidance._replace(slope=-guidance.slope, gradient=-guidance.gradient)


@pytest.mark.parametrize("weight", ["adaptive", "official"])
@pytest.mark.parametrize("bug", [half, downhill])
def test_planted_bugs_are_caught(bug, weight: str, monkeypatch: pytest.MonkeyPatch):
    right = ecm_guidance.clean_guidance
    monkeypatch.setattr(ecm_guidance, "clean_guidance", lambda *given: bug(right(*given)))
    assert (one_step(step_solver(weight)) - expected_step(weight)).abs().max() > 1e-2


class NoiseFollows(ECMGuidance):
    """What most samplers do, and ECM does not: DDIM from the guided estimate, eps = (x - D - d) / a."""

    def step(self, problem, state, k, noise):
        after, info = super().step(problem, state, k, noise)
        shift = after.denoised - problem.denoise(state.x, 2.0)
        return after._replace(x=after.x - 0.25 * shift), info


@pytest.mark.parametrize("weight", ["adaptive", "official"])
def test_planted_bug_in_the_noise_is_caught(weight: str):
    wrong = NoiseFollows(2, 0.2, 5.0, weight, schedule=LEVELS)
    assert (one_step(wrong) - expected_step(weight)).abs().max() > 1e-2


# ---- the shift


def test_quadratic_target_is_reached_in_one_step():
    """With the slope's own length and no bound, D becomes y."""
    solver = ECMGuidance(7, 1.0, math.inf, "official")
    result = driver.run(solver, quadratic(), 4, progress=False)
    assert (result.samples - Y).abs().max() < 1e-12


@pytest.mark.parametrize("weight", ["adaptive", "official"])
def test_no_element_moves_farther_than_the_clip(weight: str):
    problem = quadratic()
    solver = ECMGuidance(1, 1.0, 0.2, weight, schedule=(1.0, 0.0))
    x = torch.randn(50, 3, dtype=torch.float64)
    noise = Noise(0, tuple((0, i) for i in range(50)), (3,), torch.float64).at(0)
    state, info = solver.step(problem, solver.init(problem, noise)._replace(x=x), 0, noise)
    shift = state.denoised - problem.denoise(x, 1.0)
    bound = 0.2 * (0.5**0.5 if weight == "adaptive" else 1.0)  # a = s = 1: r^2 = 1/2
    assert shift.abs().max().item() == pytest.approx(bound, abs=1e-12)
    assert (shift.sign() == (Y - problem.denoise(x, 1.0)).sign()).all()
    assert torch.allclose(info.clipped, (shift.abs() > bound - 1e-9).double().mean(1))
    assert 0.1 < float(info.clipped.mean()) < 0.99


@pytest.mark.parametrize("weight", ["adaptive", "official"])
def test_without_guidance_it_is_unconditional(weight: str):
    problem = gaussian_2d().problem()
    solver = ECMGuidance(20, 0.0, weight=weight)
    ours = driver.run(solver, problem, 5, progress=False).samples
    theirs = driver.run(Unconditional(20), problem, 5, progress=False).samples
    assert torch.allclose(ours, theirs, atol=1e-14)


# ---- the network


class Forbidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("the network was differentiated")


class OneWay(Prior):
    """A standard normal whose denoiser may be called, not differentiated."""

    shape, sigma_min, sigma_max = (3,), 0.01, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return Forbidden.apply(self.weight * x / (1 + torch.as_tensor(sigma) ** 2))


def test_the_network_is_not_differentiated():
    problem = Problem(OneWay(), reward=quadratic().reward)
    result = driver.run(ECMGuidance(5), problem, 3, progress=False)
    assert result.manifest["vjp_calls"] == 0
    measuring = (
        measuring_calls(problem.shape) / 3
    )  # of what is clean, which this prior does not tell
    assert result.nfe in (5, pytest.approx(5 + measuring))
    assert problem.prior.weight.grad is None
    with pytest.raises(RuntimeError, match="the network was differentiated"):
        driver.run(DPS(5), problem, 3, progress=False)


# ---- results, rows, arguments


def test_defaults_come_near_the_posterior():
    """Mean within a fifth of its way from the prior; the measured spread is too small, as the docstring says."""
    target = gaussian_2d()
    run = driver.run(ECMGuidance(), target.problem(), 800, batch_size=800, progress=False)
    error = run.samples[0].mean(0) - target.posterior.mean
    assert (
        error.abs() < 0.2 * (target.posterior.mean - torch.tensor([0.5, -0.3])).abs() + 0.03
    ).all()
    ratio = run.samples[0].std(0) / target.posterior.std
    assert 0.3 < ratio[0] < 0.7
    assert 0.7 < ratio[1] < 1.1


def test_float32_images():
    y = torch.rand(2, 3, 8, 8)
    prior = Gaussian(torch.zeros(3, 8, 8), 0.1 * torch.eye(192), scale=0.5, shift=0.5).float()
    problem = Problem(prior, Likelihood(Identity(), y, 0.1))
    result = driver.run(ECMGuidance(), problem, 2, progress=False)
    assert result.samples.dtype == torch.float32
    assert (result.samples - y[:, None]).square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "offical"}, "weight is 'offical'; did you mean 'official'"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"clip": 0.0}, "clip is 0.0; expected a number above 0"),
        ({"clip": float("nan")}, "clip is nan"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        ECMGuidance(**settings)


def test_a_target_without_gradient_is_refused():
    detached = as_reward(lambda x: x.detach().sum(1), differentiable=True)
    problem = Problem(Gaussian(torch.zeros(3), torch.eye(3)), reward=detached)
    with pytest.raises(InputError, match="its gradient does not reach x"):
        driver.run(ECMGuidance(3), problem, 1, progress=False)
