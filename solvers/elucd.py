"""EluCD: guidance by an off-the-shelf classifier at the clean estimate, with more of it in the middle of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf
from invguide.numerics.linear import norm, per_sample
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import clean_guidance, guided_strength, open_variance
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "ddpm", "edm")


class EluCDState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class EluCDInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D, "edm": of x brought to size 1
    log_prob: Tensor  # (B,)


@dataclass(frozen=True)
class EluCD(Solver[EluCDState]):
    """Guide by a classifier of clean images, which need never have seen noise.

    The classifier is the reward, `ClassLogProb(softened(network, beta=3), label, marginal=0.5)`: a softplus in the
    place of ReLUs smooths its gradient, `temperature` and `marginal` calibrate it.

    Algorithm:
        h = grad_D log p(y | D),   D = D(x; a) taken as given,   w_k = v_k + gamma v_0 sin(pi k / num_steps)
        adaptive:  x <- DDIM_eta(x, D, a -> b) + min(guidance_scale w_k / N, best step) h
                   v_k = (1 - b^2 / a^2) r^2,   r^2 = a^2 s^2 / (a^2 + s^2),   with the N and the bounds of our DPS
        ddpm:      x <- DDIM_eta(x, D, a -> b) + guidance_scale w_k sqrt(1 + b^2) h
                   v_k = (1 - b^2 / a^2) b^2 / (1 + b^2), the posterior variance of DDPM
        edm:       h at x / max(rms(x), 1);   x <- x + p_k rms(x) h / rms(h);   x <- DDIM_eta(x, D(x; a), a -> b)
                   p_k = guidance_scale (1 - k / (num_steps + 1) + gamma sin(pi k / num_steps))

    Source:
        Ma, Hu, Wang, Sun 2024, "Elucidating the design space of classifier-guided diffusion generation", arXiv
        2310.11311; official code AlexMaOLS/EluCD, folders DDPM and EDM.

    Differences:
        "adaptive" (default) needs no tuning, nor a classifier: v_k follows what level a leaves open in data of size s,
        and of it what the step from a to b closes. "ddpm" is the released shift of the mean (guidance_scale 1, gamma
        0.3, 250 steps of vp-linear, eta 1); their network has learned a variance between this one and a larger one.
        "edm" is the released push (guidance_scale 0.001 to 0.004, gamma 0 to 0.3, 10 to 18 steps of karras, eta 0),
        here without the second call of Heun's step and without churn. Released, images in [-1, 1] go to the classifier
        as they are, neither resized nor standardised, where `ClassLogProb` has `transform`; and exp(logits) overflows.

    Bias:
        r^2 is one number for all directions, as in ECMGuidance. gamma makes the target count more than once: samples
        are surer of their class than the posterior, measured directions narrower, and the noise of y is explained with
        them (chi2 far below 1); at gamma 0, classifiers are followed too little. DPS, which pays for the gradient of
        the network, is nearer to the posteriors of `invguide verify`. "edm" asks the classifier about noisy images, and
        its length does not know how sure the classifier is.

    Args:
        num_steps: Noise levels, one network call and no gradient of it each. Default 100; fewer are faster and less
            accurate.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which "adaptive" means for every target; lower
            where samples explain y better than its noise (chi2 below 1); released: 1 for "ddpm", 0.001 to 0.004 for
            "edm".
        gamma: How much more guidance in the middle of the run, as a share of the first step's. Default 0.3, for
            classifiers; 0 for measurements, of whose noise less is explained so.
        weight: Rule of the step: "adaptive", "ddpm" or "edm", as above. Default "adaptive"; the others to repeat
            released runs.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "vp-linear", as released for
            "ddpm"; "karras" goes with "edm".
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    guidance_scale: NonNegative = 1.0
    gamma: NonNegative = 0.3
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    eta: NonNegative = 1.0
    schedule: Schedule = "vp-linear"

    def init(self, problem: Problem, noise: Noise) -> EluCDState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return EluCDState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: EluCDState, k: int, noise: Noise
    ) -> tuple[EluCDState, EluCDInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        if self.weight == "edm":
            x, info = self._push(problem, state.x, k)
            denoised = problem.denoise(x, a)
            return EluCDState(ddim(x, denoised, a, b, noise(), self.eta), denoised), info
        variance = self._variance(problem, k)
        guidance = clean_guidance(problem, state.x, a, variance)
        if self.weight == "ddpm":
            strength = torch.full_like(guidance.log_prob, self.guidance_scale * a**2)
            strength = (1 + b**2) ** 0.5 * strength
        else:
            strength = guided_strength(problem, guidance, a, 0.0, self.guidance_scale)
        shift = per_sample(strength, guidance.gradient) * guidance.gradient
        x = ddim(state.x, guidance.denoised, a, b, noise(), self.eta) + shift
        info = EluCDInfo(a, guidance.chi2, guidance.log_prob)
        return EluCDState(x, guidance.denoised + shift), info

    def _variance(self, problem: Problem, k: int) -> float:
        """w_k."""
        bump = self.gamma * math.sin(math.pi * k / self.num_steps)
        return self._step_variance(problem, k) + bump * self._step_variance(problem, 0)

    def _step_variance(self, problem: Problem, k: int) -> float:
        """v_k."""
        a, b = problem.levels(self.schedule, self.num_steps, k)
        if self.weight == "ddpm":
            return b**2 * (1 - b**2 / a**2) / (1 + b**2)
        return open_variance(problem, a) * (1 - b**2 / a**2)

    def _push(self, problem: Problem, x: Tensor, k: int) -> tuple[Tensor, EluCDInfo]:
        """x after the step of "edm" that comes before the denoiser."""
        size = norm(x) / x[0].numel() ** 0.5
        log_prob, chi2, slope = problem.gradient(x / per_sample(size.clamp_min(1.0), x))
        fall = 1 - k / (self.num_steps + 1)
        share = fall + self.gamma * math.sin(math.pi * k / self.num_steps)
        length = self.guidance_scale * share * norm(x) / norm(slope).clamp_min(1e-30)
        sigma = problem.levels(self.schedule, self.num_steps, k)[0]
        return x + per_sample(length, x) * slope, EluCDInfo(sigma, chi2, log_prob)

    def estimate(self, state: EluCDState) -> Tensor:
        return state.denoised
