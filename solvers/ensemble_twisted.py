"""EnsembleTwisted: a twisted particle filter for black boxes, whose look-ahead is learned from the ensemble itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, Fraction, Several
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.sampling.linearisation import Slopes, linearise_target, no_slopes
from invguide.sampling.particles import effective_size, resample, shared
from invguide.sampling.twist import Tangent, gaussian_twist, propose, reverse_step
from invguide.schedule import Schedule
from invguide.solver import EnsembleSolver, Requires


class EnsembleTwistedState(NamedTuple):
    x: Tensor  # (J, *shape) at the current level
    denoised: Tensor  # (J, *shape), D of the last level visited
    log_twist: Tensor  # (J,), of the last level visited
    log_weights: Tensor  # (J,), which make them draws from the prior; at the end, from the target
    left: Tensor  # (J, m), and
    axes: Tensor  # (J, d): what is known of the slopes of the black box, left^T axes


class EnsembleTwistedInfo(NamedTuple):
    sigma: float
    effective_size: float  # of weights times twist before resampling, between 1 and J
    error: float  # of the linearisation, rms, in standard deviations of the noise
    failed: Tensor  # (J,) evaluations at D that gave no number


@dataclass(frozen=True)
class EnsembleTwisted(EnsembleSolver[EnsembleTwistedState]):
    """Steer particles by how the black box, linearised over the ensemble, sees ahead; correct by exact weights.

    Algorithm:
        D = D(x_a; a),   J = dD/dx,   C = a^2 J = Var[x0 | x_a],   r(x0) = (y - A x0) / sigma_y
        s = a J n, scaled to the energy of C;   regress r(D + s) - r(D) on s over the ensemble: H, mean E r, error V
        psi(x_a) = N(E r; 0, S),   S = I + V + H C H^T;   resample by w psi where its ESS < ess_threshold J
        e ~ q = N(-F^T S^-1 E r, I - F^T S^-1 F),   F = (a^2 - b^2) H J L^-1;   w <- w N(e; 0, I) / q(e)
        x_b = D + (b^2 / a^2) (x_a - D) + L e,   L = b sqrt(a^2 - b^2) / a + (1 - b / a) sqrt(a^2 - b^2) J
        at the last level x0 = D and w <- w p(y | x0), with the black box itself

    Source:
        Our own. It builds on twisted diffusion sampling (Wu et al. 2023, arXiv 2306.17775), the covariance of Tweedie's
        formula in the likelihood (Boys et al. 2023, arXiv 2310.06721; PiGDM, Song et al. 2023), and statistical
        linearisation (Garcia-Fernandez et al. 2015, doi 10.1109/TSP.2015.2454485).

    Differences:
        To TDS: no gradient of the operator; slopes, curvature and noise of the black box come from 2 calls per member
        and step, at D and at a draw s from what the level leaves open, so that psi is as wide as what is not yet known.
        Steps carry the covariance C that the ancestral step lacks, so few suffice; proposals shrink where y tells more
        than the prior. Weights and twist are kept apart: w is relative to the prior, so any psi, such as one that
        depends on the whole ensemble, may rank the particles. H C H^T takes num_probes products with J^T, exact from
        as many measurements on. A reward (or a density without sigma) is one more residual, sqrt(2 (top - reward)),
        top being the best value seen and a standard deviation more. A member whose call fails keeps its rank for that
        level, and its residual comes from its other call or its neighbours; at the end its weight is zero.

    Bias:
        None for many particles, whatever the linearisation, but that of the prior's reverse steps (second order in
        their size) and of x0 = D at sigma_min. Relative to these the mean of w f(x0) is unbiased for any ensemble, and
        with f = 1 the evidence; expectations, which are ratios, are off by order 1 / ensemble_size. A poor
        linearisation costs effective particles, and so do hundreds of measurements seen by tens of members: then the
        ensemble descends from few ancestors, too narrow, far modes lost; runs of several seeds show it. Where calls
        fail for some x0 always, the target is what remains.

    Args:
        num_steps: Noise levels, a network call, two calls of the target and num_probes + 2 products with the network's
            Jacobian each. Default 100; fewer are faster and less accurate.
        ensemble_size: J, particles, which are the samples, at least 2. Default 256; more for sharp targets and many
            measurements, where few ancestors are left.
        num_probes: Products with J^T for H C H^T. Default 4; more where y tells of more directions: as many as
            measurements make it exact.
        ess_threshold: Resample where the effective size is below this share of J, 0 to 1. Default 0.5; 0 never does, 1
            always.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(
        target="either", gradient=False, prior_vjp=True, weighs=True
    )
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    ensemble_size: Several = 256
    num_probes: Count = 4
    ess_threshold: Fraction = 0.5
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> EnsembleTwistedState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        none = x.new_zeros(len(x))
        return EnsembleTwistedState(x, torch.zeros_like(x), none, none, *no_slopes(problem, x))

    def step(
        self, problem: Problem, state: EnsembleTwistedState, k: int, noise: Noise
    ) -> tuple[EnsembleTwistedState, EnsembleTwistedInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        if b == 0:
            return _finish(problem, state, a)
        tangent = Tangent(problem, state.x, a)
        shift = tangent.draw(noise("look").flatten(1))[0]
        known = Slopes(state.left, state.axes)
        fit, failed = linearise_target(problem, tangent.denoised, shift, known)
        twist = gaussian_twist(tangent, fit.whitened(), self.num_probes)
        twist = twist._replace(log_psi=_ranked(twist.log_psi, state.log_twist, failed))
        twisted = state.log_weights + twist.log_psi
        u = shared(noise).uniform("resample", (1,))[0]
        index, log_weights = resample(twisted, u, self.ess_threshold)
        log_weights = log_weights + (twisted.logsumexp(0) - log_weights.logsumexp(0))
        tangent, twist = tangent.rows(index), twist.rows(index)
        e, log_ratio = propose(twist, a, b, noise().flatten(1))
        x = reverse_step(tangent, b, e)
        log_weights = log_weights - twist.log_psi + log_ratio
        denoised = tangent.denoised.reshape(x.shape)
        error = fit.error.mean().sqrt().item()
        return (
            EnsembleTwistedState(x, denoised, twist.log_psi, log_weights, *fit.slopes),
            EnsembleTwistedInfo(a, effective_size(twisted), error, failed),
        )

    def estimate(self, state: EnsembleTwistedState) -> Tensor:
        return state.denoised

    def log_weights(self, state: EnsembleTwistedState) -> Tensor:
        return state.log_weights


def _finish(
    problem: Problem, state: EnsembleTwistedState, a: float
) -> tuple[EnsembleTwistedState, EnsembleTwistedInfo]:
    x0 = problem.denoise(state.x, a)
    log_target = problem.evaluate(x0)[0]
    failed = log_target.isnan()
    log_weights = torch.where(failed, -torch.inf, state.log_weights + log_target)
    info = EnsembleTwistedInfo(a, effective_size(log_weights), 0.0, failed)
    return state._replace(x=x0, denoised=x0, log_weights=log_weights), info


def _ranked(log_psi: Tensor, before: Tensor, failed: Tensor) -> Tensor:
    """The twist; where a call failed that of the level before, raised as much as that of the others."""
    gain = (log_psi - before)[~failed]
    kept = before + gain.median() if len(gain) else before
    return torch.where(failed, kept, log_psi)
