"""Dreamguider: units of the reward do not matter, the length is exact, and views are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.errors import ContractError, InputError
from invguide.likelihood import Likelihood
from invguide.numerics.augmentation import AUGMENTATIONS, DRAWS, augment
from invguide.operators import Identity
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import as_reward
from invguide.rng import Noise
from invguide.solvers import Dreamguider, ECMGuidance, Unconditional, dreamguider
from invguide.testing import check_solver
from invguide.verify.targets import gaussian_2d

MIXTURE = GaussianMixture([[-1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], 0.1 * torch.eye(3).double())


def wavy(x: Tensor) -> Tensor:
    return (2 * x).sin().flatten(1).sum(1) + x.flatten(1)[:, 0]


def first_step(solver: Dreamguider | ECMGuidance, problem: Problem, x: Tensor, a: float) -> Tensor:
    """How far D moves in a step from level a to 0."""
    noise = Noise(0, tuple((0, i) for i in range(len(x))), x.shape[1:], x.dtype).at(0)
    state = solver.init(problem, noise.at(-1))._replace(x=x)
    return solver.step(problem, state, 0, noise)[0].denoised - problem.denoise(x, a)


# ---- direction and length


@pytest.mark.parametrize("unit", [1000.0, 1e-3])
def test_units_of_the_reward_do_not_matter(unit: float):
    def run(scale: float) -> Tensor:
        problem = Problem(MIXTURE, reward=as_reward(lambda x: scale * wavy(x)))
        return driver.run(Dreamguider(20), problem, 6, progress=False).samples

    # Rounding only, which a chaotic step could enlarge.
    assert torch.allclose(run(unit), run(1.0), atol=1e-9)
    unguided = driver.run(Unconditional(20), Problem(MIXTURE), 6, progress=False).samples
    assert (run(1.0) - unguided).abs().max() > 0.1


@pytest.mark.parametrize("a", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_length_on_a_plane(a: float, scale: float):
    """A linear reward has no best step: scale c(a) s sqrt(dim), along the slope, whatever its length."""
    prior = Gaussian(torch.zeros(4), 0.25 * torch.eye(4))
    slope = torch.tensor([3.0, 0.0, -4.0, 0.0], dtype=torch.float64)
    problem = Problem(prior, reward=as_reward(lambda x: x @ slope))
    x = torch.randn(5, 4, dtype=torch.float64)
    shift = first_step(Dreamguider(1, scale, schedule=(a, 0.0)), problem, x, a)
    expected = scale * a**2 / (a**2 + 0.25) * 0.5 * 4**0.5 * slope / 5
    assert torch.allclose(shift, expected.expand(5, 4), atol=1e-12)


def test_a_quadratic_is_not_overshot():
    """Its top is nearer than the full length: reached in one step, in direction and length."""
    y = torch.tensor([0.1, -0.2, 0.1], dtype=torch.float64)
    problem = Problem(
        Gaussian(torch.zeros(3), torch.eye(3)), Likelihood(Identity(), y[None], 1e-3)
    )
    x = 0.1 * torch.randn(5, 3, dtype=torch.float64)
    problem = problem.rows(torch.zeros(5, dtype=torch.long))
    shift = first_step(Dreamguider(1, schedule=(2.0, 0.0)), problem, x, 2.0)
    assert torch.allclose(problem.denoise(x, 2.0) + shift, y.expand(5, 3), atol=1e-9)


def test_without_views_it_is_ecm_up_to_a_factor():
    x = torch.randn(6, 3, dtype=torch.float64)
    problem = Problem(MIXTURE, reward=as_reward(wavy))
    ours = first_step(Dreamguider(1, schedule=(1.0, 0.0)), problem, x, 1.0)
    theirs = first_step(ECMGuidance(1, clip=10.0, schedule=(1.0, 0.0)), problem, x, 1.0)
    cosine = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    assert torch.allclose(cosine, torch.ones(6).double(), atol=1e-12)


def test_without_guidance_it_is_unconditional():
    problem = Problem(MIXTURE, reward=as_reward(wavy))
    ours = driver.run(Dreamguider(20, 0.0), problem, 5, progress=False).samples
    theirs = driver.run(Unconditional(20), problem, 5, progress=False).samples
    assert torch.allclose(ours, theirs, atol=1e-14)


# ---- planted bugs


def test_planted_bug_one_length_for_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Released codes of the family divide by the norm of the whole batch."""

    def wrong(x: Tensor) -> Tensor:
        return x.norm().expand(len(x))

    monkeypatch.setattr(dreamguider, "norm", wrong)
    with pytest.raises(ContractError, match="rows independent"):
        check_solver(Dreamguider(6), picture_problem())


def test_planted_bug_a_gradient_that_keeps_its_length_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dreamguider, "norm", lambda x: torch.ones(len(x), dtype=x.dtype))
    with pytest.raises(AssertionError):
        test_length_on_a_plane(1.0, 0.5)
    with pytest.raises(AssertionError):
        test_units_of_the_reward_do_not_matter(1e-3)


# ---- views


def images(count: int = 3, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(count, 2, height, width, dtype=torch.float64)


def uniforms(count: int, **values: float) -> Tensor:
    """0.5 everywhere, but for draws given by their number, as u5=0.1."""
    u = torch.full((count, DRAWS), 0.5, dtype=torch.float64)
    for name, value in values.items():
        u[:, int(name[1:])] = value
    return u


def test_views_by_hand():
    x = images()
    assert torch.equal(augment(x, (), uniforms(3)), x)
    assert torch.equal(augment(x, AUGMENTATIONS[:3], uniforms(3, u0=1.0)), x)
    assert torch.equal(augment(x, ("flip",), uniforms(3, u5=0.49)), x.flip(-1))
    down = augment(x, ("translate",), uniforms(3, u3=1.0))  # by an eighth of 8 rows
    assert torch.equal(down[..., :-1, :], x[..., 1:, :])
    assert torch.equal(down[..., -1, :], x[..., -2, :])  # mirrored
    cut = augment(x, ("cutout",), uniforms(3))
    assert torch.equal(cut[..., 2:6, 3:9], torch.zeros(3, 2, 4, 6).double())
    assert (cut != 0).double().mean() == 0.75
    ramp = torch.arange(9.0).double().expand(1, 1, 9, 9)  # three quarters of it, from the left
    crop = augment(ramp, ("crop",), uniforms(1, u0=0.0, u2=0.0))
    assert torch.allclose(crop, 0.75 * ramp)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_are_linear_and_each_sample_has_its_own(name: str):
    x, z, u = images(), images(), torch.rand(3, DRAWS)
    both = augment(2 * x - z, (name,), u)
    assert torch.allclose(both, 2 * augment(x, (name,), u) - augment(z, (name,), u), atol=1e-12)
    alone = [augment(x[i : i + 1], (name,), u[i : i + 1]) for i in range(3)]
    assert torch.allclose(augment(x, (name,), u), torch.cat(alone), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda v: augment(v, (name,), u), x[..., :4, :4].clone().requires_grad_()
    )


def picture_problem() -> Problem:
    prior = Gaussian(torch.zeros(1, 4, 4), torch.eye(16), scale=0.5, shift=0.5)
    weight = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)
    return Problem(
        prior, reward=as_reward(lambda x: (weight * x).sum((1, 2, 3)) - x.square().sum((1, 2, 3)))
    )


def test_gradient_is_the_mean_over_views():
    """Against differences of f, and f against views made one by one."""
    problem, solver = picture_problem(), Dreamguider(augmentations=AUGMENTATIONS)
    x0 = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    draws = solver._draws(Noise(0, ((0, 0), (0, 1)), (1, 4, 4), torch.float64))
    value, slope = solver._gradient(problem, x0, draws)
    views = [problem.evaluate(augment(x0, AUGMENTATIONS, u))[0] for u in draws]
    assert len(views) == 4
    assert torch.allclose(value, sum(views) / 4)
    way = 1e-4 * torch.randn_like(x0)
    rise = solver._evaluate(problem, x0 + way, draws) - solver._evaluate(problem, x0 - way, draws)
    assert torch.allclose(rise, 2 * (way * slope).flatten(1).sum(1), rtol=1e-7)


def test_views_change_the_run_and_differ_between_steps():
    problem = picture_problem()
    plain = driver.run(Dreamguider(5), problem, 2, progress=False).samples
    viewed = driver.run(Dreamguider(5, augmentations=("flip",)), problem, 2, progress=False)
    assert (plain - viewed.samples).abs().max() > 1e-3
    solver, noise = Dreamguider(augmentations=("flip",)), Noise(0, ((0, 0),), (1, 4, 4))
    first, second = (torch.stack(solver._draws(noise.at(k))) for k in (0, 1))
    assert (first - second).abs().min() > 0


# ---- rows, results, arguments


def test_defaults_come_near_a_posterior():
    """Which is luck as far as the spread goes; the mean within a fifth of its way from the prior."""
    target = gaussian_2d()
    run = driver.run(Dreamguider(), target.problem(), 800, batch_size=800, progress=False)
    error = run.samples[0].mean(0) - target.posterior.mean
    way = target.posterior.mean - torch.tensor([0.5, -0.3], dtype=torch.float64)
    assert (error.abs() < 0.2 * way.abs() + 0.03).all()


def test_float32():
    problem = Problem(
        Gaussian(torch.zeros(1, 4, 4), torch.eye(16)).float(), reward=as_reward(wavy)
    )
    result = driver.run(Dreamguider(5, augmentations=AUGMENTATIONS), problem, 2, progress=False)
    assert result.samples.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentations": ("flop",)}, "augmentations is .*flop.*; did you mean 'flip'"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"num_augmentations": 0}, "num_augmentations is 0"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        Dreamguider(**settings)


def test_views_are_refused_where_they_mean_nothing():
    solver = Dreamguider(augmentations=("flip",))
    with pytest.raises(InputError, match=r"shape \(3,\); expected pictures \(C, H, W\)"):
        driver.run(solver, Problem(MIXTURE, reward=as_reward(wavy)), 1, progress=False)
    y = torch.zeros(1, 1, 4, 4)
    measured = Problem(Gaussian(torch.zeros(1, 4, 4), torch.eye(16)), Likelihood(Identity(), y, 1))
    with pytest.raises(
        InputError, match=r"and a measurement; expected .* Leave augmentations out"
    ):
        driver.run(solver, measured, 1, progress=False)
