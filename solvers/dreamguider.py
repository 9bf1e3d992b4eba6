"""Dreamguider: a gradient at the clean estimate whose length the data and the noise level set, not the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, Items, NonNegative, OneOf
from invguide.errors import InputError
from invguide.numerics.augmentation import AUGMENTATIONS, DRAWS, augment
from invguide.numerics.linear import norm, per_sample
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import open_variance, share_to_top
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver


class DreamguiderState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class DreamguiderInfo(NamedTuple):
    sigma: float
    log_prob: Tensor  # (B,), of the unguided D, mean over its views
    moved: Tensor  # (B,), |d| as a share of the size of clean data


@dataclass(frozen=True)
class Dreamguider(Solver[DreamguiderState]):
    """Guide by the direction of the gradient at the clean estimate alone: whatever the units of a reward are.

    Algorithm:
        f(D) = mean_j log p(y | T_j(D)) over num_augmentations random views T_j; none: log p(y | D)
        h = grad_D f,   D = D(x; a) taken as given
        d = min(guidance_scale c(a) s sqrt(dim) / |h|, best step) h,   c(a) = a^2 / (a^2 + s^2)
        x <- DDIM_eta(x, D, a -> b) + d;   D <- D + d

    Source:
        Nair, Patel 2024, "Dreamguider: improved training free diffusion-based conditional generation", arXiv
        2406.02549: time-varying factor, scale from the gradient, DiffuseAugment. No code is published.

    Differences:
        The factor c is the share of the data's variance s^2 that level a leaves open, and the length in its unit that
        of clean data, s sqrt(dim): ours, as no code tells theirs. The best step, on the parabola through f at D and at
        the full step, is ours as well; without it, a likelihood is overshot at every level. The views are those of
        `invguide.numerics.augmentation`, linear in D, drawn for each sample. They are off by default: they need a
        reward that does not mind where in a picture things are, as classifiers and CLIP-like scorers do not.

    Bias:
        The strength of the target is ignored, sigma_y included: this is a search for good samples near the prior, no
        posterior. f goes up as far as c lets it, and how much the samples spread is as the problem has it. DPS,
        which pays for the gradient of the network, is nearer to the posteriors of `invguide verify`.

    Args:
        num_steps: Noise levels, one network call and no gradient of it each. Default 50; fewer are faster and less
            accurate.
        guidance_scale: Longest step, in units of c(a) s sqrt(dim). Default 1.0; lower to stay nearer to the prior, 0
            for no guidance.
        augmentations: Views T: any of "flip", "translate", "crop" and "cutout". Default (), D itself; several for
            classifiers and CLIP-like scorers; for pictures and rewards only.
        num_augmentations: Views a step where there are augmentations, each a call of the reward and its gradient.
            Default 4; more for a steadier gradient.
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
    augmentations: Annotated[tuple[str, ...], Items((OneOf(AUGMENTATIONS),))] = ()
    num_augmentations: Count = 4
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> DreamguiderState:
        if self.augmentations and (problem.likelihood is not None or len(problem.shape) != 3):
            raise InputError(
                f"augmentations={self.augmentations} with samples of shape {problem.shape}"
                f"{' and a measurement' if problem.likelihood is not None else ''}; expected pictures (C, H, W) and a "
                f"reward only: a view of x does not explain y. Leave augmentations out"
            )
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return DreamguiderState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: DreamguiderState, k: int, noise: Noise
    ) -> tuple[DreamguiderState, DreamguiderInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        denoised = problem.denoise(state.x, a)
        draws = self._draws(noise)
        value, slope = self._gradient(problem, denoised, draws)
        size = problem.sigma_data * denoised[0].numel() ** 0.5
        length = self.guidance_scale * size * open_variance(problem, a) / problem.sigma_data**2
        unit = slope / per_sample(norm(slope).clamp_min(1e-30), slope)
        full = self._evaluate(problem, denoised + length * unit, draws)
        linear = length * norm(slope)
        # b = 0: x moves by all of d, as at the last step.
        moved = length * share_to_top(linear, linear - (full - value), a, 0.0)
        shift = per_sample(moved, unit) * unit
        x = ddim(state.x, denoised, a, b, noise(), self.eta) + shift
        info = DreamguiderInfo(a, value, moved / size)
        return DreamguiderState(x, denoised + shift), info

    def _draws(self, noise: Noise) -> list[Tensor]:
        """What is random about each view; empty: D itself."""
        if not self.augmentations:
            return []
        return list(noise.uniform("views", (self.num_augmentations, DRAWS)).unbind(1))

    def _evaluate(self, problem: Problem, x0: Tensor, draws: list[Tensor]) -> Tensor:
        """f, (B,)."""
        views = [augment(x0, self.augmentations, u) for u in draws] or [x0]
        return torch.stack([problem.evaluate(view)[0] for view in views]).mean(0)

    def _gradient(
        self, problem: Problem, x0: Tensor, draws: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """f, (B,), and its gradient; one view at a time, for memory."""
        if not draws:
            value, _, slope = problem.gradient(x0)
            return value, slope
        total, slopes = x0.new_zeros(len(x0)), torch.zeros_like(x0)
        for u in draws:
            with torch.enable_grad():
                start = x0.detach().requires_grad_()
                view = augment(start, self.augmentations, u)
            value, _, slope = problem.gradient(view)
            total = total + value / len(draws)
            slopes = slopes + torch.autograd.grad(view, start, slope)[0] / len(draws)
        return total, slopes

    def estimate(self, state: DreamguiderState) -> Tensor:
        return state.denoised
