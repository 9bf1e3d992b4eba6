"""SCG against the unconditional sampler, golden numbers, closed forms of one step and exact tilted densities."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from invguide import driver
from invguide.errors import InputError
from invguide.priors import Gaussian
from invguide.problem.problem import Problem
from invguide.reverse import ancestral
from invguide.reward import Reward
from invguide.rng import Noise
from invguide.schedule import make_sigmas
from invguide.solvers import SCG, Unconditional
from invguide.solvers.scg import SCGState
from invguide.verify import TiltedPlane, black_box_targets, gaussian_2d, mixture_1d

EDM = tuple(make_sigmas("karras", 200, 0.002, 80.0).tolist())


def plane(name: str) -> TiltedPlane:
    (target,) = (t for t in black_box_targets() if t.name == name)
    assert isinstance(target, TiltedPlane)
    return target


class ForwardOnly(Reward):
    """-|x - 1|^2 of the first coordinate; refuses to be differentiated, and fails or rules out where it is told to."""

    differentiable = False

    def __init__(self, fails=lambda x: x[:, 0] > torch.inf, value: float = torch.nan) -> None:
        self.fails, self.value = fails, value

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad or torch.is_grad_enabled():
            raise RuntimeError("this reward must not be differentiated")
        score = -((x.flatten(1)[:, 0] - 1) ** 2)
        return torch.where(self.fails(x), self.value, score)


def standard(d: int = 2) -> Gaussian:
    return Gaussian(torch.zeros(d), torch.eye(d))


# ---- one candidate


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("select", ["greedy", "softmax"])
def test_one_candidate_is_the_unconditional_sampler_bit_for_bit(eta: float, select: str):
    target = gaussian_2d()
    ours = SCG(30, num_candidates=1, select=select, eta=eta, num_draws=3)
    result = driver.run(ours, target.problem(), 7, batch_size=3, progress=False)
    prior = Unconditional(30, eta=eta)
    expected = driver.run(prior, target.problem(), 7, batch_size=3, progress=False)
    assert torch.equal(result.samples, expected.samples)
    assert result.nfe == expected.nfe == 30


def test_outside_the_window_it_is_the_unconditional_sampler():
    """Guided in the last of four steps but one: up to there the states agree."""
    problem = gaussian_2d().problem()
    solver, prior = SCG(4, num_candidates=3, window=(0.5, 0.6)), Unconditional(4)
    noise = Noise(0, ((0, 0),), (2,), torch.float64)
    ours, theirs = solver.init(problem, noise), prior.init(problem, noise)
    values = []
    for k in range(4):
        ours, info = solver.step(problem, ours, k, noise.at(k))
        theirs, _ = prior.step(problem, theirs, k, noise.at(k))
        values.append(bool(info.value.isfinite().all()))
        assert torch.equal(ours.x, theirs.x) == (k < 2)
    assert values == [False, False, True, False]


def test_network_calls():
    result = driver.run(SCG(10, num_candidates=5), gaussian_2d().problem(), 2, progress=False)
    assert result.nfe == 1 + 9 * 5  # one at the start, then the winner's D is used again


# ---- golden numbers


@dataclass(frozen=True)
class Golden:
    solver: SCG
    mean: tuple[float, float]
    std: tuple[float, float]


GOLDEN = {
    "greedy, 2": Golden(SCG(num_candidates=2), (0.083, 0.115), (0.03, 0.82)),
    "greedy, 16": Golden(SCG(num_candidates=16), (0.083, 0.115), (0.0, 0.82)),
    "softmax, 16": Golden(SCG(num_candidates=16, select="softmax"), (0.088, 0.110), (0.76, 0.88)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_the_gaussian(name: str):
    """Tolerances as in test_solvers.py: scatter of implementations, and that of 300 samples (0.024; 4 % of a ratio)."""
    golden, target = GOLDEN[name], gaussian_2d()
    solver = replace(golden.solver, num_steps=200, schedule=EDM)
    samples = driver.run(solver, target.problem(), 300, progress=False).samples[0]
    mean = (samples.mean(0) - target.posterior.mean).tolist()
    std = (samples.std(0) / target.posterior.std).tolist()
    print(name, mean, std)
    assert mean == pytest.approx(golden.mean, abs=0.03 + 2 * 0.024)
    assert std == pytest.approx(golden.std, abs=0.05 + 2 * 0.04)


@pytest.mark.slow
def test_golden_numbers_of_the_mixture():
    """Greedy parks between the modes, at y; softmax finds both, the upper one too often (exact: 0.862)."""
    target = mixture_1d()
    x = {
        select: driver.run(
            SCG(200, select=select, schedule=EDM),
            target.problem(),
            300,
            progress=False,
        ).samples[0]
        for select in ("greedy", "softmax")
    }
    assert float((x["greedy"] - 0.5).abs().max()) < 0.01
    assert float((x["softmax"] > 0).double().mean()) == pytest.approx(0.924, abs=0.03 + 2 * 0.015)


# ---- the choice


def chosen_noise(solver: SCG, slope: float, rows: int = 60_000) -> float:
    """Mean of the chosen n among num_candidates standard normals valued slope * n."""
    n = torch.randn(rows, solver.num_candidates)
    index = solver._choose(slope * n, torch.rand(rows, solver.num_candidates))
    return float(n[torch.arange(rows), index].mean())


class PlainSoftmax(SCG):
    """Planted: without K / (K - 1)."""

    def _choose(self, value: Tensor, u: Tensor) -> Tensor:
        count = self.num_candidates
        return super()._choose(value * (count - 1) / count, u)


def test_greedy_takes_the_largest():
    # E[max of 16 standard normals] = 1.766; one standard error of 60 000 is 0.002.
    assert chosen_noise(SCG(num_candidates=16), 0.1) == pytest.approx(1.766, abs=0.01)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_softmax_tilts_by_the_target_whatever_the_candidates(count: int):
    """A weak slope g moves N(0, 1) by g, as N(n; 0, 1) exp(g n) does; four standard errors, and 2 g^3 of curvature."""
    solver = SCG(num_candidates=count, select="softmax")
    assert chosen_noise(solver, 0.1) == pytest.approx(0.1, abs=0.018)
    assert chosen_noise(replace(solver, temperature=2.0), 0.2) == pytest.approx(0.1, abs=0.018)
    if count == 2:  # planted
        bug = chosen_noise(PlainSoftmax(num_candidates=2, select="softmax"), 0.1)
        assert bug == pytest.approx(0.05, abs=0.018)


@pytest.mark.parametrize(
    "solver", [SCG(num_candidates=4), SCG(num_candidates=4, select="softmax")]
)
@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.inf])
def test_ties_are_broken_at_random(solver: SCG, value: float):
    counts = torch.bincount(solver._choose(torch.full((8000, 4), value), torch.rand(8000, 4)))
    # Five standard deviations of a binomial count of 8000 with probability 1/4.
    assert counts.tolist() == pytest.approx([2000] * 4, abs=5 * 39)


@pytest.mark.parametrize(
    "solver", [SCG(num_candidates=4), SCG(num_candidates=4, select="softmax")]
)
def test_failures_and_impossibilities_are_never_chosen(solver: SCG):
    nan, inf = torch.nan, torch.inf
    value = torch.tensor(
        [[nan, -1e9, nan, -inf], [-inf, nan, nan, -inf], [nan] * 4, [0.0, inf, 1.0, inf]]
    )
    index = solver._choose(value.repeat(50, 1), torch.rand(200, 4)).reshape(50, 4)
    assert {*index[:, 0].tolist()} == {1}
    assert {*index[:, 1].tolist()} == {0, 3}
    assert {*index[:, 2].tolist()} == {0}
    assert {*index[:, 3].tolist()} == {1, 3}
    # u = 0 is a legal draw.
    assert solver._choose(value, torch.zeros(4, 4)).tolist()[:1] == [1]


# ---- one step in closed form


def step_error(solver: SCG, kind: type[Gaussian] = Gaussian) -> float:
    """One greedy step from level 1.5 to 0.7 under a standard normal prior, by hand."""
    a, b = 1.5, 0.7
    problem = Problem(kind(torch.zeros(2), torch.eye(2)), reward=ForwardOnly())
    x = torch.tensor([[2.0, -1.0], [0.3, 0.2], [-1.0, 4.0]]).double()
    noise = Noise(0, ((0, 0), (0, 1), (0, 2)), (2,), torch.float64).at(0)
    denoised = x / (1 + a**2)
    with torch.no_grad():
        state, _ = solver.step(problem, SCGState(x, denoised), 0, noise)
    fresh = torch.cat([noise()[:, None], noise("candidates", (2, 2))], 1)
    candidates = ancestral(x[:, None], denoised[:, None], a, b, fresh)
    best = (candidates[..., 0] / (1 + b**2) - 1).abs().argmin(1)
    expected = candidates[torch.arange(3), best]
    error = (state.x - expected).abs().max() + (state.denoised - expected / (1 + b**2)).abs().max()
    return float(error)


STEP = SCG(3, num_candidates=3, schedule=(1.5, 0.7, 0.1, 0.0))


class FirstLevel(Gaussian):
    """Planted: candidates are denoised as if they were still at the upper level."""

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return super().denoise(x, 1.5)


class FirstCandidate(SCG):
    """Planted: no choice."""

    def _choose(self, value: Tensor, u: Tensor) -> Tensor:
        return torch.zeros(len(value), dtype=torch.long)


class Lowest(SCG):
    """Planted: a loss for a reward."""

    def _choose(self, value: Tensor, u: Tensor) -> Tensor:
        return super()._choose(-value, u)


def test_step_against_the_closed_form():
    assert step_error(STEP) < 1e-12
    assert step_error(STEP, FirstLevel) > 1e-2
    for bug in (FirstCandidate, Lowest):
        assert step_error(bug(3, num_candidates=3, schedule=STEP.schedule)) > 1e-2


# ---- blocks


class Sum(Reward):
    """A sum over entries, each with its own optimum."""

    differentiable = False

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return -((x - torch.arange(x.shape[1]) / 3) ** 2).sum(1)


def test_blocks_are_chosen_one_by_one():
    """With independent entries and a sum for a reward, each block takes its own best candidate, by hand."""
    problem, a, b = Problem(standard(6), reward=Sum()), 1.5, 0.7
    solver = replace(STEP, num_candidates=4, blocks=(4,))  # entries 0-1, 2, 3-4, 5
    noise = Noise(0, ((0, 0), (0, 1)), (6,), torch.float64).at(0)
    x = torch.randn(2, 6, dtype=torch.float64)
    state, info = solver.step(problem, SCGState(x, x / (1 + a**2)), 0, noise)
    fresh = torch.cat([noise()[:, None], noise("candidates", (3, 6))], 1)
    candidates = ancestral(x[:, None], x[:, None] / (1 + a**2), a, b, fresh)
    loss = (candidates / (1 + b**2) - torch.arange(6) / 3) ** 2
    for block in ([0, 1], [2], [3, 4], [5]):
        best = loss[:, :, block].sum(2).argmin(1)
        expected = candidates[torch.arange(2), best][:, block]
        torch.testing.assert_close(state.x[:, block], expected)
    torch.testing.assert_close(state.denoised, state.x / (1 + b**2))
    torch.testing.assert_close(info.value, Sum()(state.denoised))


def test_blocks_of_a_picture_cover_it_once():
    from invguide.solvers.scg import _masks

    masks = torch.stack(_masks((2, 3), torch.zeros(3, 5, 7)))
    assert masks.shape == (6, 3, 5, 7)
    assert bool((masks.sum(0) == 1).all())
    for mask in masks:  # a rectangle, the same in each channel
        rows, columns = mask[0].any(1), mask[0].any(0)
        assert torch.equal(mask, (rows[:, None] & columns).expand(3, 5, 7))
    assert [m.all() for m in _masks((), torch.zeros(2, 2))] == [True]


def test_blocks_raise_a_sum_further():
    problem = Problem(standard(12), reward=Sum())

    def reward(solver: SCG) -> float:
        return float(driver.run(solver, problem, 40, progress=False).log_prob.mean())

    whole, parts = SCG(20, num_candidates=4), SCG(20, num_candidates=4, blocks=(6,))
    # 40 samples know their mean to 0.2; a choice among 4^6 candidates gains several units.
    assert reward(parts) > reward(whole) + 1
    assert driver.run(parts, problem, 1, progress=False).nfe == 1 + 19 * 5


# ---- failures, gradients, rows


def test_where_every_candidate_fails_the_sampler_is_unconditional():
    candidates = ForwardOnly(lambda x: torch.full((len(x),), len(x) > 5))  # and not the samples
    problem = Problem(standard(), reward=candidates)
    infos = []
    ours = driver.run(
        SCG(8, num_candidates=3),
        problem,
        5,
        progress=False,
        callbacks=[lambda r: infos.append(r.info)],
    )
    prior = driver.run(Unconditional(8), problem, 5, progress=False)
    torch.testing.assert_close(ours.samples, prior.samples)
    assert [int(i.lost.sum()) for i in infos] == [5] * 7 + [0]
    assert [int(i.failed.sum()) for i in infos] == [15] * 7 + [0]


def test_some_failures_change_little():
    """Every fifth evaluation fails, whatever its value: the reward reached stays within the spread between seeds."""

    def reached(seed: int, fails) -> float:
        problem = Problem(standard(), reward=ForwardOnly(fails))
        run = driver.run(
            SCG(20, num_candidates=8, select="softmax"), problem, 60, seed=seed, progress=False
        )
        assert bool(run.samples.isfinite().all())
        return float(-((run.samples[0, :, 0] - 1) ** 2).mean())

    never = [reached(seed, lambda x: x[:, 0] > torch.inf) for seed in range(4)]
    often = [reached(seed, lambda x: (1e4 * x[:, 1]).long() % 5 == 0) for seed in range(4)]
    print(never, often)
    assert abs(sum(often) - sum(never)) / 4 < max(never) - min(never)


@pytest.mark.slow
def test_draws_look_around_d():
    """A white prior makes the smoothed value exact: softmax then has the variance that D alone gets too small."""
    target = gaussian_2d()
    at_d, around = (
        driver.run(
            SCG(100, select="softmax", num_draws=draws, schedule=EDM[::2]),
            target.problem(),
            300,
            progress=False,
        ).samples[0, :, 0]
        for draws in (0, 8)
    )
    exact = float(target.posterior.std[0])
    # 300 samples know a standard deviation to 4 %.
    assert float(at_d.std()) / exact == pytest.approx(0.76, abs=0.11)
    assert float(around.std()) / exact == pytest.approx(1.0, abs=0.11)


def test_rows_are_independent_and_batches_do_not_matter():
    problem = plane("checkerboard").problem()
    solver = SCG(6, num_candidates=3, num_draws=2, select="softmax")
    runs = [
        driver.run(solver, problem, 5, batch_size=size, progress=False).samples
        for size in (1, 2, 64)
    ]
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(runs[1], runs[2], rtol=1e-10, atol=1e-10)


# ---- tilted densities


@pytest.mark.slow
@pytest.mark.parametrize("name", ["staircase", "indicator", "checkerboard"])
def test_more_candidates_more_reward(name: str):
    """Greedy, 1 to 16 candidates; 300 samples know each mean to about 0.1."""
    target = plane(name)
    means = []
    for count in (1, 2, 4, 16):
        run = driver.run(SCG(30, num_candidates=count), target.problem(), 300, progress=False)
        means.append(float(run.log_prob.mean()))
    print(name, means)
    assert means == sorted(means)
    assert means[-1] > means[0] + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["staircase", "checkerboard"])
def test_softmax_is_nearer_to_the_tilted_density(name: str):
    """At 400 samples exact ones score 0.09; greedy 0.4, for it takes whatever the reward can give."""
    target = plane(name)

    def distance(solver: SCG) -> float:
        run = driver.run(solver, target.problem(), 400, progress=False)
        return target.distance(run.samples[0], torch.full((400,), 1 / 400))

    greedy = distance(SCG(40))
    softmax = distance(SCG(40, select="softmax", num_draws=4))
    print(name, greedy, softmax)
    assert softmax < 0.6 * greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "best"}, "select is 'best'"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"num_draws": -1}, "num_draws is -1"),
        ({"blocks": (2, 0)}, "blocks is"),
        ({"window": (0.5, 0.2)}, "window is"),
        ({"eta": 0.0}, "eta is 0"),
    ],
)
def test_constructor_validates(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        SCG(**settings)


def test_blocks_that_do_not_fit():
    problem = Problem(standard(3), reward=Sum())
    for blocks in ((4,), (1, 2)):
        with pytest.raises(InputError, match="entries along the last axes of x"):
            driver.run(SCG(3, blocks=blocks), problem, 1, progress=False)
