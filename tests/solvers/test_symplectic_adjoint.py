"""SymplecticAdjoint: one inner step is DPS, one step by hand, windows, repetition, and where more inner steps help."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.bench.angles import class_target, mask_target, measure_angles, modes_target
from invguide.errors import CompatibilityError, InputError
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solvers import DPS, SymplecticAdjoint, Unconditional, symplectic_adjoint
from invguide.verify.targets import gaussian_2d, mixture_1d

SINE = as_reward(lambda x: x.sin().sum(1))


# ---- one inner step


@pytest.mark.parametrize("weight", ["adaptive", "likelihood"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_inner_step_is_dps(weight: str, eta: float):
    """To the last bit, and with as many network calls: same draws, same arithmetic."""
    settings = {"weight": weight, "eta": eta, "guidance_scale": 0.7}
    problem = gaussian_2d().problem()
    ours = driver.run(SymplecticAdjoint(30, 1, **settings), problem, 5, progress=False)
    theirs = driver.run(DPS(30, **settings), problem, 5, progress=False)
    assert torch.equal(ours.samples, theirs.samples)
    assert ours.nfe == theirs.nfe
    assert ours.manifest["vjp_calls"] == theirs.manifest["vjp_calls"]


def test_one_inner_step_is_dps_on_a_reward():
    problem = Problem(mixture_1d().prior, reward=SINE)
    ours = driver.run(SymplecticAdjoint(30, 1), problem, 5, progress=False)
    assert torch.equal(ours.samples, driver.run(DPS(30), problem, 5, progress=False).samples)


# ---- one step by hand


def one_step(solver: SymplecticAdjoint) -> Tensor:
    problem = gaussian_2d().problem().rows(torch.tensor([0]))
    noise = Noise(0, ((0, 0),), (2,), torch.float64).at(0)
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    state = solver.init(problem, noise.at(-1))._replace(x=x)
    return solver.step(problem, state, 0, noise)[0].x


def expected_step() -> Tensor:
    """D + a^2 M^T A^T r / sigma_y^2 with M the matrix of two flow steps, 2 to 0.5 to 0; then down to 1."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    high, low = (covariance @ torch.linalg.inv(covariance + s**2 * eye) for s in (2.0, 0.5))
    matrix = low @ (high + 0.25 * (eye - high))
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    end = mean + (x - mean) @ matrix.mT
    denoised = mean + (x - mean) @ high.mT
    guided = denoised + 4 * (1.5 - end[:, :1]) / 0.09 * matrix[0]
    return guided + 0.5 * (x - guided)


# Levels 2, 1, 0.5, 0.2, 0: two inner steps from 2 take every second of them.
STEP = SymplecticAdjoint(4, 2, weight="likelihood", eta=0.0, schedule=(2.0, 1.0, 0.5, 0.2, 0.0))


def test_step_against_the_closed_form():
    assert (one_step(STEP) - expected_step()).abs().max() < 1e-10


def half(guide):
    def wrong(*arguments):
        denoised, guidance = guide(*arguments)
        return denoised, guidance._replace(gradient=0.5 * guidance.gradient)

    return wrong


def no_chain_rule(guide):
    def wrong(*arguments):
        denoised, guidance = guide(*arguments)
        return denoised, guidance._replace(gradient=guidance.slope)

    return wrong


def first_call_only(guide):
    """The clean estimate of the roll-out with the gradient of one call: what forgetting the chain of steps gives."""

    def wrong(problem, x, levels, method):
        denoised, guidance = guide(problem, x, levels, method)
        return denoised, guidance._replace(gradient=problem.guide(x, levels[0]).gradient)

    return wrong


@pytest.mark.parametrize("bug", [half, no_chain_rule, first_call_only])
def test_planted_bugs_are_caught(bug, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(symplectic_adjoint, "guide_through", bug(symplectic_adjoint.guide_through))
    assert (one_step(STEP) - expected_step()).abs().max() > 1e-2


@pytest.mark.parametrize("n", [2, 32])
def test_jacobian_of_many_inner_steps(n: int):
    """On N(0, s^2), a roll-out's Jacobian tends to s / sqrt(s^2 + a^2), far above that of one call, its square."""
    problem = Problem(Gaussian([0.0], [[1.0]]), reward=as_reward(lambda x: x.sum(1)))
    solver = SymplecticAdjoint(256, n, schedule=(*torch.logspace(1, -2, 256).tolist(), 0.0))
    levels = solver.inner_levels(problem, 0)
    assert len(levels) == n + 1
    _, guidance = symplectic_adjoint.guide_through(
        problem, torch.ones(1, 1, dtype=torch.float64), levels
    )
    flow = 1 / 101**0.5
    assert guidance.gradient.item() == pytest.approx(flow, rel=0.1 if n == 32 else 0.8)
    assert guidance.gradient.item() > 1.5 * flow**2


# ---- inner levels, window, repetition


@pytest.mark.parametrize("n", [1, 3, 7, 100])
def testinner_levels_are_levels_of_the_run(n: int):
    problem = gaussian_2d().problem()
    solver = SymplecticAdjoint(20, n)
    schedule = [problem.levels("karras", 20, k)[0] for k in range(20)]
    for k in range(20):
        levels = solver.inner_levels(problem, k)
        assert len(levels) == min(n, 20 - k) + 1
        assert levels[0] == schedule[k]
        assert levels[-1] == 0
        assert set(levels[:-1]) <= set(schedule)
        assert levels == sorted(set(levels), reverse=True)


def test_outside_the_window_is_the_prior():
    problem = gaussian_2d().problem()
    infos = []
    solver = SymplecticAdjoint(10, 2, window=(0.3, 0.7))
    run = driver.run(
        solver, problem, 3, progress=False, callbacks=[lambda report: infos.append(report.info)]
    )
    guided = [not bool(info.chi2.isnan().any()) for info in infos]
    assert guided == [False] * 3 + [True] * 4 + [False] * 3
    assert run.nfe == 6 + 4 * 2 * 2
    late = driver.run(
        SymplecticAdjoint(10, 2, window=(0.999, 1.0)), problem, 3, progress=False
    ).samples
    assert torch.equal(late, driver.run(Unconditional(10), problem, 3, progress=False).samples)


@pytest.mark.slow
@pytest.mark.parametrize("visits", [1, 4])
def test_repetition_without_guidance_leaves_the_prior_as_it_is(visits: int):
    """20 samples with 512 independent coordinates: the standard error of a ratio is 1 %, 2 % are this grid's."""
    std = torch.tensor([1.0, 0.3], dtype=torch.float64)
    prior = Gaussian(torch.zeros(512), torch.diag(std.repeat_interleave(256) ** 2))
    problem = Problem(prior, reward=as_reward(lambda x: 1e-200 * x.sum(1)))
    solver = SymplecticAdjoint(200, 1, num_recurrences=visits, eta=0.0)
    samples = driver.run(solver, problem, 20, progress=False).samples
    ratio = samples.reshape(20, 2, 256).std((0, 2)) / std
    assert ratio.tolist() == pytest.approx([1.0, 1.0], abs=0.03)


def test_normalised_step_does_not_depend_on_the_scale_of_the_reward():
    prior = mixture_1d().prior
    solver = SymplecticAdjoint(20, 3, weight="normalised", guidance_scale=0.3, eta=0.0)
    runs = [
        driver.run(solver, Problem(prior, reward=scale * SINE), 4, progress=False).samples
        for scale in (1.0, 1000.0)
    ]
    assert torch.allclose(*runs, atol=1e-10)
    # From 2 to 1, a quarter of the way that D pulls x, uphill.
    problem = gaussian_2d().problem().rows(torch.tensor([0]))
    steps = [replace(STEP, weight="normalised", guidance_scale=scale) for scale in (0.25, 0.0)]
    guided, plain = map(one_step, steps)
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    pull = problem.denoise(x, 2.0) - x
    assert (guided - plain).norm().item() == pytest.approx(0.25 * 0.5 * pull.norm().item())


def test_default_strength_is_close_to_the_posterior():
    target = gaussian_2d()
    run = driver.run(SymplecticAdjoint(), target.problem(), 1000, batch_size=1000, progress=False)
    error = (run.mean[0] - target.posterior.mean).abs().max()
    ratio = run.samples[0].std(0) / target.posterior.std
    assert error < 0.06
    assert all(0.8 < r < 1.1 for r in ratio.tolist())


# ---- where more inner steps help


def test_angle_to_the_exact_gradient():
    """What `invguide.bench.angles` prints, on fewer points; standard errors of differences are about a degree.

    Before classes of several narrow modes are decided, at noise as large as the data, every doubling of the inner
    steps turns the guidance towards the gradient of log p(y | x), by less and less. It is no law: projections of far
    modes are followed best by one step.
    """
    n = (1, 2, 4, 8, 16)
    classes = measure_angles([class_target(i) for i in range(10)], "prior", 1.0, n, 40)
    assert classes[4] < classes[1] - 4
    assert list(classes.values()) == sorted(classes.values(), reverse=True)
    assert classes[8] - classes[16] < classes[2] - classes[4]
    masked = measure_angles([mask_target(i) for i in range(5)], "posterior", 1.0, (1, 4), 40)
    assert masked[4] < masked[1] - 2
    modes = measure_angles([modes_target(i) for i in range(5)], "prior", 1.0, (1, 4), 40)
    assert modes[4] > modes[1] + 5


def test_exact_gradient_of_the_class_is_the_one_of_the_mixture():
    """The oracle of the angles itself: log p(class | x) at level a is log of the sub-mixture over the mixture."""
    target = class_target()
    x = target.prior.sample(3) + 2.0
    start = x.clone().requires_grad_()
    sub = target.posterior.log_prob(start, 2.0) - target.prior.log_prob(start, 2.0)
    (expected,) = torch.autograd.grad(sub.sum(), start)
    assert torch.allclose(target.exact_gradient(x, 2.0), expected, atol=1e-10)


# ---- rows, states, arguments


def test_float32_and_images():
    y = torch.rand(2, 3, 8, 8)
    prior = Gaussian(torch.zeros(3, 8, 8), 0.1 * torch.eye(192), scale=0.5, shift=0.5).float()
    result = driver.run(
        SymplecticAdjoint(20), Problem(prior, Likelihood(Identity(), y, 0.1)), 2, progress=False
    )
    assert result.samples.dtype == torch.float32
    assert result.chi2.max() < 2


def test_black_boxes_are_refused():
    problem = Problem(mixture_1d().prior, reward=as_reward(lambda x: x.sum(1), False))
    with pytest.raises(CompatibilityError, match="black box"):
        driver.run(SymplecticAdjoint(), problem, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": "official"}, "weight is 'official'"),
        ({"method": "hun"}, "method is 'hun'; did you mean 'heun'"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"num_inner_steps": 0}, "num_inner_steps is 0"),
        ({"num_recurrences": 0}, "num_recurrences is 0"),
        ({"window": (0.5, 1.5)}, r"window is \(0.5, 1.5\); expected \(start, end\)"),
        ({"window": (-0.1, 0.5)}, "window is"),
        ({"window": (0.7, 0.3)}, "window is"),
        ({"window": (0.3,)}, "window is"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        SymplecticAdjoint(**settings)
