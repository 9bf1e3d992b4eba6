"""EluCD: its three steps by hand, its classifier by closed form, and softened networks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from invguide import driver
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rewards import ClassLogProb, softened
from invguide.rng import Noise
from invguide.solvers import EluCD, Unconditional, elucd
from invguide.verify.targets import gaussian_2d

LEVELS = (4.0, 2.0, 1.0, 0.0)
X = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
NOISE = Noise(0, ((0, 0),), (2,), torch.float64).at(1)
SINE = math.sin(math.pi / 3)
STEPS = {
    weight: EluCD(3, 0.1, 0.7, weight, schedule=LEVELS) for weight in ("adaptive", "ddpm", "edm")
}


# ---- the second of three steps, from level 2 to 1, by hand: a Gaussian with its first coordinate measured


def one_step(solver: EluCD) -> Tensor:
    problem = gaussian_2d().problem().rows(torch.tensor([0]))
    state = solver.init(problem, NOISE.at(-1))._replace(x=X)
    return solver.step(problem, state, 1, NOISE)[0].x


def denoise(x: Tensor) -> Tensor:
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    return mean + (x - mean) @ torch.linalg.inv(covariance + 4 * torch.eye(2)) @ covariance


def slope(x0: Tensor) -> Tensor:
    return torch.cat([1.5 - x0[:, :1], torch.zeros(1, 1)], 1) / 0.09


def adaptive() -> Tensor:
    denoised = denoise(X)
    size = (1 + 0.5**2 + 0.5 + 0.3**2) / 2  # second moment of the prior
    opened = 4 * size / (4 + size)
    weight = 0.75 * opened + 0.7 * SINE * 0.75 * 16 * size / (16 + size)
    chi2 = float(slope(denoised).square().sum()) * 0.09
    shift = 0.1 * weight / (1 + min(chi2, opened / 0.09)) * slope(denoised)
    return denoised + 0.25 * (X - denoised) + 0.75**0.5 * NOISE() + shift


def ddpm() -> Tensor:
    """In the coordinates of DDPM, with its own formulas: arXiv 2006.11239, eq. 7, and beta of one step."""
    bar = [1 / (1 + level**2) for level in LEVELS]

    def posterior(k: int) -> tuple[float, float]:
        beta = 1 - bar[k] / bar[k + 1]
        return beta, (1 - bar[k + 1]) / (1 - bar[k]) * beta

    x, denoised = X * bar[1] ** 0.5, denoise(X)
    beta, variance = posterior(1)
    mean = bar[2] ** 0.5 * beta / (1 - bar[1]) * denoised
    mean = mean + (1 - beta) ** 0.5 * (1 - bar[2]) / (1 - bar[1]) * x
    mean = mean + 0.1 * (variance + 0.7 * SINE * posterior(0)[1]) * slope(denoised)
    return (mean + variance**0.5 * NOISE()) / bar[2] ** 0.5


def edm() -> Tensor:
    rms = X.square().mean() ** 0.5
    way = slope(X / rms)
    x = X + 0.1 * (0.75 + 0.7 * SINE) * rms * way / way.square().mean() ** 0.5
    return denoise(x) + 0.25 * (x - denoise(x)) + 0.75**0.5 * NOISE()


EXPECTED = {"adaptive": adaptive, "ddpm": ddpm, "edm": edm}


@pytest.mark.parametrize("weight", STEPS)
def test_step_by_hand(weight: str):
    assert (one_step(STEPS[weight]) - EXPECTED[weight]()).abs().max() < 1e-10


class WrongCoordinates(EluCD):
    """The variance of DDPM's step in coordinates that are not DDPM's."""

    def _step_variance(self, problem: Problem, k: int) -> float:
        b = problem.levels(self.schedule, self.num_steps, k)[1]
        return (1 + b**2) * super()._step_variance(problem, k)


class NoSine(EluCD):
    def _variance(self, problem: Problem, k: int) -> float:
        return self._step_variance(problem, k)


@pytest.mark.parametrize("weight", ["adaptive", "ddpm"])
@pytest.mark.parametrize("bug", [WrongCoordinates, NoSine])
def test_planted_bugs_are_caught(bug: type[EluCD], weight: str):
    wrong = bug(3, 0.1, 0.7, weight, schedule=LEVELS)
    assert (one_step(wrong) - EXPECTED[weight]()).abs().max() > 1e-2


# ---- the push


def pushes(k: int, count: int = 4) -> tuple[Tensor, Tensor]:
    """States, and how far "edm" moves them before the network is called."""
    prior = Gaussian(torch.zeros(3), torch.eye(3))
    problem = Problem(prior, reward=as_reward(lambda x: (2 * x).sin().sum(1)))
    x = torch.tensor([0.1, 0.7, 3.0, 40.0], dtype=torch.float64)[:count, None] * torch.randn(
        count, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    moved, _ = EluCD(10, 0.004, 0.3, "edm")._push(problem, x, k)
    return x, moved - x


@pytest.mark.parametrize("k", [0, 4, 9])
def test_push_has_the_released_length(k: int):
    x, push = pushes(k)
    share = 0.004 * (11 - k) / 11 + 0.3 * 0.004 * math.sin(math.pi * k / 10)
    ratio = push.square().mean(1).sqrt() / x.square().mean(1).sqrt()
    assert ratio.tolist() == pytest.approx([share] * 4, rel=1e-9)
    seen = x / x.square().mean(1).sqrt().clamp_min(1.0)[:, None]
    uphill = (2 * seen).cos()
    cosine = (uphill * push).sum(1) / (uphill.norm(dim=1) * push.norm(dim=1))
    assert torch.allclose(cosine, torch.ones(4).double(), atol=1e-8)


def test_planted_bug_one_length_for_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elucd, "norm", lambda x: x.norm().expand(len(x)))
    with pytest.raises(AssertionError):
        test_push_has_the_released_length(4)


# ---- the classifier


MEANS = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)


class Bayes(nn.Module):
    """The exact classifier of three Gaussians of variance 0.5, up to what all logits share."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - MEANS).square().sum(2)


@pytest.mark.parametrize("marginal", [1.0, 0.0])
def test_gradient_of_the_classifier(marginal: float):
    """Of log p(label | x0) by Bayes' rule where both temperatures are 1; of the logit alone at t2 = 0."""
    x = torch.randn(5, 2, dtype=torch.float64)
    prior = GaussianMixture(MEANS, 0.5 * torch.eye(2))
    problem = Problem(prior, reward=ClassLogProb(Bayes(), 1, marginal=marginal))
    found = problem.gradient(x)[2]
    others = torch.softmax(-(x[:, None] - MEANS).square().sum(2), 1) @ MEANS if marginal else x
    assert torch.allclose(found, 2 * (MEANS[1] - others), atol=1e-12)


def test_a_likely_class_is_drawn_more_often_with_guidance():
    prior = GaussianMixture(3 * MEANS, 0.1 * torch.eye(2))
    problem = Problem(prior, reward=ClassLogProb(lambda x: Bayes()(x / 3), 1))
    for weight, scale in (("adaptive", 1.0), ("ddpm", 3.0)):
        samples = driver.run(EluCD(30, scale, weight=weight), problem, 60, progress=False).samples
        nearest = torch.cdist(samples[0], 3 * MEANS).argmin(1)
        assert (nearest == 1).double().mean() > 0.6  # a third without


# ---- softened networks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)
        self.again = self.act  # one module under two names

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.act(self.norm(self.conv(x))) - 0.1)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(Block(), nn.ReLU()), nn.Flatten(), nn.Linear(18, 3)
    ).double()


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x)[:, 1].sum(), x)[0]


def test_softened_replaces_every_relu_and_leaves_the_network_alone():
    given = network()
    soft = softened(given, 5.0)
    assert not any(isinstance(m, nn.ReLU) for m in soft.modules())
    assert sum(isinstance(m, nn.ReLU) for m in given.modules()) == 2
    assert given.training
    assert not any(m.training for m in soft.modules())
    for theirs, ours in zip(given.parameters(), soft.parameters(), strict=True):
        assert torch.equal(theirs, ours)
        assert theirs is not ours


def test_softened_tends_to_the_network_with_beta():
    given, x = network().eval(), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    errors = [(gradient(softened(given, b), x) - gradient(given, x)).abs().max() for b in (3, 1e6)]
    assert errors[0] > 1e-3
    assert errors[1] < 1e-9


def test_planted_bug_only_the_outermost_relus_is_caught():
    """What a list of the names of a ResNet's layers does to another network."""
    given, x = network().eval(), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    shallow = softened(given, 1.0)
    shallow[0][0] = given[0][0]  # pyright: ignore[reportIndexIssue]
    assert (gradient(shallow, x) - gradient(softened(given, 1.0), x)).abs().max() > 1e-3
    assert any(isinstance(m, nn.ReLU) for m in shallow.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: softened(nn.Linear(2, 2)), "Linear has no nn.ReLU inside"),
        (lambda: softened(nn.ReLU()), "ReLU has no nn.ReLU inside"),
        (lambda: softened(network(), 0.0), "beta is 0.0; expected a finite number above 0"),
        (lambda: EluCD(weight="dpm"), "weight is 'dpm'; did you mean 'ddpm'"),
        (lambda: EluCD(guidance_scale=-1.0), "guidance_scale is -1.0; expected"),
        (
            lambda: EluCD(gamma=float("nan")),
            "gamma is nan; expected a finite number of at least 0",
        ),
    ],
)
def test_bad_input(make, message: str):
    with pytest.raises(InputError, match=message):
        make()


# ---- runs


@pytest.mark.parametrize("weight", STEPS)
def test_a_step_is_one_call_and_no_gradient_of_the_network(weight: str):
    prior = GaussianMixture([[-1.0, 0.0], [1.0, 1.0]], 0.1 * torch.eye(2).double())
    problem = Problem(prior, reward=ClassLogProb(Bayes(), 1, marginal=0.5))
    run = driver.run(EluCD(8, 0.1, weight=weight), problem, 5, progress=False)
    assert run.manifest["vjp_calls"] == 0
    assert run.nfe == 8


@pytest.mark.parametrize("weight", STEPS)
def test_without_guidance_it_is_unconditional(weight: str):
    problem = gaussian_2d().problem()
    ours = driver.run(EluCD(20, 0.0, weight=weight), problem, 5, progress=False)
    theirs = driver.run(Unconditional(20, schedule="vp-linear"), problem, 5, progress=False)
    assert torch.allclose(ours.samples, theirs.samples, atol=1e-14)


def test_defaults_come_near_a_posterior():
    """Mean within a fifth of its way from the prior; spreads too small, as the docstring says, but not by much."""
    target = gaussian_2d()
    run = driver.run(EluCD(), target.problem(), 400, batch_size=400, progress=False)
    error = run.samples[0].mean(0) - target.posterior.mean
    way = target.posterior.mean - torch.tensor([0.5, -0.3], dtype=torch.float64)
    assert (error.abs() < 0.2 * way.abs() + 0.03).all()
    ratio = run.samples[0].std(0) / target.posterior.std
    assert ((ratio > 0.4) & (ratio < 1.1)).all()


def test_float32_images():
    y = torch.rand(1, 3, 8, 8)
    prior = Gaussian(torch.zeros(3, 8, 8), 0.1 * torch.eye(192), scale=0.5, shift=0.5).float()
    problem = Problem(prior, Likelihood(Identity(), y, 0.1))
    for solver in STEPS.values():
        run = driver.run(
            replace(solver, guidance_scale=1e-3), problem, 2, progress=False, on_nonfinite="drop"
        )
        assert run.samples.dtype == torch.float32
