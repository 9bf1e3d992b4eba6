"""ECM guidance: the gradient at the clean estimate, clipped, and no backward pass through the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf, PositiveOrInfinite
from invguide.numerics.linear import per_sample
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import clean_guidance, guided_strength, open_variance
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "official")


class ECMGuidanceState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class ECMGuidanceInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D
    log_prob: Tensor  # (B,)
    clipped: Tensor  # (B,), share of elements that were


@dataclass(frozen=True)
class ECMGuidance(Solver[ECMGuidanceState]):
    """Guide on the estimated clean manifold: move D itself, and keep the noise that was predicted.

    Algorithm:
        h = grad_D log p(y | D),   D = D(x; a) taken as given
        adaptive:  d = clip(min(guidance_scale r^2 / N, best step) h, clip r),   r^2 = a^2 s^2 / (a^2 + s^2),   with the
                   N and the bounds of our DPS
        official:  d = clip(guidance_scale h, clip)
        x <- DDIM_eta(x, D, a -> b) + d;   D <- D + d

    Source:
        Wang, Tang, Sun, Rossi, Xie, Peng, Hannagan, Sabatini, Poerio, Tomizuka, Zhan 2024, "Optimizing diffusion
        models for joint trajectory prediction and controllable generation", arXiv 2408.00766, section on ECM guidance;
        official code YixiaoWang7/OGD. Without the clipping it is MPGD without its autoencoder (He et al. 2023, arXiv
        2311.16424).

    Differences:
        "official" is the released step (guidance_scale 1 or 10, clip 1, eta 0), which has to be tuned to the slope of
        the target; its cost is a mean over samples and agents, so that its strength depends on the batch, ours is per
        sample. "adaptive" (default) needs no tuning: r^2 h is the gradient through a denoiser whose Jacobian is
        r^2 / a^2, r^2 being the variance that level a leaves open in data of size s; the clip, in units of r, matters
        for slopes with few large elements. Reference modes (ECMR) are left to the user, who has them.

    Bias:
        As the noise is kept, every step's d stays in x as a whole: the target counts too often, measured directions
        have too little spread, and the noise of y is explained with them (chi2 far below 1). r^2 is one number for all
        directions: what a measurement says of correlated, unmeasured parts reaches them only through the next
        denoising, late, and far modes are found less often than by DPS, which pays for the gradient of the network and
        is nearer to the posteriors of `invguide verify`.

    Args:
        num_steps: Noise levels, one network call and no gradient of it each. Default 50; fewer are faster and less
            accurate.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which "adaptive" means for every operator; lower
            where samples explain y better than its noise (chi2 below 1); "official" has to be tuned to the slope of the
            target.
        clip: Largest |d| of an element, above 0: in units of r, "official" in normalised units. Default 1.0; lower
            where few elements of the slope are large, infinity for no clipping.
        weight: Rule of the step: "adaptive" or "official", as above. Default "adaptive"; "official" to repeat released
            runs.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 50
    guidance_scale: NonNegative = 1.0
    clip: PositiveOrInfinite = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> ECMGuidanceState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return ECMGuidanceState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: ECMGuidanceState, k: int, noise: Noise
    ) -> tuple[ECMGuidanceState, ECMGuidanceInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        variance = open_variance(problem, a)
        guidance = clean_guidance(problem, state.x, a, variance)
        if self.weight == "official":
            shift, bound = self.guidance_scale * guidance.slope, self.clip
        else:
            # b = 0: x moves by all of d, as at the last step.
            strength = guided_strength(problem, guidance, a, 0.0, self.guidance_scale)
            shift = per_sample(strength, guidance.gradient) * guidance.gradient
            bound = self.clip * variance**0.5
        clipped = (shift.abs() > bound).flatten(1).to(shift).mean(1)
        shift = shift.clamp(-bound, bound)
        x = ddim(state.x, guidance.denoised, a, b, noise(), self.eta) + shift
        info = ECMGuidanceInfo(a, guidance.chi2, guidance.log_prob, clipped)
        return ECMGuidanceState(x, guidance.denoised + shift), info

    def estimate(self, state: ECMGuidanceState) -> Tensor:
        return state.denoised
