"""UniversalGuidance, each part on its own: forward is DPS, backward is an optimum, repetition is the prior.

Golden numbers (mean error and ratio of standard deviations, both coordinates) are those of an independent
implementation in numpy on the 2-D Gaussian of `gaussian_2d`, 200 steps of the flow. Its tolerances are 0.03 and 0.05;
400 samples add 0.02 (one standard error of a mean) and 0.035 (of a ratio).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.sampling.ascent import adam_ascent, conjugate_ascent
from invguide.schedule import make_sigmas
from invguide.solvers import DPS, Unconditional, UniversalGuidance, universal_guidance
from invguide.verify.targets import gaussian_2d, mixture_1d

EDM = tuple(make_sigmas("karras", 200, 0.002, 80.0).tolist())
PAPER = UniversalGuidance(200, num_recurrences=1, weight="likelihood", schedule=EDM)


def moments(solver: UniversalGuidance, count: int = 2000) -> tuple[list[float], list[float]]:
    target = gaussian_2d()
    run = driver.run(solver, target.problem(), count, batch_size=count, progress=False)
    law = target.posterior
    return (run.mean[0] - law.mean).tolist(), (run.samples[0].std(0) / law.std).tolist()


# ---- forward


@pytest.mark.parametrize("weight", ["adaptive", "likelihood"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_forward_part_is_dps(weight: str, eta: float):
    """To the last bit: same draws, same arithmetic."""
    problem = gaussian_2d().problem()
    settings = {"weight": weight, "eta": eta, "guidance_scale": 0.7}
    ours = driver.run(
        UniversalGuidance(30, num_recurrences=1, **settings), problem, 5, progress=False
    )
    theirs = driver.run(DPS(30, **settings), problem, 5, progress=False)
    assert torch.equal(ours.samples, theirs.samples)
    assert ours.nfe == theirs.nfe == 30


def test_forward_part_is_dps_on_a_reward():
    problem = Problem(mixture_1d().prior, reward=as_reward(lambda x: x.sin().sum(1)))
    ours = driver.run(UniversalGuidance(30, 1, eta=1.0), problem, 5, progress=False)
    theirs = driver.run(DPS(30), problem, 5, progress=False)
    assert torch.equal(ours.samples, theirs.samples)


# ---- backward


def quadratic(precision: Tensor, top: Tensor) -> Problem:
    prior = Gaussian(torch.zeros(4), torch.eye(4), scale=0.5, shift=1.0)
    return Problem(
        prior, reward=as_reward(lambda x: -0.5 * ((x - top) @ precision * (x - top)).sum(1))
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_backward_part_alone_reaches_the_top_of_a_quadratic(rank: int):
    """Conjugate gradients with exact lengths need one step for each curvature, whatever the units of the reward."""
    curvature = torch.tensor([3.0, 40.0, 0.5, 7.0])[:rank].repeat(4)[:4]
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    precision = rotation * curvature @ rotation.mT
    top = torch.tensor([1.2, 0.4, 1.1, 2.0], dtype=torch.float64)  # data units
    for unit in (1e-4, 1.0, 1e4):
        problem = quadratic(unit * precision, top)
        start = torch.randn(3, 4, dtype=torch.float64)
        found = conjugate_ascent(problem, start, rank, reach=100.0)
        assert (problem.prior.to_data(found) - top).abs().max() < 1e-9
        short = conjugate_ascent(problem, start, rank - 1, reach=100.0)
        assert (problem.prior.to_data(short) - top).abs().max() > 1e-3


def test_backward_part_alone_is_exact_in_a_run():
    """The result of the whole sampler is the measurement itself, where it is complete; no gradient of the network."""
    y = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    prior = Gaussian([0.5, -0.3], [[1.0, 0.6], [0.6, 0.5]])
    problem = Problem(prior, Likelihood(Identity(), y, 0.2))
    solver = UniversalGuidance(20, guidance_scale=0.0, num_backward_steps=1)
    result = driver.run(solver, problem, 4, progress=False)
    assert (result.samples - y).abs().max() < 1e-9
    assert result.manifest["vjp_calls"] == 0


def test_backward_part_does_not_go_beyond_its_reach_nor_down():
    rising = Problem(Gaussian(torch.zeros(4), torch.eye(4)), reward=as_reward(lambda x: x.sum(1)))
    start = torch.randn(3, 4, dtype=torch.float64)
    far = conjugate_ascent(rising, start, 5, reach=2.0)
    assert (far - start).norm(dim=1).tolist() == pytest.approx([2.0] * 3)
    wavy = Problem(rising.prior, reward=as_reward(lambda x: (5 * x).sin().sum(1) - x[:, 0].exp()))
    values = [wavy.evaluate(conjugate_ascent(wavy, start, k, 3.0))[0] for k in range(12)]
    assert all((after >= before).all() for before, after in pairwise(values))
    log = Problem(rising.prior, reward=as_reward(lambda x: (x + 4).log().sum(1) - 9 * x.sum(1)))
    inside = conjugate_ascent(log, start, 9, reach=100.0)  # steps out of the domain are not taken
    assert (log.evaluate(inside)[0] > log.evaluate(start)[0] + 10).all()


def test_adam_is_torch_adam_on_each_row():
    problem = quadratic(torch.eye(4).double(), torch.ones(4).double())
    start = torch.randn(3, 4, dtype=torch.float64)
    alone = [adam_ascent(problem, row[None], 7, 0.1) for row in start]
    assert torch.allclose(adam_ascent(problem, start, 7, 0.1), torch.cat(alone), atol=1e-14)
    first = adam_ascent(problem, start, 1, 0.1) - start  # the sign of the gradient, times the rate
    uphill = problem.gradient(start)[2].sign()
    assert torch.allclose(first, 0.1 * uphill, atol=1e-6)


# ---- repetition


def prior_ratio(visits: int) -> Tensor:
    """Sample over exact standard deviation of 20 samples with 512 independent coordinates, of two variances, (2,)."""
    std = torch.tensor([1.0, 0.3], dtype=torch.float64)
    prior = Gaussian(torch.zeros(512), torch.diag(std.repeat_interleave(256) ** 2))
    problem = Problem(prior, reward=as_reward(lambda x: 0 * x.sum(1)))
    solver = replace(PAPER, num_recurrences=visits, guidance_scale=0.0)
    result = driver.run(solver, problem, 20, progress=False)
    assert result.nfe == 200 * visits
    return result.samples.reshape(20, 2, 256).std((0, 2)) / std


@pytest.mark.slow
@pytest.mark.parametrize("visits", [1, 5])
def test_repetition_leaves_the_prior_as_it_is(visits: int):
    """Without guidance; 1 to 2 % are this grid's own, the standard error of a ratio is 1 %."""
    assert prior_ratio(visits).tolist() == pytest.approx([1.0, 1.0], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [1.1, 0.9])
def test_planted_bug_in_the_repetition_is_caught(fault: float, monkeypatch: pytest.MonkeyPatch):
    """Too much or too little noise on the way up changes the prior."""

    def wrong(x: Tensor, b: float, a: float, n: Tensor) -> Tensor:
        return x + fault * (a**2 - b**2) ** 0.5 * n

    monkeypatch.setattr(universal_guidance, "renoise", wrong)
    assert (prior_ratio(5) - 1).abs().max() > 0.05


GOLDEN = {
    "forward, once": (PAPER, (0.19, 0.25), (0.20, 0.77)),
    "forward, five times": (replace(PAPER, num_recurrences=5), (0.035, 0.042), (0.87, 0.93)),
    "backward, once": (
        replace(PAPER, guidance_scale=0.0, num_backward_steps=2),
        (0.08, -0.24),
        (0.01, 1.26),
    ),
    "backward, five times": (
        replace(PAPER, guidance_scale=0.0, num_backward_steps=2, num_recurrences=5),
        (0.08, -0.01),
        (0.00, 0.95),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name: str):
    solver, mean, std = GOLDEN[name]
    # Two of our backward steps reach the top, as 20 steps of plain gradient descent nearly do there.
    found = moments(solver, 2000 // solver.num_recurrences)
    print(name, found)
    assert found[0] == pytest.approx(mean, abs=0.03 + 0.04)
    assert found[1] == pytest.approx(std, abs=0.05 + 0.05)


def test_defaults_are_close_to_the_posterior():
    """The bias that is left is some percent; without repetition and adaptive strength it is 0.2, and a ratio of 0.2."""
    mean, std = moments(UniversalGuidance())
    assert max(map(abs, mean)) < 0.06
    assert all(0.85 < ratio < 1.1 for ratio in std)


# ---- the step


def one_step(solver: UniversalGuidance) -> Tensor:
    """State after one step with two visits, from 2 to 1, of a Gaussian with its first coordinate measured."""
    problem = gaussian_2d().problem().rows(torch.tensor([0]))
    noise = Noise(0, ((0, 0),), (2,), torch.float64).at(0)
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    state = solver.init(problem, noise.at(-1))._replace(x=x)
    return solver.step(problem, state, 0, noise)[0].x


def expected_step() -> Tensor:
    """D + a^2 J A^T r / sigma_y^2, the flow's step, up again by sqrt(a^2 - b^2) n, and once more."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    jacobian = covariance @ torch.linalg.inv(covariance + 4 * torch.eye(2))
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    noise = Noise(0, ((0, 0),), (2,), torch.float64).at(0)
    for visit in range(2):
        x = x + 3**0.5 * noise("renoise 1") if visit else x
        denoised = mean + (x - mean) @ jacobian.mT
        denoised = denoised + 4 * (1.5 - denoised[:, :1]) / 0.09 * jacobian[:, 0]
        x = denoised + 0.5 * (x - denoised)
    return x


STEP = UniversalGuidance(2, 2, weight="likelihood", schedule=(2.0, 1.0, 0.0))


def test_step_against_the_closed_form():
    assert (one_step(STEP) - expected_step()).abs().max() < 1e-10


class HalfStrength(UniversalGuidance):
    def _strength(self, *arguments) -> Tensor:
        return 0.5 * super()._strength(*arguments)


class NoChainRule(UniversalGuidance):
    def _forward(self, problem: Problem, x: Tensor, a: float, b: float):
        denoised, info = super()._forward(problem, x, a, b)
        guidance = problem.guide(x, a)
        return denoised + a**2 * (guidance.slope - guidance.gradient), info


@pytest.mark.parametrize("bug", [HalfStrength, NoChainRule])
def test_planted_bugs_in_the_step_are_caught(bug: type[UniversalGuidance]):
    wrong = bug(2, 2, weight="likelihood", schedule=(2.0, 1.0, 0.0))
    assert (one_step(wrong) - expected_step()).abs().max() > 1e-2


# ---- rows, states, arguments


def test_float32_and_images():
    y = torch.rand(2, 3, 8, 8)
    prior = Gaussian(torch.zeros(3, 8, 8), 0.1 * torch.eye(192), scale=0.5, shift=0.5).float()
    problem = Problem(prior, Likelihood(Identity(), y, 0.1))
    result = driver.run(UniversalGuidance(10, num_backward_steps=2), problem, 2, progress=False)
    assert result.samples.dtype == torch.float32
    assert (result.samples - y[:, None]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "official"}, "weight is 'official'"),
        ({"optimiser": "adm"}, "optimiser is 'adm'; did you mean 'adam'"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"num_recurrences": 0}, "num_recurrences is 0"),
        ({"num_backward_steps": -1}, "num_backward_steps is -1"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        UniversalGuidance(**settings)


def test_unconditional_is_the_flow_without_guidance():
    problem = Problem(gaussian_2d().prior, reward=as_reward(lambda x: 0 * x.sum(1)))
    ours = driver.run(UniversalGuidance(20, 1, guidance_scale=0.0), problem, 3, progress=False)
    theirs = driver.run(Unconditional(20, eta=0.0), problem, 3, progress=False)
    assert torch.equal(ours.samples, theirs.samples)
