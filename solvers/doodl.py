"""DOODL: optimise the noise from which an invertible sampler starts, on its sphere, through the whole chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.adjoint.edict import choose_mixing, rollout_in
from invguide.arguments.rules import Count, NonNegative, Number, Positive, PositiveOrInfinite
from invguide.numerics.linear import inner, norm, per_sample
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver


class DOODLState(NamedTuple):
    z: Tensor  # (B, *shape), the noise to start from next, in units of the first level
    velocity: Tensor  # (B, *shape)
    radius: Tensor  # (B,), the norm that z keeps
    x0: Tensor  # (B, *shape), the best end so far
    log_best: Tensor  # (B,), its log target


class DOODLInfo(NamedTuple):
    log_prob: Tensor  # (B,), of this step's end
    chi2: Tensor  # (B,)


@dataclass(frozen=True)
class DOODL(Solver[DOODLState]):
    """Climb the log target over starting noises of constant norm, by gradients through all of an EDICT chain.

    Algorithm: num_steps times, from z ~ N(0, I)
        x0 = the mean of the pair where the EDICT chain from (sigma_max z, sigma_max z) ends, num_inner_steps long
        g = grad_z log p(y | x0), along the sphere, divided by its root mean square, elements within +-clip
        v <- momentum v + learning_rate (1 - k / num_steps) g
        z <- z + v + perturbation n, brought back to the norm of the first z
        The x0 of the highest log target is the result.

    Source:
        Wallace, Gokul, Ermon, Naik 2023, "End-to-end diffusion latent optimization improves classifier guidance",
        arXiv 2303.13703, alg. 1; official code salesforce/DOODL. The chain: `invguide.adjoint.edict`.

    Differences:
        The gradient has size 1, along the sphere, and the rate falls to zero, so that one setting does for every target
        (there a scale of 0.05 to 3 inside the loss and a clip of 1e-3 to 1e-2, by task). One target call at the pair's
        mean, of which either end is off by less than the discretisation (there one call for each end). All norms are
        per sample. 20 steps of the chain, mixed as much in all as 50 at 0.93, the setting there. The best end is kept:
        the last one has its perturbation in it.

    Bias:
        Maximises the target among noises of one norm: a likelihood is explained to the last digit where the sphere
        allows it, noise of y and all. What y does not see keeps the spread of its first noise, and modes are those in
        which a search starts: neither is the posterior's. `invguide verify` prints the distances.

    Args:
        num_steps: Steps of ascent, each an EDICT chain there and back. Default 50; more where the log target still
            rises.
        num_inner_steps: Steps of the chain, two network calls each. Default 20; more for a finer chain: they cost time,
            hardly any memory.
        mixing: p, what each state of the pair keeps of itself after a step, above 0.5 and at most 1. Default None:
            0.93^(50 / num_inner_steps), at least 0.6; higher where rounding spoils the way back (half precision), lower
            where the pair drifts apart.
        learning_rate: Root mean square of the first step, z having 1, above 0; it falls to 0. Default 0.05; lower where
            the log target jumps up and down.
        momentum: Share of the last step that the next one keeps, from 0 to below 1. Default 0.9; lower where the path
            overshoots.
        clip: Largest element of the gradient, whose root mean square is 1, above 0. Default 3.0; lower where few
            elements dominate, infinity for no bound.
        perturbation: Standard deviation of the noise that a step adds to z, which has 1. Default 1e-4; more to leave
            poor maxima, 0 for none.
        schedule: Noise levels of the chain: "karras", "exponential", "vp-linear" or "cosine" over the range of the
            prior, or num_inner_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another
            to repeat the runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True, prior_vjp=True)

    num_steps: Count = 50
    num_inner_steps: Count = 20
    mixing: float | None = None
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Number(0, 1, open_high=True)] = 0.9
    clip: PositiveOrInfinite = 3.0
    perturbation: NonNegative = 1e-4
    schedule: Schedule = "karras"

    def __post_init__(self) -> None:
        choose_mixing(self.mixing, self.num_inner_steps)

    def init(self, problem: Problem, noise: Noise) -> DOODLState:
        z = noise("init")
        zero = torch.zeros_like(z)
        return DOODLState(z, zero, norm(z), zero, z.new_full((len(z),), -torch.inf))

    def step(
        self, problem: Problem, state: DOODLState, k: int, noise: Noise
    ) -> tuple[DOODLState, DOODLInfo]:
        n = self.num_inner_steps
        levels = [problem.levels(self.schedule, n, i)[0] for i in range(n)] + [0.0]
        with torch.enable_grad():
            z = state.z.detach().requires_grad_()
            x0 = rollout_in(problem, levels[0] * z, levels, self.mixing)
        log_prob, chi2, slope = problem.gradient(x0)
        (gradient,) = torch.autograd.grad(x0, z, slope)
        # The first end is kept whatever it is, so that NaN comes to the driver's notice.
        better = (log_prob > state.log_best) | (k == 0)
        best = torch.where(per_sample(better.to(z.dtype), z) > 0, x0.detach(), state.x0)
        z, velocity = self._move(state, gradient, k, noise())
        log_best = torch.where(better, log_prob, state.log_best)
        return DOODLState(z, velocity, state.radius, best, log_best), DOODLInfo(log_prob, chi2)

    def _move(
        self, state: DOODLState, gradient: Tensor, k: int, n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return z and the velocity after one step of ascent."""
        z = state.z
        along = inner(gradient, z) / state.radius**2
        gradient = gradient - per_sample(along, z) * z
        rms = norm(gradient) / z[0].numel() ** 0.5
        gradient = gradient / per_sample(rms.clamp_min(1e-30), z)
        rate = self.learning_rate * (1 - k / self.num_steps)
        velocity = self.momentum * state.velocity + rate * gradient.clamp(-self.clip, self.clip)
        z = z + velocity + self.perturbation * n
        return z * per_sample(state.radius / norm(z), z), velocity

    def estimate(self, state: DOODLState) -> Tensor:
        return state.x0
