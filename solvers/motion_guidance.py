"""Motion guidance: edit a picture so that its parts move, by a flow and a colour reward, and keep the rest of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf, PositiveOrInfinite
from invguide.errors import CompatibilityError, ShapeError
from invguide.numerics.linear import norm, per_sample
from invguide.problem.problem import Problem, TargetGradient
from invguide.reverse import ddim, renoise
from invguide.reward import EditReward
from invguide.rng import Noise
from invguide.sampling.step_size import guided_strength
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "official")


class MotionGuidanceState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: (
        Tensor  # (B, *shape), guided D of the last level visited, the source outside the edit mask
    )


class MotionGuidanceInfo(NamedTuple):
    sigma: float
    log_prob: Tensor  # (B,) of the unguided D


@dataclass(frozen=True)
class MotionGuidance(Solver[MotionGuidanceState]):
    """Follow a reward on the edits of a source picture, `Motion`, and keep the source outside its edit mask.

    Algorithm: from x = source + sigma_max n, num_recurrences times a step, with M the edit mask and w = guidance_scale
        D <- M D(x; a) + (1 - M) source,   g = M grad_x r(D)
        adaptive:  D <- D + min(w a^2, best step) g, as in DPS: per sample, no farther than level a leaves open
        official:  D <- D + a u,   u = a w g, clipped to |u| <= clip sqrt(pixels) per sample
        x' = DDIM_eta(x, D, a -> b);   again: x <- x' + sqrt(a^2 - b^2) n;   at last: x <- x'

    Source:
        Geng, Owens 2024, "Motion guidance: diffusion-based image editing with differentiable motion estimators", arXiv
        2401.18085, sec. 3; official code dangeng/motion_guidance.

    Differences:
        The released sampler writes source + a n into x outside the mask, with noise that is fresh at every visit or
        that of an inversion. Here D is the source there, which makes x the source with noise of level a as well, but
        noise that changes as that of a clean signal does; the reward sees the source there, where the released one
        sees what the network makes of it; and the result is the source to the last digit.
        "official" is the released step, whose clip is 200 for latents of 128^2 numbers: 1.5625 of the length of their
        noise; there for whole batches, on 500 steps of 10 visits, times a schedule of weights that is left out. By
        default the strength is that of our DPS. Nothing is renoised after the last repetition.
        A schedule that begins at a lower level keeps more of the source, as SDEdit does.

    Bias:
        That of universal guidance, and no likelihood is meant: a weight of 300 wants the top of the reward. Seams at
        the edge of the mask are only as good as the prior's view of both sides.

    Args:
        num_steps: Noise levels, num_recurrences network calls and their gradients each. Default 50; fewer are faster
            and less accurate.
        num_recurrences: Visits to each level. Default 2; more to follow the reward more closely, at their price.
        guidance_scale: w, weight of the reward, per unit of it, 0 or more. Default 300.0, for `Motion` with its own
            weights; lower where the result looks unnatural.
        weight: Rule of the step: "adaptive" or "official", as above. Default "adaptive"; "official" to repeat released
            runs.
        clip: Of "official": longest step, root mean square in units of the noise level, above 0. Default 1.5625, as
            released; infinity for no bound.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 0.0, the probability flow; 1,
            ancestral sampling, mends errors of the guidance by fresh noise, and loses spread where steps are few.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; levels of your own that
            begin lower keep more of the source.
    """

    requires: ClassVar[Requires] = Requires(
        target="reward", reward=EditReward, gradient=True, prior_vjp=True
    )

    num_steps: Count = 50
    num_recurrences: Count = 2
    guidance_scale: NonNegative = 300.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    clip: PositiveOrInfinite = 1.5625
    eta: NonNegative = 0.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> MotionGuidanceState:
        n = noise("init")
        source, _ = self._edit(problem, n)
        x = source + problem.levels(self.schedule, self.num_steps, 0)[0] * n
        return MotionGuidanceState(x, source.expand_as(x).clone())

    def step(
        self, problem: Problem, state: MotionGuidanceState, k: int, noise: Noise
    ) -> tuple[MotionGuidanceState, MotionGuidanceInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        x = state.x
        source, mask = self._edit(problem, x)
        for visit in range(self.num_recurrences):
            if visit:
                x = renoise(x, b, a, noise(f"renoise {visit}"))
            guidance = problem.guide(x, a, lambda d: mask * d + (1 - mask) * source)
            guidance = guidance._replace(gradient=mask * guidance.gradient)
            strength = self._strength(problem, guidance, a, b)
            denoised = guidance.denoised + per_sample(strength, x) * guidance.gradient
            x = ddim(x, denoised, a, b, noise(f"visit {visit}"), self.eta)
        return MotionGuidanceState(x, denoised), MotionGuidanceInfo(a, guidance.log_prob)

    def _edit(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        """Source and edit mask, (*shape) in normalised units and something that broadcasts to it."""
        edits = problem.rewards(EditReward)
        if len(edits) != 1:
            raise CompatibilityError(
                f"MotionGuidance edits one picture, and {problem.reward!r} names {len(edits)}; leave one"
            )
        edit = edits[0][1]
        if edit.source.shape != x.shape[1:]:
            raise ShapeError(
                f"the source has shape {tuple(edit.source.shape)} and samples {tuple(x.shape[1:])}; expected the same: "
                f"pass shape={tuple(edit.source.shape)}"
            )
        return problem.prior.to_normalised(edit.source.to(x)), edit.edit_mask.to(x)

    def _strength(self, problem: Problem, guidance: TargetGradient, a: float, b: float) -> Tensor:
        """Factor of the gradient that is added to D, (B,)."""
        if self.weight == "adaptive":
            return guided_strength(problem, guidance, a, b, self.guidance_scale)
        length = norm(guidance.gradient).clamp_min(1e-30)
        most = a * self.clip * guidance.gradient[0].numel() ** 0.5 / length
        return torch.full_like(most, self.guidance_scale * a**2).minimum(most)

    def estimate(self, state: MotionGuidanceState) -> Tensor:
        return state.denoised
