"""Feature guidance: follow a reward on the network's own features of the noisy state, as readout guidance does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf, Positive
from invguide.errors import InputError
from invguide.feature_reward import FeatureReward
from invguide.numerics.linear import norm, per_sample
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.reward import Weighted, terms
from invguide.rng import Noise
from invguide.sampling.step_size import reach
from invguide.schedule import Schedule, Window
from invguide.solver import Requires, Solver

WEIGHTS = ("bounded", "likelihood", "official")


class FeatureGuidanceState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class FeatureGuidanceInfo(NamedTuple):
    sigma: float
    log_prob: Tensor  # (B,), at the state before it is moved; NaN outside the window


@dataclass(frozen=True)
class FeatureGuidance(Solver[FeatureGuidanceState]):
    """Guide by the gradient of r(features of the noisy state); the call that denoises it gives the features too.

    Algorithm: inside the window
        r = sum of weight * FeatureReward(features at x, a) + the other rewards at D(x; a);   g = grad_x r
        bounded:     D <- D(x; a) + min(guidance_scale a^2, reach(a) / |g|) g;   reach: what level a leaves open
        likelihood:  D <- D(x; a) + guidance_scale a^2 g
        official:    z = x / sqrt(1 + a^2);   z <- num_inner_steps of Adam on r(z);   D <- D(x; a)
        x <- DDIM_eta(x, D, a -> b)

    Source:
        Luo, Darrell, Wang, Goldman, Holynski 2024, "Readout guidance: learning control from diffusion features", arXiv
        2312.02150, sec. 3; official code google-research/readout_guidance. The heads are yours: `FeatureReward`.

    Differences:
        "likelihood" takes r for log p(y | x), as classifier guidance does, which the paper's update is built on. The
        default is also kept within the distance that the noise level leaves open.
        "official" is the released update: AdamW without decay, in the coordinates of a variance-preserving network,
        learning rate 0.02, one step; there within the first half of 100 steps, window (0, 0.5), and in 8 bits where
        memory is short. It ignores the scale of r. Released losses see both branches of classifier-free guidance, and
        so do ours where the prior calls its network twice.

    Bias:
        Exact where r is log p(y | x) of the noisy state at every level. A head knows that as far as it was trained to:
        guidance is too strong where it is surer of y than the level allows, and "official" is no likelihood at all.

    Args:
        num_steps: Noise levels, one network call and its gradient each. Default 100; fewer are faster and less
            accurate.
        guidance_scale: Factor of the reward, 0 or more; "official" does not use it. Default 1.0, for a reward that is a
            log probability; higher where the head is followed too little.
        weight: Rule of the step: "bounded", "likelihood" or "official", as above. Default "bounded"; "official" to
            repeat released runs.
        window: (start, end), fractions of the run, start included, in which it is guided. Default (0.0, 1.0); (0, 0.5),
            as released, leaves the details to the prior.
        num_inner_steps: Of "official": steps of Adam at each level, each a network call and its gradient. Default 1;
            more to follow the head more closely.
        learning_rate: Of "official": Adam's, in units of z, above 0. Default 0.02; it takes the place of
            guidance_scale.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(
        target="reward", reward=FeatureReward, gradient=True, prior_vjp=True
    )
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    guidance_scale: NonNegative = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "bounded"
    window: Window = (0.0, 1.0)
    num_inner_steps: Count = 1
    learning_rate: Positive = 0.02
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> FeatureGuidanceState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return FeatureGuidanceState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: FeatureGuidanceState, k: int, noise: Noise
    ) -> tuple[FeatureGuidanceState, FeatureGuidanceInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        x, log_prob = state.x, state.x.new_full((len(state.x),), float("nan"))
        if not self.window[0] <= k / self.num_steps < self.window[1]:
            denoised = problem.denoise(x, a)
        elif self.weight == "official":
            x, log_prob = self._climb(problem, x, a)
            denoised = problem.denoise(x, a)
        else:
            denoised, log_prob, gradient = feature_gradient(problem, x, a)
            size = torch.full_like(log_prob, self.guidance_scale * a**2)
            if self.weight == "bounded":
                size = torch.minimum(size, reach(problem, a) / norm(gradient).clamp_min(1e-30))
            denoised = denoised + per_sample(size, x) * gradient
        x = ddim(x, denoised, a, b, noise(), self.eta)
        return FeatureGuidanceState(x, denoised), FeatureGuidanceInfo(a, log_prob)

    def _climb(self, problem: Problem, x: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """x after the inner optimiser, and r before it."""
        scale = (1 + a**2) ** 0.5
        z, values = x / scale, []
        optimiser = torch.optim.Adam([z], self.learning_rate, maximize=True)
        for _ in range(self.num_inner_steps):
            _, value, gradient = feature_gradient(problem, scale * z, a)
            values.append(value)
            z.grad = scale * gradient
            optimiser.step()
        return scale * z, values[0]

    def estimate(self, state: FeatureGuidanceState) -> Tensor:
        return state.denoised


def feature_gradient(problem: Problem, x: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """D(x; a), r (B,) of the features at x and of D, and dr / dx, from one network call and one vjp."""
    assert problem.reward is not None
    features = problem.rewards(FeatureReward)
    others = tuple(
        term for term in terms(problem.reward) if not isinstance(term[1], FeatureReward)
    )
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with contextlib.ExitStack() as stack:
            records = [stack.enter_context(part.record()) for _, part in features]
            denoised = problem.denoise(x, a)
        value = problem.with_reward(Weighted(others) if others else None).evaluate(denoised)[0]
        for (weight, part), recorded in zip(features, records, strict=True):
            value = value + weight * part.score(recorded, x)
        if not value.requires_grad:
            raise InputError(
                f"{problem.reward!r} does not depend on x (its gradient is None); use torch operations only on the "
                f"features, without detach"
            )
        problem.counters.vjp += len(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return denoised.detach(), value.detach(), gradient
