"""Symplectic adjoint guidance: DPS whose clean estimate is an n-step roll-out in the place of one denoiser call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.adjoint.symplectic import guide_through
from invguide.arguments.rules import Count, NonNegative, OneOf
from invguide.numerics.linear import norm, per_sample
from invguide.numerics.tableaus import METHODS
from invguide.problem.problem import Problem, TargetGradient
from invguide.reverse import ddim, renoise
from invguide.rng import Noise
from invguide.sampling.step_size import guided_strength
from invguide.schedule import Schedule, Window
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "likelihood", "normalised")


class SymplecticAdjointState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class SymplecticAdjointInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the clean estimate; NaN outside the window
    log_prob: Tensor  # (B,)


@dataclass(frozen=True)
class SymplecticAdjoint(Solver[SymplecticAdjointState]):
    """Guide by the gradient through a short roll-out to a clean signal, exact and in the memory of one network call.

    Algorithm: inside the window, num_recurrences times a step
        z = the end of a roll-out from x at level a to 0, in num_inner_steps through levels of the rest of the schedule
        g = grad_x log p(y | z), by the symplectic adjoint;   h = grad_z log p(y | z)
        adaptive:    D <- D(x; a) + min(guidance_scale a^2 / N, best step) g, as in DPS
        likelihood:  D <- D(x; a) + guidance_scale a^2 g
        normalised:  x' <- x' + guidance_scale (1 - b / a) |D - x| g / |g|
        x' = DDIM_eta(x, D, a -> b);   again: x <- x' + sqrt(a^2 - b^2) n;   at last: x <- x'

    Source:
        Pan, Liew, Tan, Feng, Yan 2023, "Towards accurate guided diffusion sampling through symplectic adjoint method",
        arXiv 2312.12030, alg. 1 and 2; official code HanshuYAN/AdjointDPM.

    Differences:
        "normalised" is the release's step, whose length ignores that of g: 0.2 times the guidance of the text there,
        here a share of the step itself; and per sample, where the release has one length for a batch. By default the
        strength is that of our DPS, and guidance goes on to the end: released, steps 30 to 69 of 100, two visits each.
        num_inner_steps counts steps to level 0, and levels are met exactly; released, n grid points make n - 1 steps to
        the last level of the schedule, and stages of higher methods are called at the nearest grid level.
        One inner step is DPS.

    Bias:
        That of DPS, from one clean signal in the place of all that x leaves possible. z is sharper than D, so that a
        reward which means nothing on a blurred signal is followed better, and so are measurements of data whose
        variances differ; but far modes of a mixture are followed less well, and no number of inner steps makes the
        gradient that of the posterior: `invguide bench guidance` prints it.

    Args:
        num_steps: Noise levels, a roll-out there and back for each visit inside the window. Default 50; fewer are
            faster and less accurate.
        num_inner_steps: Steps of the roll-out, at most as many as the run has left. Default 4; 1 is DPS, more give a
            sharper clean signal, at their price.
        method: Of the roll-out: "euler", "midpoint", "heun", "ralston", "rk4", "ddim", "dpm++2s" or "dpm++2m". Default
            "euler", one network call a step; "dpm++2m" is of second order for as many.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which "adaptive" means for every operator; lower
            where samples explain y better than its noise (chi2 below 1); "normalised": length of the guidance as a
            share of the step, "likelihood": to be tuned.
        weight: Rule of the step: "adaptive", "likelihood" or "normalised", as above. Default "adaptive"; "normalised"
            to repeat released runs.
        window: (start, end), fractions of the run, start included, in which it is guided. Default (0.0, 1.0); (0.3,
            0.7), as released, to save time.
        num_recurrences: Visits to each level inside the window. Default 1; 2, as released, to follow the target more
            closely.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True, prior_vjp=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 50
    num_inner_steps: Count = 4
    method: Annotated[str, OneOf(METHODS)] = "euler"
    guidance_scale: NonNegative = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    window: Window = (0.0, 1.0)
    num_recurrences: Count = 1
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> SymplecticAdjointState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return SymplecticAdjointState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: SymplecticAdjointState, k: int, noise: Noise
    ) -> tuple[SymplecticAdjointState, SymplecticAdjointInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        if not self.window[0] <= k / self.num_steps < self.window[1]:
            denoised = problem.denoise(state.x, a)
            x = ddim(state.x, denoised, a, b, noise(), self.eta)
            unknown = x.new_full((len(x),), float("nan"))
            return SymplecticAdjointState(x, denoised), SymplecticAdjointInfo(a, unknown, unknown)
        x = state.x
        for visit in range(self.num_recurrences):
            if visit:
                x = renoise(x, b, a, noise(f"renoise {visit}"))
            denoised, guidance = guide_through(
                problem, x, self.inner_levels(problem, k), self.method
            )
            if self.weight != "normalised":
                strength = self._strength(problem, guidance, a, b)
                denoised = denoised + per_sample(strength, denoised) * guidance.gradient
            n = noise(f"visit {visit}" if visit else "")
            x, before = ddim(x, denoised, a, b, n, self.eta), x
            if self.weight == "normalised":
                length = self.guidance_scale * (1 - b / a) * norm(denoised - before)
                size = length / norm(guidance.gradient).clamp_min(1e-30)
                x = x + per_sample(size, x) * guidance.gradient
        info = SymplecticAdjointInfo(a, guidance.chi2, guidance.log_prob)
        return SymplecticAdjointState(x, denoised), info

    def inner_levels(self, problem: Problem, k: int) -> list[float]:
        """Every so many of the levels from step k on, down to 0."""
        rest = self.num_steps - k
        count = min(self.num_inner_steps, rest)
        levels = (
            problem.levels(self.schedule, self.num_steps, k + i * rest // count)[0]
            for i in range(count)
        )
        return [*levels, 0.0]

    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        """Factor of the gradient that is added to D, (B,)."""
        if self.weight == "likelihood":
            return torch.full_like(guidance.log_prob, self.guidance_scale * a**2)
        return guided_strength(problem, guidance, a, b, self.guidance_scale)

    def estimate(self, state: SymplecticAdjointState) -> Tensor:
        return state.denoised
