"""Every solver against closed forms, and planted bugs that these tests must catch.

The golden numbers are those of independent implementations in numpy on a 2-D Gaussian (prior mean (0.5, -0.3),
covariance [[1, 0.6], [0.6, 0.5]], x_0 measured as 1.5 with sigma_y = 0.3). Tolerances: 0.03 on means and 0.05 on ratios
are the scatter between implementations; 2000 samples add about 0.01 (one standard error of a mean) and 0.016 (of a
ratio).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.api import load_prior
from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.images.reading import read_picture
from invguide.likelihood import Likelihood
from invguide.operators import HDR, JPEG
from invguide.problem.problem import Problem, TargetGradient
from invguide.restoration.demo import PHOTO
from invguide.schedule import make_sigmas
from invguide.solver import Solver
from invguide.solvers import DPS, HQS, DiffPIR, REDDiff, Unconditional, __all__
from invguide.solvers.red_diff import adam
from invguide.verify.targets import Target, gaussian_2d

EDM = tuple(make_sigmas("karras", 200, 0.002, 80.0).tolist())
DDPM = tuple(make_sigmas("vp-linear", 1000, 0.01, 157.4).tolist())


@pytest.fixture(scope="module")
def target() -> Target:
    return gaussian_2d()


def moments(solver: Solver, target: Target, count: int = 2000) -> tuple[list[float], list[float]]:
    """Mean error and ratio of standard deviations, per coordinate."""
    result = driver.run(
        solver, target.problem(), count, batch_size=count, progress=False, on_nonfinite="drop"
    )
    samples = result.samples[result.finished]
    assert len(samples) > 0.99 * count
    error = samples.mean(0) - target.posterior.mean
    return error.tolist(), (samples.std(0) / target.posterior.std).tolist()


@dataclass(frozen=True)
class Golden:
    solver: Solver
    mean: tuple[float, float]
    std: tuple[float, float]
    count: int = 2000


GOLDEN = {
    "DPS likelihood, ancestral": Golden(
        DPS(200, weight="likelihood", schedule=EDM), (0.084, 0.108), (0.71, 0.88)
    ),
    "DPS likelihood, flow": Golden(
        DPS(200, weight="likelihood", schedule=EDM, eta=0.0), (0.19, 0.26), (0.20, 0.77)
    ),
    "DPS official 0.1": Golden(
        DPS(1000, weight="official", guidance_scale=0.1, schedule=DDPM),
        (0.08, 0.11),
        (0.20, 0.85),
        800,
    ),
    "DPS official 0.3": Golden(
        DPS(1000, weight="official", guidance_scale=0.3, schedule=DDPM),
        (0.08, 0.11),
        (0.60, 0.86),
        800,
    ),
    "DiffPIR Bayes": Golden(
        DiffPIR(1000, lam=1.0, zeta=1.0, schedule=DDPM), (0.0, 0.0), (0.70, 0.70), 800
    ),
    "DiffPIR released": Golden(
        DiffPIR(200, lam=7.0, zeta=0.3, schedule=EDM), (-0.25, -0.21), (1.92, 1.25)
    ),
    "RED-diff official": Golden(
        REDDiff(1000, weight="official"), (0.083, 0.05), (0.02, 0.47), 800
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name: str, target: Target) -> None:
    golden = GOLDEN[name]
    mean, std = moments(golden.solver, target, golden.count)
    print(name, mean, std)
    assert mean == pytest.approx(golden.mean, abs=0.03 + 2 / golden.count**0.5 * 0.41)
    assert std == pytest.approx(golden.std, abs=0.05 + 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_unconditional_returns_the_prior(eta: float, target: Target) -> None:
    result = driver.run(
        Unconditional(200, eta=eta, schedule=EDM),
        target.problem(),
        2000,
        batch_size=2000,
        progress=False,
    )
    samples = result.samples[0]
    # 0.98 is the known discretisation deficit of this grid.
    assert (samples.std(0) / torch.tensor([1.0, 0.5**0.5])).tolist() == pytest.approx(
        [0.985, 0.98], abs=0.04
    )
    assert samples.mean(0).tolist() == pytest.approx([0.5, -0.3], abs=0.08)


@pytest.mark.parametrize(
    "solver", [DPS(100, guidance_scale=0.0), DPS(100, guidance_scale=0.0, weight="official")]
)
def test_dps_without_guidance_is_unconditional(solver: DPS, target: Target) -> None:
    ours = driver.run(solver, target.problem(), 5, progress=False).samples
    assert torch.equal(
        ours, driver.run(Unconditional(100), target.problem(), 5, progress=False).samples
    )


def test_default_dps_is_close_to_the_posterior(target: Target) -> None:
    """Far closer than the likelihood weight (mean 0.08 off and ratio 0.71, above); the bias left is some percent."""
    mean, std = moments(DPS(), target)
    assert max(map(abs, mean)) < 0.06
    assert all(0.88 < ratio < 1.05 for ratio in std)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_default_dps_is_stable_whatever_its_scale(scale: float, target: Target) -> None:
    mean, std = moments(DPS(guidance_scale=scale), target, 500)
    assert max(map(abs, mean)) < 0.3
    assert max(std) < 1.3


def test_dps_step_against_the_closed_form(target: Target) -> None:
    """One likelihood-weighted step in closed form: D + a^2 J A^T r / sigma_y^2, then the ancestral draw."""
    assert _step_error(DPS(2, weight="likelihood", schedule=(2.0, 1.0, 0.0)), target) < 1e-10


class HalfGradient(DPS):
    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        return 0.5 * super()._strength(problem, guidance, a, b)


class WrongSign(DPS):
    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        return -super()._strength(problem, guidance, a, b)


class NoChainRule(DPS):
    def step(self, problem, state, k, noise):
        class Flat:
            def __getattr__(self, name: str):
                return getattr(problem, name)

            def guide(self, x: Tensor, sigma: float) -> TargetGradient:
                guidance = problem.guide(x, sigma)
                return guidance._replace(gradient=guidance.slope)

        return super().step(Flat(), state, k, noise)  # type: ignore[arg-type]


@pytest.mark.parametrize("bug", [HalfGradient, WrongSign, NoChainRule])
def test_planted_bugs_in_dps_are_caught(bug: type[DPS], target: Target) -> None:
    assert _step_error(bug(2, weight="likelihood", schedule=(2.0, 1.0, 0.0)), target) > 1e-2


def _step_error(solver: DPS, target: Target) -> float:
    problem = target.problem().rows(torch.tensor([0]))
    from invguide.rng import Noise

    noise = Noise(0, ((0, 0),), (2,), torch.float64).at(0)
    x = torch.tensor([[1.3, -2.0]], dtype=torch.float64)
    state = solver.init(problem, noise.at(-1))._replace(x=x)
    after, _ = solver.step(problem, state, 0, noise)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
    jacobian = covariance @ torch.linalg.inv(covariance + 4 * torch.eye(2))
    denoised = mean + (x - mean) @ jacobian.T
    guided = denoised + 4 * (1.5 - denoised[:, :1]) / 0.09 * jacobian[:, 0]
    expected = guided + 0.25 * (x - guided) + (1 * 3 / 4) ** 0.5 * noise()
    return float((after.x - expected).abs().max())


def test_red_diff_reaches_the_fixed_point_of_one_level(target: Target) -> None:
    """With the level frozen, plain Bayes weights and many steps, the mean over seeds solves a 2 x 2 system."""
    s, weight = 0.5, 0.25
    solver = REDDiff(1500, prior_weight=weight, sigma_start=s, sigma_end=s, learning_rate=0.02)
    result = driver.run(solver, target.problem(), 200, batch_size=200, progress=False)
    prior = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    m = torch.tensor([0.5, -0.3], dtype=torch.float64)
    precision = torch.linalg.inv(prior + s**2 * torch.eye(2))
    data = torch.tensor([[1 / 0.09, 0], [0, 0]], dtype=torch.float64)
    exact = torch.linalg.solve(
        data + weight * precision,
        data @ torch.tensor([1.5, 0.0]).double() + weight * precision @ m,
    )
    # Adam is no plain gradient flow: noisy coordinates move more slowly; its rate falls to zero within the run.
    assert (result.samples[0].mean(0) - exact).abs().max() < 0.05


def test_adam_is_torch_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    reference = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([reference], lr=0.1, betas=(0.9, 0.99))
    x, first, second = start, torch.zeros(5), torch.zeros(5)
    for k in range(10):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        reference.grad = gradient.clone()
        optimiser.step()
        x, first, second = adam(x, gradient, first, second, k, 0.1)
    assert torch.allclose(x, reference.detach(), atol=1e-12)


def test_hqs_converges_to_the_map_of_a_gaussian(target: Target) -> None:
    """At a frozen level the fixed point solves data + lam / s^2 (I - J) x = ..., by hand."""
    s, lam = 0.4, 0.5
    solver = HQS(400, lam=lam, sigma_start=s, sigma_end=s)
    x = driver.run(solver, target.problem(), 1, progress=False).samples[0, 0]
    prior = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    m = torch.tensor([0.5, -0.3], dtype=torch.float64)
    jacobian = prior @ torch.linalg.inv(prior + s**2 * torch.eye(2))
    data = torch.tensor([[1 / 0.09, 0], [0, 0]], dtype=torch.float64)
    # x = (data + rho)^-1 (data y + rho z), z = m + J (x - m), rho = lam / s^2; solver returns z.
    rho = lam / s**2 * torch.eye(2, dtype=torch.float64)
    y = torch.tensor([1.5, 0.0], dtype=torch.float64)
    fixed = torch.linalg.solve(data + rho - rho @ jacobian, data @ y + rho @ (m - jacobian @ m))
    assert torch.allclose(x, m + jacobian @ (fixed - m), atol=1e-6)


def test_every_public_solver_is_tested_here_or_in_its_own_file() -> None:
    here = {type(s).__name__ for s in (DPS(), HQS(), DiffPIR(), REDDiff(), Unconditional())}
    modules = {name: Solver.registry[name].__module__.rpartition(".")[2] for name in __all__}
    here |= {"ExactPosterior", "PosteriorMean"}  # test_policy.py, beside what takes them
    own = {n for n, m in modules.items() if Path(__file__).with_name(f"test_{m}.py").exists()}
    assert set(__all__) == here | own


@pytest.mark.parametrize("name", __all__)
def test_solvers_are_values_with_full_docstrings(name: str) -> None:
    kind = Solver.registry[name]
    solver = kind()
    assert replace(solver, num_steps=7).num_steps == 7
    assert hash(solver) == hash(kind())
    for section in ("Algorithm:", "Source:", "Differences:", "Bias:"):
        assert section in str(kind.__doc__), f"{name} lacks {section}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPS(weight="norm"), "DPS: weight is 'norm'; choose one of: adaptive"),
        (lambda: DPS(guidance_scale=-1.0), "guidance_scale is -1"),
        (lambda: DiffPIR(zeta=2.0), "zeta is 2"),
        (lambda: DiffPIR(lam=0.0), "lam is 0"),
        (lambda: HQS(sigma_end=2.0), "sigma_end"),
        (lambda: REDDiff(weight="?"), "REDDiff: weight is '?'"),
        (lambda: REDDiff(learning_rate=0.0), "learning_rate is 0"),
    ],
)
def test_constructors_validate(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("operator", [HDR(), JPEG(quality=20)], ids=["HDR", "JPEG"])
def test_dps_survives_operators_whose_slopes_hold_nearby_only(operator: Operator) -> None:
    """Clipping and quantisation: without the bound on its step, DPS lost these samples at high noise levels."""
    x = read_picture(PHOTO).values[..., 64:96, 64:96]
    y = operator(x) + 0.025 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    problem = Problem(
        load_prior("natural-tiny"), Likelihood(operator, y, 0.025), shape=(3, 32, 32)
    )
    result = driver.run(DPS(num_steps=30), problem, 2, progress=False)
    blank = Likelihood(operator, y, 0.025).chi2(torch.full_like(x, 0.5))
    assert (result.chi2 < 0.1 * blank).all()
