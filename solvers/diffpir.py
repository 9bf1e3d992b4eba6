"""DiffPIR: a reverse diffusion whose clean estimate is replaced by its proximal point at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, Fraction, Positive
from invguide.problem.problem import Problem
from invguide.reverse import mix_noise
from invguide.rng import Noise
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver


class DiffPIRState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), the last clean estimate


class DiffPIRInfo(NamedTuple):
    sigma: float
    denoised: Tensor


@dataclass(frozen=True)
class DiffPIR(Solver[DiffPIRState]):
    """Alternate the denoiser and the exact data step, and renoise down the schedule.

    Algorithm:
        z = argmin_z -log p(y | z) + lam |z - D(x; a)|^2 / (2 a^2)
        x <- z + b (sqrt(1 - zeta) (x - z) / a + sqrt(zeta) n)

    Source:
        Zhu et al. 2023, "Denoising diffusion models for plug-and-play image restoration", arXiv 2305.08995, alg. 1;
        official code yuanzhi-zhu/DiffPIR.

    Differences:
        zeta = 1 (all noise redrawn, as released for inpainting) and lam = 1 by default: they explain y to within its
        noise on every operator tried; released values of zeta are 0.3 for blur and 0.25 for super-resolution. lam = 1
        is the Bayesian weight, Var[x0 | x] taken as a^2 in the prior's units; the released values (1 to 25) hide a
        factor 4 between [0, 1] and [-1, 1]. Nonlinear operators get the proximal point too (by descent), not one
        gradient step.

    Bias:
        Takes Var[x0 | x] as a^2 in every direction. With zeta = 1 the mean is right and the spread too small; smaller
        zeta with larger lam is too wide and pulled to the prior. `invguide verify` prints the distances.

    Args:
        num_steps: Noise levels, one network call and one data step each. Default 100; fewer are faster and less
            accurate.
        zeta: Share of the noise that a step redraws, in variance, 0 to 1. Default 1.0; 0.3 (blur) or 0.25
            (super-resolution) to repeat released runs.
        lam: Weight of the clean estimate against y in the data step, above 0, no unit. Default 1.0, Bayes' weight;
            higher to stay nearer to the prior, lower to explain y sooner.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="likelihood", gradient=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    zeta: Fraction = 1.0
    lam: Positive = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> DiffPIRState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return DiffPIRState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: DiffPIRState, k: int, noise: Noise
    ) -> tuple[DiffPIRState, DiffPIRInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        denoised = problem.denoise(state.x, a)
        clean = problem.prox(denoised, a / self.lam**0.5)
        x = mix_noise(state.x, clean, a, b, noise(), self.zeta)
        return DiffPIRState(x, clean), DiffPIRInfo(a, denoised)

    def estimate(self, state: DiffPIRState) -> Tensor:
        return state.denoised
