"""EnsembleTwisted: its parts against dense matrices, its weights against a filter written out, its samples against
exact posteriors; and the mistakes that these must catch.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from invguide import driver
from invguide.errors import DivergenceError, InputError
from invguide.forward_operator import Operator
from invguide.likelihood import Likelihood
from invguide.noise import LogDensity
from invguide.priors import Gaussian, GaussianMixture
from invguide.problem.problem import Problem
from invguide.reward import Reward
from invguide.rng import Noise
from invguide.sampling.linearisation import Slopes, linearise
from invguide.sampling.twist import Tangent, Twist, gaussian_twist, kernel, propose, reverse_step
from invguide.solvers import EnsembleTwisted, ensemble_twisted
from invguide.verify.distances import sliced_wasserstein, unweighted
from invguide.verify.targets import gaussian_2d, mixture_1d, mixture_25

DOUBLE = torch.float64


class Box(Operator):
    """A function without a gradient; NaN for a share of its calls, or where `lost` says so."""

    differentiable = False

    def __init__(self, function, d: int, share: float = 0.0, lost=None) -> None:
        super().__init__()
        self.function, self.d, self.share, self.lost = function, d, share, lost
        self.source = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        y = self.function(x)
        failed = torch.rand(len(x), generator=self.source) < self.share
        if self.lost is not None:
            failed |= self.lost(x)
        return torch.where(failed[:, None], torch.nan, y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.d,)


class Score(Reward):
    differentiable = False

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def hidden(target, **failures) -> Problem:
    """The target's problem with its operator as a black box."""
    box = Box(target.operator.forward, target.prior.shape[0], **failures)
    sigma_y = torch.full((1, 1), target.sigma_y, dtype=DOUBLE)
    return Problem(target.prior, Likelihood(box, target.y, sigma_y))


def observed(prior, function, y: float, sigma_y: float, m: int = 1, **failures) -> Problem:
    box = Box(function, prior.shape[0], **failures)
    noise = torch.full((1, 1), sigma_y, dtype=DOUBLE)
    return Problem(prior, Likelihood(box, torch.full((1, m), y, dtype=DOUBLE), noise))


def run(problem: Problem, seed: int = 0, **settings):
    """The whole ensemble; members of negligible weight may be anywhere, and are dropped."""
    return driver.run(
        EnsembleTwisted(**settings), problem, seed=seed, progress=False, on_nonfinite="drop"
    )


def standard(d: int = 2) -> Gaussian:
    return Gaussian(torch.zeros(d), torch.eye(d))


# ---- the linearisation


def blank(J: int, m: int, d: int) -> Slopes:
    return Slopes(torch.zeros(J, m, dtype=DOUBLE), torch.zeros(J, d, dtype=DOUBLE))


def test_linear_maps_are_learned_exactly() -> None:
    A, c, D, s = randn(3, 5), randn(3, seed=1), randn(20, 5, seed=2), randn(20, 5, seed=3)
    s = s * torch.tensor([1.0, 0.1, 1e-2, 1.0, 1.0])  # as unequal as a prior makes them
    here, there = c + D @ A.T, c + (D + s) @ A.T
    here[3], there[7] = torch.nan, torch.nan  # of the first no value, of the second no pair
    fit = linearise(D, s, here, there, blank(20, 3, 5))
    v, u = randn(20, 5, seed=4), randn(20, 3, seed=5)
    assert (fit.apply(v) - v @ A.T).abs().max() < 1e-8
    assert (fit.adjoint(u) - u @ A).abs().max() < 1e-8
    assert (fit.value - c - D @ A.T).abs().max() < 1e-8
    assert fit.error.max() < 1e-12


def test_fewer_pairs_than_dimensions_learn_a_linear_map_in_rounds() -> None:
    """Each round of 10 pairs in 30 dimensions is shrunk to the ones before; errors are out of sample."""
    A, known, errors = randn(2, 30), blank(10, 2, 30), []
    for k in range(60):
        D, s = randn(10, 30, seed=2 * k), randn(10, 30, seed=2 * k + 1)
        fit = linearise(D, s, D @ A.T, (D + s) @ A.T, known)
        known = fit.slopes
        errors.append(float(fit.error.mean()))
    assert known.left.shape == (10, 2)
    truth = float(A.square().sum(1).mean())  # variance of what the first rounds cannot know
    assert 0.3 * truth < errors[0] < 3 * truth
    assert errors[-1] < 1e-3 * truth
    assert (known.left.T @ known.axes - A).norm() < 0.05 * A.norm()


def test_slopes_and_errors_follow_a_function_around_the_particles() -> None:
    """sin(2 x_0) + x_1 in the plane: slopes as of autograd, error as of the curvature; adjoint is the transpose."""
    D, s = 2 * randn(800, 2), 0.15 * randn(800, 2, seed=1)

    def f(x: Tensor) -> Tensor:
        return 5 * (torch.sin(2 * x[:, :1]) + x[:, 1:])

    fit = linearise(D, s, f(D), f(D + s), blank(800, 1, 2))
    inner = (
        D.norm(dim=1) < 2.5
    )  # where there are neighbours; the mean slope over them is a little flatter
    slope = fit.adjoint(torch.ones(800, 1, dtype=DOUBLE))
    truth = 5 * torch.stack([2 * torch.cos(2 * D[:, 0]), torch.ones(800, dtype=DOUBLE)], 1)
    assert (slope - truth)[inner].square().mean() < 0.1 * truth[inner].square().mean()
    common = linearise(D[:20], s[:20], f(D)[:20], f(D + s)[:20], blank(20, 1, 2))
    assert common.local is None  # too few for any neighbours
    u, v = randn(800, 1, seed=2), randn(800, 2, seed=3)
    assert (u * fit.apply(v)).sum(1).allclose((v * fit.adjoint(u)).sum(1))


def test_a_value_that_says_nothing_about_its_surroundings_is_not_believed() -> None:
    """f = 3 sin(50 x): its mean over shifts of 1 is near 0 everywhere, whatever f(D)."""
    D, s = 2 * randn(800, 1), randn(800, 1, seed=1)
    fit = linearise(D, s, 3 * torch.sin(50 * D), 3 * torch.sin(50 * (D + s)), blank(800, 1, 1))
    assert fit.value.square().mean() < 0.1 * 4.5
    assert fit.error.mean() == pytest.approx(4.5, rel=0.2)  # variance of f


def test_a_reward_becomes_a_residual_with_its_slope() -> None:
    fit = linearise(
        *(randn(9, 2, seed=i) for i in (0, 1)),
        *(randn(9, 1, seed=i) for i in (2, 3)),
        blank(9, 1, 2),
    )
    new = fit.as_residual(torch.tensor(4.0).to(DOUBLE), torch.tensor(1.0).to(DOUBLE))
    assert (-0.5 * new.value**2).allclose(fit.value - 5)
    v, step = randn(9, 2, seed=5), 1e-5
    moved = fit._replace(value=fit.value + step * fit.apply(v))
    ahead = moved.as_residual(torch.tensor(4.0).to(DOUBLE), torch.tensor(1.0).to(DOUBLE))
    assert ((ahead.value - new.value) / step).allclose(new.apply(v), atol=1e-4)


# ---- kernel, twist and proposal against dense matrices


class Fixed:
    """Residuals that are linear with one known matrix."""

    def __init__(self, value: Tensor, matrix: Tensor) -> None:
        self.value, self.matrix = value, matrix

    def apply(self, v: Tensor) -> Tensor:
        return v @ self.matrix.T

    def adjoint(self, u: Tensor) -> Tensor:
        return u @ self.matrix


def dense(prior: Gaussian, a: float, b: float) -> tuple[Tensor, Tensor]:
    """J and L of one reverse step, the same for every x."""
    eye = torch.eye(prior.shape[0], dtype=DOUBLE)
    J = prior.covariance @ torch.linalg.inv(prior.covariance + a**2 * eye)
    tau, beta = kernel(a, b)
    return J, tau * eye + beta * J


def problem_of(prior) -> Problem:
    return Problem(prior, reward=Score(lambda x: x[:, 0]))


def test_the_reverse_step_has_the_moments_of_x_b_given_x_a() -> None:
    a, b = 2.0, 1.4
    prior = Gaussian([0.5, -0.3, 0.1], torch.diag(torch.tensor([4e4, 1.0, 1e-6])))
    J, L = dense(prior, a, b)
    x = randn(1, 3)
    tangent = Tangent(problem_of(prior), x, a)
    mean = reverse_step(tangent, b, torch.zeros(1, 3, dtype=DOUBLE))
    D = prior.denoise(x, a)
    assert mean.allclose(D + b**2 / a**2 * (x - D), atol=1e-12)
    assert (reverse_step(tangent, b, randn(1, 3, seed=1)) - mean).allclose(randn(1, 3, seed=1) @ L)
    share = 1 - b**2 / a**2
    exact = share * b**2 * torch.eye(3, dtype=DOUBLE) + share**2 * a**2 * J
    gap = (exact - L @ L).diagonal() / (a**2 - b**2)
    # By hand: (1 - b/a)^2 t (1 - t) where J has the eigenvalue t; none at 0 and 1.
    t = J.diagonal()
    assert gap.allclose((1 - b / a) ** 2 * t * (1 - t), atol=1e-9)
    assert gap.abs()[[0, 2]].max() < 1e-5


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_twist_and_proposal_are_those_of_the_gaussian_model(spread: float) -> None:
    """With J a multiple of the identity nothing is approximate: all of it follows from the joint Gaussian law."""
    a, b, d, m = 1.5, 1.1, 4, 2
    prior = Gaussian(randn(d), spread * torch.eye(d))
    J, L = dense(prior, a, b)
    H, value, x = randn(m, d, seed=1), randn(5, m, seed=2), randn(5, d, seed=3)
    tangent = Tangent(problem_of(prior), x, a)
    twist = gaussian_twist(tangent, Fixed(value, H), num_probes=m)
    S = torch.eye(m, dtype=DOUBLE) + a**2 * H @ J @ H.T
    law = MultivariateNormal(torch.zeros(m, dtype=DOUBLE), S)
    assert (twist.log_psi - law.log_prob(value)).diff().abs().max() < 1e-10
    # e given y: x0 = D + C kappa L^-T e + rest, observed by H with unit noise.
    F = H @ (a**2 * J) * (1 - b**2 / a**2) @ torch.linalg.inv(L).T
    mean = -value @ torch.linalg.solve(S, F)
    covariance = torch.eye(d, dtype=DOUBLE) - F.T @ torch.linalg.solve(S, F)
    zero = torch.zeros(5, d, dtype=DOUBLE)
    shift = propose(twist, a, b, zero)[0]
    assert shift.allclose(mean)
    columns = [propose(twist, a, b, zero + row)[0] - shift for row in torch.eye(d, dtype=DOUBLE)]
    root = torch.stack(columns, 2)
    assert (root @ root.mT).allclose(covariance.expand(5, d, d))


@pytest.mark.parametrize("num_probes", [1, 2, 9])
def test_the_ratio_of_proposals_is_that_of_two_densities(num_probes: int) -> None:
    """Whatever the prior, the slopes and the number of probes: the law of e is found by probing `propose`."""
    a, b, d, m = 1.0, 0.6, 3, 3
    prior = GaussianMixture(3 * randn(4, d), 0.2 * torch.eye(d))
    tangent = Tangent(problem_of(prior), 2 * randn(6, d, seed=1), a)
    twist = gaussian_twist(
        tangent, Fixed(randn(6, m, seed=2), 3 * randn(m, d, seed=3)), num_probes
    )
    n, zero = randn(6, d, seed=4), torch.zeros(6, d, dtype=DOUBLE)
    e, ratio = propose(twist, a, b, n)
    mean = propose(twist, a, b, zero)[0]
    root = torch.stack(
        [propose(twist, a, b, zero + row)[0] - mean for row in torch.eye(d, dtype=DOUBLE)], 2
    )
    q = MultivariateNormal(mean, root @ root.mT)
    p = MultivariateNormal(zero, torch.eye(d, dtype=DOUBLE))
    assert ratio.allclose(p.log_prob(e) - q.log_prob(e))


def test_all_probes_give_the_dense_twist_and_few_a_bound() -> None:
    prior = GaussianMixture(3 * randn(4, 3), 0.2 * torch.eye(3))
    x, H, value = randn(1, 3, seed=1), randn(3, 3, seed=2), randn(1, 3, seed=3)
    tangent = Tangent(problem_of(prior), x, 0.8)
    J = torch.autograd.functional.jacobian(lambda z: prior.denoise(z[None], 0.8)[0], x[0])
    S = torch.eye(3, dtype=DOUBLE) + 0.64 * H @ J @ H.T
    exact = -0.5 * (value @ torch.linalg.solve(S, value[0]) + S.logdet())
    full = gaussian_twist(tangent, Fixed(value, H), num_probes=3)
    assert full.log_psi.allclose(exact)
    assert (full.variance.log().sum(1) - S.logdet()).abs() < 1e-10
    few = gaussian_twist(tangent, Fixed(value, H), num_probes=1)
    assert few.variance.log().sum() < S.logdet()  # directions left out have S = 1


# ---- weights


def twisted_filter(solver: EnsembleTwisted, target, seed: int) -> Tensor:
    """Log-weights of a twisted particle filter written out in dense matrices: p psi_b / (q psi_a) at every step, and
    the likelihood in the place of psi at the end (TDS, eq. 12), on the path of the solver itself.
    """
    noise = Noise(seed, tuple((0, i) for i in range(solver.ensemble_size)), (2,), DOUBLE)
    problem = hidden(target).rows(torch.zeros(solver.ensemble_size, dtype=torch.long))
    prior, H = target.prior, -target.operator.matrix / target.sigma_y
    levels = [float(level) for level in solver.schedule]
    state = solver.init(problem, noise)
    log_w = log_psi = torch.zeros(solver.ensemble_size, dtype=DOUBLE)
    with torch.no_grad():
        for k, (a, b) in enumerate(pairwise(levels)):
            x = state.x
            state, _ = solver.step(problem, state, k, noise.at(k))
            D = prior.denoise(x, a)
            value = (target.y - target.operator(D)) / target.sigma_y
            if b == 0:
                return log_w - log_psi - 0.5 * value.square().sum(1)
            J, L = dense(prior, a, b)
            S = torch.eye(len(H), dtype=DOUBLE) + a**2 * H @ J @ H.T
            zero = torch.zeros(len(H), dtype=DOUBLE)
            log_w, log_psi = log_w - log_psi, MultivariateNormal(zero, S).log_prob(value)
            log_w = log_w + log_psi
            mean = D + b**2 / a**2 * (x - D)
            F = H @ (a**2 * J) * (1 - b**2 / a**2) @ torch.linalg.inv(L).T
            shift = -value @ torch.linalg.solve(S, F)
            cov = L @ (torch.eye(2, dtype=DOUBLE) - F.T @ torch.linalg.solve(S, F)) @ L.T
            p = MultivariateNormal(mean, L @ L.T).log_prob(state.x)
            log_w = log_w + p - MultivariateNormal(mean + shift @ L.T, cov).log_prob(state.x)
    raise AssertionError("the levels end in 0")


def gap_to_the_filter() -> float:
    """Largest difference of log-weights, up to their common constant, without resampling."""
    prior = Gaussian(
        [0.5, -0.3], 0.7 * torch.eye(2)
    )  # J is a multiple of I: the proposal has a closed form
    target = gaussian_2d()
    target = type(target)(
        "", prior, target.operator, target.y, 0.3, prior.posterior(target.operator, target.y, 0.3)
    )
    levels = (2.0, 1.6, 1.25, 1.0, 0.75, 0.55, 0.0)
    solver = EnsembleTwisted(6, 16, ess_threshold=0.0, schedule=levels)
    ours = driver.run(solver, hidden(target), progress=False, on_nonfinite="drop")
    gap = ours.log_weights[0] - twisted_filter(solver, target, 0)
    return float((gap - gap.mean()).abs().max())


def test_weights_are_those_of_a_twisted_filter_written_out() -> None:
    assert gap_to_the_filter() < 1e-7


def test_planted_mistakes_in_the_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, finish = Twist.rows, ensemble_twisted._finish
    with monkeypatch.context() as patch:  # the twist of the level recomputed with another H
        patch.setattr(Twist, "rows", lambda t, i: rows(t._replace(log_psi=0.9 * t.log_psi), i))
        assert gap_to_the_filter() > 0.1
    with monkeypatch.context() as patch:  # no ratio of kernels
        patch.setattr(ensemble_twisted, "propose", lambda *a: (propose(*a)[0], 0 * propose(*a)[1]))
        assert gap_to_the_filter() > 0.1
    with monkeypatch.context() as patch:  # the last twist in place of the likelihood

        def twist_at_the_end(problem: Problem, state, a: float):
            new, info = finish(problem, state, a)
            return new._replace(log_weights=state.log_weights + state.log_twist), info

        patch.setattr(ensemble_twisted, "_finish", twist_at_the_end)
        assert gap_to_the_filter() > 0.1


def test_one_step_without_slopes_is_importance_sampling_of_the_prior() -> None:
    """One level: x0 = D(x; sigma_max), w = the target, for any black box."""
    prior = standard()
    problem = observed(prior, lambda x: x.square().sum(1, keepdim=True), 2.0, 0.5)
    result = run(problem, num_steps=1, ensemble_size=8)
    expected = -0.5 * ((2 - result.samples[0].square().sum(1)) / 0.5) ** 2
    assert (result.log_weights[0] - expected).allclose(torch.zeros(8, dtype=DOUBLE), atol=1e-9)


def test_the_mean_weight_estimates_the_evidence() -> None:
    """Through resamplings at every step: log p(y) in closed form, but for the constant that log_prob leaves out."""
    target = gaussian_2d()
    result = run(hidden(target), ensemble_size=200, num_steps=40, ess_threshold=1.0)
    estimate = float(result.log_weights[0].logsumexp(0)) - math.log(200)
    spread = 1.0 + 0.3**2  # of y about 0.5
    exact = -0.5 * (1.5 - 0.5) ** 2 / spread - 0.5 * math.log(spread / 0.3**2)
    assert estimate == pytest.approx(exact, abs=0.1)


# ---- samples


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_gaussian_2d(threshold: float) -> None:
    """Measured over 8 seeds: means within 0.013, ratios within 0.01, for 25 steps and for 100; ESS 974 and 997."""
    target = gaussian_2d()
    result = run(hidden(target), ensemble_size=1000, num_steps=25, ess_threshold=threshold)
    assert (result.mean[0] - target.posterior.mean).abs().max() < 0.03
    assert (result.std[0] / target.posterior.std - 1).abs().max() < 0.05
    assert threshold == 1.0 or result.weights.square().sum() < 1 / 900


def upper(result) -> float:
    return float((result.weights[0] * (result.samples[0, :, 0] > 0)).sum())


def test_mixture_1d() -> None:
    """P(upper mode) = 0.86234; one standard error of 1000 draws is 0.011, of ours about 0.008."""
    result = run(hidden(mixture_1d()), ensemble_size=1000, num_steps=40)
    assert upper(result) == pytest.approx(0.86234, abs=0.04)
    assert result.std[0, 0] == pytest.approx(float(mixture_1d().posterior.std), rel=0.06)


def rms_error(seeds: int, **settings) -> float:
    """Of P(upper mode) of the 1-D mixture, over seeds."""
    share = settings.pop("share", 0.0)
    problem = hidden(mixture_1d(), share=share)
    errors = [upper(run(problem, seed, **settings)) - 0.86234 for seed in range(seeds)]
    return math.sqrt(sum(error**2 for error in errors) / seeds)


@pytest.mark.slow
def test_errors_fall_as_particles_grow() -> None:
    """By 4 at 16 times as many; over 16 seeds, at 16, 64, 256, 1024: 0.088, 0.030, 0.024, 0.010 (slope -0.52)."""
    few, many = (rms_error(8, ensemble_size=size, num_steps=30) for size in (16, 256))
    assert 2 < few / many < 10


@pytest.mark.slow
def test_the_mixture_benchmark() -> None:
    """The median of five problems: which ones a seed gives depends on torch's version, and one in ten is hard (2.6)."""
    distances = []
    for seed in range(5):
        target = mixture_25(d=8, dy=2, seed=seed)
        result = run(hidden(target), ensemble_size=500, num_steps=50)
        samples = unweighted(result.samples[0], result.weights[0])
        exact = target.posterior.sample(500, seed=1)
        distances.append(float(sliced_wasserstein(samples, exact)))
    # Measured at 1000 members and over 5 problems: 0.10, as exact samples; published codes: 1 to 2.
    assert sorted(distances)[2] < 0.5, distances


def on_the_grid(prior, log_density, function) -> float:
    """Posterior mean of function(x) by quadrature on [-6, 6]^2."""
    axis = torch.linspace(-6, 6, 601, dtype=DOUBLE)
    x = torch.cartesian_prod(axis, axis)
    return float((function(x) * torch.softmax(prior.log_prob(x) + log_density(x), 0)).sum())


def plane() -> GaussianMixture:
    means = [[-2.0, -1.0], [2.0, 1.0], [0.0, 2.5]]
    return GaussianMixture(means, 0.25 * torch.eye(2), [0.3, 0.3, 0.4])


NONLINEAR = {
    "ring": (standard(), lambda x: x.square().sum(1, keepdim=True), 2.0, 0.1),
    "product": (plane(), lambda x: x[:, :1] * x[:, 1:], 1.0, 0.05),
    "wave": (plane(), lambda x: torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:], 0.8, 0.1),
}
QUESTIONS = {
    "right": lambda x: (x[:, 0] > 0).to(DOUBLE),
    "far": lambda x: x.square().sum(1).sqrt(),
    "up": lambda x: x[:, 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_black_boxes(name: str) -> None:
    """Against quadrature. Tolerance: 4 standard errors of 150 independent draws (several resamplings of 500)."""
    prior, function, y, sigma_y = NONLINEAR[name]
    result = run(observed(prior, function, y, sigma_y), ensemble_size=500, num_steps=30)

    def log_density(x: Tensor) -> Tensor:
        return -0.5 * ((y - function(x)) / sigma_y).square().sum(1)

    for question in QUESTIONS.values():
        exact = on_the_grid(prior, log_density, question)
        spread = (
            on_the_grid(prior, log_density, lambda x, q=question, e=exact: (q(x) - e) ** 2) ** 0.5
        )
        estimate = float((result.weights[0] * question(result.samples[0])).nansum())
        assert abs(estimate - exact) < 4 * spread / 150**0.5


def test_fewer_members_than_dimensions() -> None:
    """24 members in 40 dimensions, 3 measured: the linear map is learned on the way; chi2 near 1."""
    prior, A = Gaussian(torch.zeros(40), torch.diag(1 / torch.arange(1.0, 41))), randn(3, 40) / 6
    problem = observed(prior, lambda x: x @ A.T, 1.0, 0.1, m=3)
    result = run(problem, ensemble_size=24, num_steps=40)
    assert result.weights.square().sum() < 1 / 8
    assert 0.2 < float((result.weights * result.chi2).nansum()) < 2.5


def test_rewards() -> None:
    """exp(3 x_0) on a standard normal: it moves by 3, where draws of the prior have no weight."""
    result = run(
        Problem(standard(), reward=Score(lambda x: 3 * x[:, 0])), ensemble_size=400, num_steps=40
    )
    # A standard error of 400 draws is 0.05.
    assert (result.mean[0] - torch.tensor([3.0, 0.0])).abs().max() < 0.25
    assert (result.std[0] - 1).abs().max() < 0.2


@pytest.mark.slow
def test_a_likelihood_with_a_reward_and_a_density_without_sigma() -> None:
    """Twice the same Gaussian posterior: of y = x_0 + x_1 under a reward -2 x_1^2, and of both as one density."""

    def reward(x: Tensor) -> Tensor:
        return -2 * x[:, 1] ** 2

    both = observed(standard(), lambda x: x.sum(1, keepdim=True), 1.5, 0.5)
    both.reward = Score(reward)
    box = Box(lambda x: x, 2)

    def log_density(predicted: Tensor, y: Tensor) -> Tensor:
        return -2 * (y[:, 0] - predicted.sum(1)) ** 2 + reward(predicted)

    y = torch.tensor([[1.5, 0.0]], dtype=DOUBLE)
    whole = Problem(standard(), Likelihood(box, y, LogDensity(log_density)))
    precision = torch.tensor([[5.0, 4.0], [4.0, 9.0]], dtype=DOUBLE)
    mean = torch.linalg.solve(precision, torch.tensor([6.0, 6.0], dtype=DOUBLE))
    std = torch.linalg.inv(precision).diagonal().sqrt()
    for problem in (both, whole):
        result = run(problem, ensemble_size=400, num_steps=25)
        assert (result.mean[0] - mean).abs().max() < 4 * 0.56 / 100**0.5
        assert (result.std[0] / std - 1).abs().max() < 0.25


# ---- failures, order, batches


@pytest.mark.slow
def test_random_failures_change_the_answer_by_no_more_than_the_seed() -> None:
    """Rms error over 16 seeds at 20 %: 0.029, and 0.033 with none; that of 300 independent draws is 0.020."""
    assert rms_error(6, ensemble_size=300, num_steps=25, share=0.2) < 2.5 * 0.020
    result = run(hidden(mixture_1d(), share=0.2), ensemble_size=300, num_steps=25)
    assert 30 < int((result.weights == 0).sum()) < 100  # those whose last call failed
    assert bool(result.mean.isfinite().all())


def test_the_target_is_what_remains_where_calls_always_fail() -> None:
    problem = hidden(mixture_1d(), lost=lambda x: x[:, 0] > 0)
    result = run(problem, ensemble_size=300, num_steps=20)
    assert upper(result) == 0
    assert result.mean[0, 0] == pytest.approx(-1.79, abs=0.1)


def test_a_level_at_which_every_call_fails_is_survived() -> None:
    calls = iter(range(10**6))
    problem = hidden(mixture_1d(), lost=lambda x: torch.full((len(x),), 10 <= next(calls) < 14))
    assert upper(run(problem, ensemble_size=300, num_steps=20)) == pytest.approx(0.86, abs=0.1)


def test_a_black_box_that_always_fails_is_reported() -> None:
    problem = hidden(mixture_1d(), lost=lambda x: torch.full((len(x),), True))
    with pytest.raises(DivergenceError, match="all 16 particles are impossible"):
        run(problem, ensemble_size=16, num_steps=5)


def test_the_order_of_members_and_network_batches_do_not_matter() -> None:
    """Before resampling; sums in another order agree to rounding, which each step may multiply."""
    target, solver = mixture_25(d=8, dy=2), EnsembleTwisted(ensemble_size=40, ess_threshold=0.0)
    problem = hidden(target).rows(torch.zeros(40, dtype=torch.long))

    def through(order: list[int], batch_size: int | None) -> tuple[Tensor, Tensor]:
        noise = Noise(0, tuple((0, i) for i in order), (8,), DOUBLE)
        problem.batch_size = batch_size
        state = solver.init(problem, noise)
        with torch.no_grad():
            for k in range(5):
                state, _ = solver.step(problem, state, k, noise.at(k))
        return state.x / state.x.abs().max(), state.log_weights

    plain, order = through(list(range(40)), None), torch.randperm(40).tolist()
    for other in (through(order, None), through(order, 7)):
        for a, b in zip(plain, other, strict=True):
            assert (a[order] - b).abs().max() < 1e-8


def test_several_network_batches_cost_calls_and_not_memory() -> None:
    """One call for D, and one more per product with J where a batch does not hold the ensemble."""
    problem = hidden(mixture_1d())
    one = driver.run(EnsembleTwisted(3, 20, ess_threshold=0.0), problem, progress=False)
    many = driver.run(
        EnsembleTwisted(3, 20, ess_threshold=0.0), problem, progress=False, batch_size=6
    )
    assert (one.nfe, many.nfe) == (3, 3 + 2 * 3)  # products: look ahead, one probe, reverse step
    assert many.samples.allclose(one.samples, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ensemble_size": 1}, "ensemble_size is 1; expected a whole number of at least 2"),
        ({"num_probes": 0}, "num_probes is 0; expected a whole number of at least 1"),
        ({"ess_threshold": 1.5}, "ess_threshold is 1.5"),
    ],
)
def test_settings_are_checked(settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EnsembleTwisted(**settings)


def test_shifts_that_do_not_differ_teach_nothing() -> None:
    """As where the network is flat: what was known before is kept, and no particle is preferred."""
    points, values = torch.randn(5, 3), torch.randn(5, 2)
    known = Slopes(torch.randn(5, 2), torch.randn(5, 3))
    fit = linearise(points, torch.zeros(5, 3), values, values, known)
    assert fit.slopes is known
    assert not fit.value.any()
