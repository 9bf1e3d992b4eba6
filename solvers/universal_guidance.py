"""Universal guidance: a gradient through the denoiser, an optimisation of the clean estimate, and repeated steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, CountOrNone, NonNegative, OneOf, Positive
from invguide.numerics.linear import per_sample
from invguide.problem.problem import Problem, TargetGradient
from invguide.reverse import ddim, renoise
from invguide.rng import Noise
from invguide.sampling.ascent import adam_ascent, conjugate_ascent
from invguide.sampling.step_size import guided_strength, reach
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "likelihood")
OPTIMISERS = ("conjugate", "adam")


class UniversalGuidanceState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class UniversalGuidanceInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D; NaN where the forward part is off
    log_prob: Tensor  # (B,)


@dataclass(frozen=True)
class UniversalGuidance(Solver[UniversalGuidanceState]):
    """Guide by anything that can be differentiated on a clean signal, forwards, backwards, and again.

    Algorithm: num_recurrences times a step
        forward:   g = grad_x log p(y | D(x; a))
                   adaptive:    D <- D + min(guidance_scale a^2 / N, best step) g, as in DPS
                   likelihood:  D <- D + guidance_scale a^2 g
        backward:  D <- num_backward_steps of ascent of log p(y | D) in D, without the network
        x' = DDIM_eta(x, D, a -> b);   again: x <- x' + sqrt(a^2 - b^2) n;   at last: x <- x'

    Source:
        Bansal, Chu, Schwarzschild, Sengupta, Goldblum, Geiping, Goldstein 2023, "Universal guidance for diffusion
        models", arXiv 2302.07121, alg. 1; official code arpitbansal297/Universal-Guided-Diffusion.

    Differences:
        "likelihood" is the paper's forward part, eq. 6, whose scale is 2 to 20000 there, by task; by default the
        strength is that of our DPS, and is not tuned. The backward part (eq. 7) is off by default: alone, it explains
        y to the last digit, noise and all. It climbs by conjugate gradients with lengths of their own, no farther than
        level a leaves open; "adam" is the released optimiser, here without its clamp, cut-off and warm start. The
        released latent sampler has no backward part at all. Nothing is renoised after the last repetition (released:
        and thrown away).

    Bias:
        Forward, that of DPS: repetitions remove some of it, as every one is a step of a corrector. Backward: the
        measured directions have no spread, whatever sigma_y is; the others are right only after many repetitions.

    Args:
        num_steps: Noise levels, num_recurrences network calls and their gradients each. Default 50; fewer are faster
            and less accurate.
        num_recurrences: Visits to each level. Default 2; more remove some of the bias, at their price.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which "adaptive" means for every operator; lower
            where samples explain y better than its noise (chi2 below 1); "likelihood" has to be tuned for each task; 0
            for no forward part, and no gradient of the network.
        weight: Rule of the forward part: "adaptive" or "likelihood", as above. Default "adaptive"; "likelihood" to
            repeat the paper's runs.
        num_backward_steps: Steps of the backward part at each visit. Default 0, none; some where y has to be met to the
            last digit.
        optimiser: Of the backward part: "conjugate" or "adam". Default "conjugate", which needs no learning rate;
            "adam" to repeat released runs.
        learning_rate: Of "adam": normalised units, above 0. Default 0.01; higher where the backward part moves too
            little.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 0.0, the probability flow; 1,
            ancestral sampling, mends errors of the guidance by fresh noise, and loses spread where steps are few.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True, prior_vjp=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 50
    num_recurrences: Count = 2
    guidance_scale: NonNegative = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    num_backward_steps: CountOrNone = 0
    optimiser: Annotated[str, OneOf(OPTIMISERS)] = "conjugate"
    learning_rate: Positive = 0.01
    eta: NonNegative = 0.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> UniversalGuidanceState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return UniversalGuidanceState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: UniversalGuidanceState, k: int, noise: Noise
    ) -> tuple[UniversalGuidanceState, UniversalGuidanceInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        x = state.x
        for visit in range(self.num_recurrences):
            if visit:
                x = renoise(x, b, a, noise(f"renoise {visit}"))
            denoised, info = self._forward(problem, x, a, b)
            denoised = self._backward(problem, denoised, a)
            x = ddim(x, denoised, a, b, noise(f"visit {visit}" if visit else ""), self.eta)
        return UniversalGuidanceState(x, denoised), info

    def _forward(
        self, problem: Problem, x: Tensor, a: float, b: float
    ) -> tuple[Tensor, UniversalGuidanceInfo]:
        """D, moved along the gradient through the denoiser."""
        if self.guidance_scale == 0:
            unknown = x.new_full((len(x),), float("nan"))
            return problem.denoise(x, a), UniversalGuidanceInfo(a, unknown, unknown)
        guidance = problem.guide(x, a)
        strength = per_sample(self._strength(problem, guidance, a, b), x)
        denoised = guidance.denoised + strength * guidance.gradient
        return denoised, UniversalGuidanceInfo(a, guidance.chi2, guidance.log_prob)

    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        """Factor of the gradient that is added to D, (B,)."""
        if self.weight == "likelihood":
            return torch.full_like(guidance.log_prob, self.guidance_scale * a**2)
        return guided_strength(problem, guidance, a, b, self.guidance_scale)

    def _backward(self, problem: Problem, denoised: Tensor, a: float) -> Tensor:
        """D after the inner optimiser, which does not see the network."""
        if self.num_backward_steps == 0:
            return denoised
        if self.optimiser == "adam":
            return adam_ascent(problem, denoised, self.num_backward_steps, self.learning_rate)
        return conjugate_ascent(problem, denoised, self.num_backward_steps, reach(problem, a))

    def estimate(self, state: UniversalGuidanceState) -> Tensor:
        return state.denoised
