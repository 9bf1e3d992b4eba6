"""DPS: diffusion posterior sampling, with a step that adapts to the noise and the size of the measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf
from invguide.numerics.linear import per_sample
from invguide.problem.problem import Problem, TargetGradient
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import guided_strength
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "likelihood", "official")


class DPSState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class DPSInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D
    log_prob: Tensor  # (B,)


@dataclass(frozen=True)
class DPS(Solver[DPSState]):
    """Approximate p(y | x) by p(y | x0 = D(x)) and add its gradient, through the denoiser, to the reverse step.

    Algorithm:
        g = grad_x log p(y | D(x; a)),   h = grad_D log p(y | D)
        adaptive:    D <- D + min(guidance_scale a^2 / N, best step) g;   x <- DDIM_eta(x, D, a -> b)
                     N = 1 + min(chi2(D), r^2 |h|^2 / (m chi2(D))),   r^2 = a^2 s^2 / (a^2 + s^2)
        likelihood:  D <- D + guidance_scale a^2 g;                       x <- DDIM_eta(x, D, a -> b)
        official:    x <- DDIM_eta(x, D, a -> b) - guidance_scale sqrt((1 + a^2)(1 + b^2)) grad_x |r|

    Source:
        Chung, Kim, Mccann, Klasky, Ye 2022, "Diffusion posterior sampling for general noisy inverse problems", arXiv
        2209.14687, alg. 1; official code DPS2022/diffusion-posterior-sampling.

    Differences:
        "adaptive" (default) takes the uncertainty of D into account, which the paper's likelihood leaves out: the
        residual varies by sigma_y^2 and by what D does not know. N estimates the ratio of both to sigma_y^2, twice:
        by chi2, as the measurement itself tells, and by the variance r^2 that level a leaves open in data of size s
        (as in PiGDM), with |h|^2 / (m chi2) the Rayleigh quotient of A A^T / sigma_y^2 at the residual; both per
        sample, with m measurements. The step never carries x beyond the best point along g, found by one more call
        of the operator, so any guidance_scale of 1 or more is stable, and 1 is meant for every operator; nor farther
        than level a leaves open, since slopes of nonlinear operators hold nearby only. For a reward N = 1.
        "likelihood" is the equation of the paper without its step-size heuristic (eq. 11-12).
        "official" is the released step: a gradient of the plain norm, in the scaled coordinates of a
        variance-preserving network, here in ours; the norm is per sample, the result is the last D. Its norm is in
        units of y, so that guidance_scale is too.

    Bias:
        "likelihood" and "official" ignore Var[x0 | x]: the mean is pulled onto y, and the spread of measured directions
        is too small. "adaptive" has one scalar for all directions and one mode in mind: spreads come out some percent
        too narrow or too wide, and a far mode is not found; `invguide verify` prints it.

    Args:
        num_steps: Noise levels, one network call and its gradient each. Default 100; fewer are faster and less
            accurate.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which "adaptive" means for every operator; lower
            where samples explain y better than its noise (chi2 below 1); "likelihood" and "official" (there in units of
            y) have to be tuned for each task.
        weight: Rule of the step: "adaptive", "likelihood" or "official", as above. Default "adaptive"; "official" to
            repeat the paper's runs, for Gaussian noise with one sigma_y.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True, prior_vjp=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    guidance_scale: NonNegative = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> DPSState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return DPSState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: DPSState, k: int, noise: Noise
    ) -> tuple[DPSState, DPSInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        guidance = problem.guide(state.x, a)
        denoised = guidance.denoised
        if self.weight == "official":
            x = ddim(state.x, denoised, a, b, noise(), self.eta)
            x = x + self._official_shift(problem, guidance, a, b)
        else:
            denoised = (
                denoised
                + per_sample(self._strength(problem, guidance, a, b), denoised) * guidance.gradient
            )
            x = ddim(state.x, denoised, a, b, noise(), self.eta)
        return DPSState(x, denoised), DPSInfo(a, guidance.chi2, guidance.log_prob)

    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        """Factor of the gradient that is added to D, (B,)."""
        if self.weight == "likelihood":
            return torch.full_like(guidance.chi2, self.guidance_scale * a**2)
        return guided_strength(problem, guidance, a, b, self.guidance_scale)

    def _official_shift(
        self, problem: Problem, guidance: TargetGradient, a: float, b: float
    ) -> Tensor:
        sigma_y = problem.require_sigma_y("DPS(weight='official')")
        # grad |r| = -sigma_y^2 grad log p / |r|, and |r| = sigma_y sqrt(-2 log p).
        norm = (-2 * guidance.log_prob).clamp_min(1e-12).sqrt()
        size = self.guidance_scale * ((1 + a**2) * (1 + b**2)) ** 0.5 * sigma_y / norm
        return per_sample(size, guidance.gradient) * guidance.gradient

    def estimate(self, state: DPSState) -> Tensor:
        return state.denoised
