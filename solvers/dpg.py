"""DPG: diffusion policy gradient, guidance from the rewards of random candidates around the clean estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, Number, OneOf, Positive, Several
from invguide.numerics.linear import norm, per_sample
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import open_variance
from invguide.sampling.zeroth_order import (
    Evaluated,
    Slope,
    climb,
    denoise_with_vjp,
    evaluate_around,
    mean_direction,
)
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

WEIGHTS = ("adaptive", "official")


class DPGState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited
    slope: Tensor  # (B, *shape), running mean of the estimated d log target / d D
    temperature: Tensor  # (B,), running mean; 0 before the first value


class DPGInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D
    log_prob: Tensor  # (B,)
    failed: Tensor  # (B,) candidates that failed
    unguided: Tensor  # (B,) whether too few were left, and the step went without guidance


@dataclass(frozen=True)
class DPG(Solver[DPGState]):
    """Treat x0 = D + r n as the action of a policy with mean D, and follow its policy gradient.

    Algorithm:
        x_k = D + r n_k, k = 1 ... K = num_candidates;   r = smoothing a s / sqrt(a^2 + s^2);   f = log target
        Z <- 0.9 Z + 0.1 m chi2(D) / 2;   R_k = exp(f(x_k) / Z), over their mean;   b_k = mean of the other R
        h <- beta h + (1 - beta) Z mean_k (R_k - b_k) (x_k - D) / r^2,   beta = momentum (1 - k / num_steps)
        g = (dD/dx)^T h
        adaptive:  D <- D + min(guidance_scale a^2 / N, best step) g;   x <- DDIM_eta(x, D, a -> b)
        official:  D <- D + guidance_scale a g / |g|;                   x <- DDIM_eta(x, D, a -> b)

    Source:
        Tang, Xie, Feng, Wang, Zhang, Bai 2024, "Solving general noisy inverse problem via posterior sampling: a policy
        gradient viewpoint", arXiv 2403.10585, alg. 1; official code loveisbasa/DPG.

    Differences:
        Everything is per sample; released, the norms of a batch are one. R_k is divided by its mean, which the
        normalised gradient does not see and which keeps it from overflowing. Z has no units here: m chi2 / 2 is
        |r|^2 / (2 sigma_y^2), the loss of D; a reward, which has none, takes the spread of its candidates. The radius
        follows what level a leaves open in data of size s, where it is |r| / (2 sqrt(d)) there, in units of y. The
        momentum is a running mean of the slope at D, as its formula says; released, only the last gradient is kept.
        "adaptive" (default) takes Z times the policy gradient for the slope and moves by the strength of our DPS,
        which needs no tuning; "official" is the released step of constant length, whose scale grows with sqrt(d) and
        was chosen between 10 and 300 for each task. Candidates that failed are left out; -inf counts as R = 0.

    Bias:
        That of DPS, and its slope is that of the target smoothed over r: log mean exp(f / Z). With few candidates most
        of it is noise, as for DPSZerothOrder.

    Args:
        num_steps: Noise levels, one network call, its gradient, and num_candidates + 5 calls of the target each
            ("official": + 1). Default 100; fewer are faster and less accurate.
        num_candidates: K, calls of the target for one policy gradient, at least 2. Default 128; more for signals of
            many numbers, as the gradient is mostly noise below K = d.
        smoothing: Radius r of the policy, as a share of the standard deviation that level a leaves open, above 0.
            Default 0.5; larger where the target has jumps or plateaus, smaller where it is strongly curved.
        momentum: Share of the running slope that the first step keeps, from 0 to below 1; it falls to 0. Default 0.1;
            more where few candidates make slopes noisy.
        guidance_scale: Strength of the guidance. Default 1.0, which "adaptive" means for every operator (no unit; lower
            where samples explain y better than its noise); "official": length of a step in units of a, 10 to 300 by
            task.
        weight: Rule of the step: "adaptive" or "official", as above. Default "adaptive"; "official" to repeat the
            paper's runs.
        eta: Noise that a step adds, as a share of that of ancestral sampling. Default 1.0; lower, down to 0, the
            probability flow, for more spread with few steps.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=False, prior_vjp=True)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    num_candidates: Several = 128
    smoothing: Positive = 0.5
    momentum: Annotated[float, Number(0, 1, open_high=True)] = 0.1
    guidance_scale: NonNegative = 1.0
    weight: Annotated[str, OneOf(WEIGHTS)] = "adaptive"
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> DPGState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return DPGState(x, torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(len(x)))

    def step(
        self, problem: Problem, state: DPGState, k: int, noise: Noise
    ) -> tuple[DPGState, DPGInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        denoised, pull_back = denoise_with_vjp(problem, state.x, a)
        width = self.smoothing * open_variance(problem, a) ** 0.5
        n = noise("candidates", (self.num_candidates, *problem.shape))
        seen = evaluate_around(problem, denoised, width * n)
        temperature = running_temperature(state.temperature, seen, problem.measurement_size)
        fresh = policy_slope(seen.values, n, width, temperature)
        unguided = fresh.directions < 1
        # The running mean starts at its first value, and passes over steps that failed.
        beta = torch.full_like(temperature, self.momentum * (1 - k / self.num_steps))
        beta = beta.masked_fill(state.temperature == 0, 0.0).masked_fill(unguided, 1.0)
        beta = per_sample(beta, denoised)
        slope = beta * state.slope + (1 - beta) * fresh.slope
        gradient = pull_back(slope.masked_fill(per_sample(unguided, slope).bool(), 0.0))
        if self.weight == "official":
            length = norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
            guided = denoised + per_sample(self.guidance_scale * a / length, gradient) * gradient
        else:
            smooth = Slope(slope, fresh.directions)
            guided = climb(problem, denoised, seen, smooth, gradient, a, b, self.guidance_scale)
        x = ddim(state.x, guided, a, b, noise(), self.eta)
        info = DPGInfo(a, seen.chi2, seen.log_prob, seen.values.isnan().sum(1), unguided)
        return DPGState(x, guided, slope, temperature), info

    def estimate(self, state: DPGState) -> Tensor:
        return state.denoised


def running_temperature(previous: Tensor, seen: Evaluated, measurement_size: float) -> Tensor:
    """0.9 Z + 0.1 m chi2 / 2, (B,); without chi2, as for a reward, the spread of the candidates takes its place."""
    known = seen.values.isfinite()
    count = known.sum(1).clamp_min(1)
    centred = torch.where(known, seen.values, 0.0)
    centred = torch.where(known, centred - (centred.sum(1) / count)[:, None], 0.0)
    spread = (centred.square().sum(1) / count).sqrt()
    now = torch.where(seen.chi2.isnan(), spread, 0.5 * measurement_size * seen.chi2)
    smooth = torch.where(previous > 0, 0.9 * previous + 0.1 * now, now)
    return torch.where(known.any(1), smooth, previous)


def policy_slope(values: Tensor, n: Tensor, width: float, temperature: Tensor) -> Slope:
    """Z mean_k (R_k - b_k) n_k / width from values (B, K) at D + width n, n (B, K, *shape); NaN ones do not count."""
    failed = values.isnan()
    count = (~failed).sum(1)
    top = values.masked_fill(failed, -torch.inf).amax(1, keepdim=True)
    scale = temperature.clamp_min(torch.finfo(values.dtype).tiny)[:, None]
    share = torch.softmax(((values - top) / scale).masked_fill(failed, -torch.inf), 1)
    # R_k over its mean is count share_k; less the mean of the others, that is the following over 1 - 1 / count.
    advantage = (count[:, None] * share - 1).masked_fill(failed | share.isnan(), 0.0)
    return Slope(mean_direction(scale * advantage / width, n, count - 1), count - 1)
