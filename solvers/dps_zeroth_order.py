"""DPS for black boxes: the slope of the target at D is estimated from its values around D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count, NonNegative, OneOf, Positive, Several
from invguide.errors import InputError
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.step_size import open_variance
from invguide.sampling.zeroth_order import (
    Slope,
    climb,
    denoise_with_vjp,
    evaluate_around,
    mean_direction,
)
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

DIFFERENCES = ("forward", "central")


class DPSZerothOrderState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), guided D of the last level visited


class DPSZerothOrderInfo(NamedTuple):
    sigma: float
    chi2: Tensor  # (B,) of the unguided D
    log_prob: Tensor  # (B,)
    failed: Tensor  # (B,) candidates that failed
    unguided: Tensor  # (B,) whether too few were left, and the step went without guidance


@dataclass(frozen=True)
class DPSZerothOrder(Solver[DPSZerothOrderState]):
    """DPS with forward calls of the target only; the prior is differentiated, the operator or reward is not.

    Algorithm:
        u_k standard normal, k = 1 ... q = num_candidates;   mu = smoothing a s / sqrt(a^2 + s^2);   f = log target
        forward:  h = sum_k (f(D + mu u_k) - mean f) u_k / ((q - 1) mu)
        central:  h = sum_k (f(D + mu u_k) - f(D - mu u_k)) u_k / (q mu), from q / 2 directions
        g = (dD/dx)^T h;   D <- D + min(guidance_scale a^2 / N, best step) g;   x <- DDIM_eta(x, D, a -> b)

    Source:
        DPS-GSG, a baseline of Zheng et al. 2024, "Ensemble Kalman diffusion guidance for derivative-free inverse
        problems", arXiv 2409.20175; official code devzhk/enkg-pytorch. Gaussian smoothing: Nesterov and Spokoiny 2017,
        doi 10.1007/s10208-015-9296-2.

    Differences:
        Everything is per sample; released, a batch shares one scale. Forward differences are taken from the mean of
        the candidates, not from f(D): the curvature that all have in common drops out, and q - 1 directions remain,
        nearly twice as many as the same calls give by central differences, which see no curvature at all. The width
        follows what level a leaves open in data of size s; it is a constant 0.01 there. The strength is that of our
        DPS, N = 1 + min(chi2, ...), with |h|^2 freed of what the noise of h adds to it. A step is bounded by what level
        a leaves open, and by the top of a parabola through five values of f along it. Candidates that failed are left
        out.

    Bias:
        That of DPS. For a linear f, E[h] is its slope, but the cosine of the two is about 1 / sqrt(1 + d / q): with
        few candidates most of h is noise, steps are short, and y may not be explained after num_steps.

    Args:
        num_steps: Noise levels, one network call, its gradient, and num_candidates + 5 calls of the target each.
            Default 100; fewer are faster and less accurate.
        num_candidates: q, calls of the target for one slope, at least 2, even for "central". Default 128; more for
            signals of many numbers, as the slope is mostly noise below q = d.
        smoothing: Width of the candidates around D, as a share of the standard deviation that level a leaves open,
            above 0. Default 0.5; larger where the target has jumps or plateaus, smaller where it is strongly curved.
        difference: Differences "forward" or "central". Default "forward", nearly twice as many directions for the same
            calls; "central" for targets whose curvature drowns their slope.
        guidance_scale: Strength of the guidance, no unit. Default 1.0, which is meant for every operator; lower where
            samples explain y better than its noise (chi2 below 1).
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
    difference: Annotated[str, OneOf(DIFFERENCES)] = "forward"
    guidance_scale: NonNegative = 1.0
    eta: NonNegative = 1.0
    schedule: Schedule = "karras"

    def __post_init__(self) -> None:
        if self.difference == "central" and self.num_candidates % 2:
            raise InputError(
                f"num_candidates is {self.num_candidates}; expected an even number for central differences"
            )

    def init(self, problem: Problem, noise: Noise) -> DPSZerothOrderState:
        x = problem.begin(problem.levels(self.schedule, self.num_steps, 0)[0], noise("init"))
        return DPSZerothOrderState(x, torch.zeros_like(x))

    def step(
        self, problem: Problem, state: DPSZerothOrderState, k: int, noise: Noise
    ) -> tuple[DPSZerothOrderState, DPSZerothOrderInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        denoised, pull_back = denoise_with_vjp(problem, state.x, a)
        width = self.smoothing * open_variance(problem, a) ** 0.5
        central = self.difference == "central"
        count = self.num_candidates // 2 if central else self.num_candidates
        u = noise("directions", (count, *problem.shape))
        seen = evaluate_around(
            problem, denoised, width * (torch.cat([u, -u], 1) if central else u)
        )
        estimate = (central_slope if central else forward_slope)(seen.values, u, width)
        gradient = pull_back(estimate.slope)
        guided = climb(problem, denoised, seen, estimate, gradient, a, b, self.guidance_scale)
        x = ddim(state.x, guided, a, b, noise(), self.eta)
        info = DPSZerothOrderInfo(
            a, seen.chi2, seen.log_prob, seen.values.isnan().sum(1), estimate.directions < 1
        )
        return DPSZerothOrderState(x, guided), info

    def estimate(self, state: DPSZerothOrderState) -> Tensor:
        return state.denoised


def forward_slope(values: Tensor, u: Tensor, width: float) -> Slope:
    """Slope from values (B, q) at D + width u, u (B, q, *shape), of which only finite ones count."""
    known = values.isfinite()
    count = known.sum(1)
    mean = torch.where(known, values, 0.0).sum(1) / count.clamp_min(1)
    rise = torch.where(known, values - mean[:, None], 0.0)
    return Slope(mean_direction(rise / width, u, count - 1), count - 1)


def central_slope(values: Tensor, u: Tensor, width: float) -> Slope:
    """Slope from values (B, 2 n) at D + width u and then D - width u, u (B, n, *shape); pairs with both finite."""
    plus, minus = values.chunk(2, 1)
    known = (plus - minus).isfinite()
    rise = torch.where(known, plus - minus, 0.0)
    count = known.sum(1)
    return Slope(mean_direction(rise / (2 * width), u, count), count)
