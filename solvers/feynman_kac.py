"""FeynmanKac: particles that follow the prior and are weighted and resampled by a target that is only evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, Fraction, OneOf, Positive
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.particles import effective_size, log_mean_exp, look_around, resample, shared
from invguide.schedule import Schedule
from invguide.solver import EnsembleSolver, Requires

POTENTIALS = ("smoothed", "denoised", "final")


class FeynmanKacState(NamedTuple):
    x: Tensor  # (J, *shape) at the current level
    denoised: Tensor  # (J, *shape), D of x at the current level
    log_potential: Tensor  # (J,), of the last level where the target was looked at
    log_weights: Tensor  # (J,), since the last resampling


class FeynmanKacInfo(NamedTuple):
    sigma: float
    effective_size: float  # of the weights before resampling, between 1 and J
    failed: Tensor  # (J,) evaluations that gave NaN


@dataclass(frozen=True)
class FeynmanKac(EnsembleSolver[FeynmanKacState]):
    """Sample the prior with a population that is resampled towards the target on its way.

    Algorithm:
        x <- DDIM_eta(x, D, a -> b);   D <- D(x; b);   every `interval` steps:
        log w <- log w + V_b(x) - V_a(x), with V_a its last value;   resample where ESS < ess_threshold J
        at the last level V = target(D), and x0 = D: the product of all increments is exp(target(x0))
        smoothed:  V_b = log mean_m exp(lam target(D + r n_m)),   r^2 = b^2 s^2 / (b^2 + s^2), data of size s,
                   lam = 1 / max(1, spread of the target over these draws, mean over particles)
        denoised:  V_b = target(D) s^2 / (b^2 + s^2)
        final:     V_b = 0: importance sampling of the prior

    Source:
        Singhal et al. 2025, "A general framework for inference-time scaling and steering of diffusion models", arXiv
        2501.06848 ("difference" potential), the bootstrap form of Wu et al. 2023 (TDS), arXiv 2306.17775, alg. 1;
        official code zacharyhorvitz/Fk-Diffusion-Steering and blt2114/twisted_diffusion_sampler.

    Differences:
        The smoothed potential is ours: an estimate of log E[exp(target(x0)) | x], for which the target at D stands
        in the papers; draws in pairs +- n, the same for all particles, so that they rank particles and not luck.
        Jumps of a reward are blurred by what the level leaves open, and lam keeps sharp targets (such as measurements
        with little noise) from ruling before D is sure. Any potentials give the same limit; they decide how many
        particles it takes. Weights are kept until the ESS falls, not resampled at every step; they are returned
        (Result.weights), and never clamped.
        An evaluation that fails before the end leaves the particle its last potential, so nothing is lost; at the
        end its weight is zero, as if x0 were impossible. What is impossible (-inf) before the end counts as half the
        least likely particle that is possible, for its descendants may well be.

    Bias:
        None for many particles but that of the sampler: the limit is p(x) exp(target(x)) with p the law of
        Unconditional at the same steps. With few, expectations are off by order 1 / ensemble_size, and with sharp
        targets in many dimensions the ensemble descends from few ancestors: too narrow, far modes lost. The ESS at the
        end does not show that; runs of several seeds do.

    Args:
        num_steps: Noise levels, one network call for each particle. Default 100; fewer are faster and less accurate.
        ensemble_size: J, particles, which are the samples. Default 256; more for sharp targets, where few ancestors are
            left.
        potential: V: "smoothed", "denoised" or "final", as above. Default "smoothed"; "denoised" where a call of the
            target is dear, "final" as a control.
        num_draws: Of "smoothed": calls of the target for each particle and look. Default 8; more where few draws tell
            little.
        interval: Steps from one look at the target to the next. Default 4; 1 where it is cheap, more where it is dear.
        ess_threshold: Resample where the effective size is below this share of J, 0 to 1. Default 0.5; 0 never does, 1
            always.
        eta: Noise that a step adds, as a share of that of ancestral sampling, above 0: without it copies of a particle
            would stay equal. Default 1.0; another to repeat the runs of a paper.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=False, weighs=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    ensemble_size: Count = 256
    potential: Annotated[str, OneOf(POTENTIALS)] = "smoothed"
    num_draws: Count = 8
    interval: Count = 4
    ess_threshold: Fraction = 0.5
    eta: Positive = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> FeynmanKacState:
        level = problem.levels(self.schedule, self.num_steps, 0)[0]
        x = problem.begin(level, noise("init"))
        none = x.new_zeros(len(x))
        return FeynmanKacState(x, problem.denoise(x, level), none, none)

    def step(
        self, problem: Problem, state: FeynmanKacState, k: int, noise: Noise
    ) -> tuple[FeynmanKacState, FeynmanKacInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        x, denoised, potential, log_weights = state
        index, failed = torch.arange(len(x), device=x.device), torch.zeros_like(potential)
        if b > 0:
            x = ddim(x, denoised, a, b, noise(), self.eta)
            denoised = problem.denoise(x, b)
            if self.potential != "final" and (k + 1) % self.interval == 0:
                values = self._look(problem, denoised, b, noise)
                new = _possible(log_mean_exp(values), potential)
                log_weights, potential = log_weights + new - potential, new
                failed = values.isnan().sum(0).to(failed)
        else:  # x0 is D, whose true target replaces the last potential
            x, new = denoised, problem.evaluate(denoised)[0]
            failed = new.isnan().to(failed)
            new = torch.where(new.isnan(), -torch.inf, new)
            log_weights, potential = log_weights + new - potential, new
        size = effective_size(log_weights)
        if b > 0:
            u = shared(noise).uniform("resample", (1,))[0]
            index, log_weights = resample(log_weights, u, self.ess_threshold)
        state = FeynmanKacState(x[index], denoised[index], potential[index], log_weights)
        return state, FeynmanKacInfo(a, size, failed)

    def _look(self, problem: Problem, denoised: Tensor, sigma: float, noise: Noise) -> Tensor:
        """Tempered log targets at D, (1, J), or around it, (num_draws, J)."""
        if self.potential == "denoised":
            known = 1 / (1 + (sigma / problem.sigma_data) ** 2)
            return known * problem.evaluate(denoised)[0][None]
        half = shared(noise)("draws", ((self.num_draws + 1) // 2, *problem.shape))[0]
        draws = torch.cat([half, -half])[: self.num_draws, None]
        values = look_around(problem, denoised, sigma, draws)
        return values / _spread(values).clamp_min(1)

    def estimate(self, state: FeynmanKacState) -> Tensor:
        return state.denoised

    def log_weights(self, state: FeynmanKacState) -> Tensor:
        return state.log_weights


def _spread(values: Tensor) -> Tensor:
    """Standard deviation over the first axis of what is finite in (M, J), mean over columns with two or more."""
    finite = values.isfinite()
    count = finite.sum(0)
    mean = torch.where(finite, values, 0.0).sum(0) / count.clamp_min(1)
    square = torch.where(finite, (values - mean) ** 2, 0.0).sum(0)
    return (square / (count - 1))[count > 1].sqrt().mean().nan_to_num(0.0)


def _possible(new: Tensor, old: Tensor) -> Tensor:
    """Potentials (J,) without NaN, which keep the old one, and without -inf, half the least of the others."""
    finite = new[new > -torch.inf]
    floor = finite.min() - math.log(2) if len(finite) else old
    return torch.where(new.isnan(), old, torch.where(new == -torch.inf, floor, new))
