"""Posterior samples for linear operators: at every level a draw of x0 given the noisy state and y, not a mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import Count
from invguide.numerics.linear import inner, per_sample
from invguide.problem.problem import Problem
from invguide.problem.whitened_map import WhitenedLinear
from invguide.rng import Noise
from invguide.sampling.twist import Tangent
from invguide.schedule import split_levels
from invguide.solver import Requires, Solver

TOLERANCE = 0.1  # relative residual of a solve that is near enough: below a = 0.1 one or two steps reach it


class TweedieMatheronState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), the last draw of x0; after the last step the conditional mean
    start: Tensor  # (B,), the first level


class TweedieMatheronInfo(NamedTuple):
    sigma: Tensor  # (B,)
    unsolved: Tensor  # (B,), relative residual of the linear solve


@dataclass(frozen=True)
class TweedieMatheron(Solver[TweedieMatheronState]):
    """Ancestral sampling by draws of x0 given x_a and y: Tweedie's covariance, Matheron's rule.

    Algorithm:
        D = D(x; a),   J = dD/dx,   C = a^2 (J + J^T) / 2 (vjp and difference);   n, m, e standard normals
        x' = D + a sqrt(n.Jn / |Jn|^2) J^T n                         a draw of N(D, C), its energy matched
        (s^2 + A C A*) u = y - A x' - s e                            at most num_cg preconditioned conjugate-gradient
                                                                     steps, to a relative residual of 0.1
        x0 = x' + C A* u                                             a draw of N(E[x0 | x, y], Cov[x0 | x, y])
        x <- (b^2 / a^2) x + (1 - b^2 / a^2) x0 + b sqrt(a^2 - b^2) / a m
        At the last level x' = D and e = 0: the conditional mean. Where A is orthonormal, y is itself x0 at noise level
        s: the run starts there, and u = 0.

    Source:
        Ours; no name for it was found. The covariance is that of Boys et al. 2023 (TMPD, arXiv 2310.06721) and Rozet
        et al. 2024 (MMPS, arXiv 2405.13712, alg. 1-2), which use the conditional mean in place of the draw; Matheron's
        rule: Journel, Huijbregts 1978; Wilson et al. 2021 (arXiv 2011.04026).

    Differences:
        MMPS moves by the mean E[x0 | x, y], which leaves ((a^2 - b^2) / a^2)^2 Cov[x0 | x, y] out of every step: its
        samples, as those of DPS, say that they know more than they do. Preconditioned by the operator's own `solve`
        with C taken as the white covariance of the same energy. Jacobians of networks are not symmetric: as a
        covariance, J^T alone lets what is observed leak into what is not, and samples of smooth pictures come out too
        wide; hence both products. A row whose curvature falls below what s^2 alone gives, which no covariance does,
        stops there.

    Bias:
        None for a Gaussian prior but that of the draw, whose spectrum is J^2 in place of J, and of an unconverged
        solve; for others C is Tweedie's at x, as if x0 given x were Gaussian. `invguide bench calibration` measures it.

    Args:
        num_steps: Levels; a sixth of them, at least one, above eight times the size of clean signals, the rest (rho =
            7) from there to a 25th of it. Default 30; fewer are faster and less accurate.
        num_cg: Steps of the linear solve at each level, at most, each a network call and a gradient. Default 3; more
            where `unsolved` of the steps stays high.
    """

    requires: ClassVar[Requires] = Requires(
        target="likelihood", gradient=False, linear=True, gaussian=True, prior_vjp=True
    )
    warm_start: ClassVar[bool] = True

    num_steps: Count = 30
    num_cg: Count = 3

    def init(self, problem: Problem, noise: Noise) -> TweedieMatheronState:
        top = problem.top
        x = problem.begin(top, noise("init"))
        start = torch.full_like(x.flatten(1)[:, 0], top)
        if problem.start is None and (direct := problem.direct) is not None:
            known = direct.level <= top
            start = torch.where(known, direct.level, start)
            x = torch.where(per_sample(known, x) > 0, direct.signal, x)
        return TweedieMatheronState(x, torch.zeros_like(x), start)

    def step(
        self, problem: Problem, state: TweedieMatheronState, k: int, noise: Noise
    ) -> tuple[TweedieMatheronState, TweedieMatheronInfo]:
        size, low = problem.sigma_data, problem.prior.sigma_min
        levels = split_levels(state.start, 8 * size, max(0.04 * size, low), self.num_steps)
        a, b = levels[k], levels[k + 1]
        last = k == self.num_steps - 1
        tangent = Tangent(problem, state.x, a)
        denoised = tangent.denoised.reshape(state.x.shape)
        draw, variance = tangent.draw(noise("draw").flatten(1))
        x0 = denoised if last else denoised + draw.reshape(state.x.shape)
        open_rows = state.start == problem.top  # y is not in their x
        unsolved = torch.zeros_like(a)
        if bool(open_rows.any()):
            linear = problem.whitened_linear()
            residual = linear.residual(x0)
            if not last:
                residual = residual - linear.draw(noise, "measurement")
            change, unsolved = self._condition(linear, tangent, residual, variance)
            change = change.reshape(x0.shape)
            x0 = x0 + per_sample(open_rows, x0) * change
        kept = per_sample((b / a) ** 2, x0)
        fresh = per_sample(b * (1 - (b / a) ** 2).clamp_min(0).sqrt(), x0)
        x = kept * state.x + (1 - kept) * x0 + fresh * noise()
        return TweedieMatheronState(x, x0, state.start), TweedieMatheronInfo(a, unsolved)

    def _condition(
        self, linear: WhitenedLinear, tangent: Tangent, residual: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """C A* u (B, d), where (I + A C A*) u is the residual, all whitened, and what is left of it, relative (B,)."""
        variance, total = variance.clamp_min(1e-30), inner(residual, residual).clamp_min(1e-30)
        change = torch.zeros_like(tangent.denoised)
        z = linear.precondition(residual, variance)
        p, rz = z, inner(residual, z)
        alive = torch.ones_like(rz, dtype=torch.bool)
        for _ in range(self.num_cg):
            alive = alive & (rz > 0) & (inner(residual, residual) > TOLERANCE**2 * total)
            if not bool(alive.any()):
                break
            Jp = tangent.symmetric(linear.adjoint(p).flatten(1))
            Cp = per_sample(tangent.sigma**2, change) * Jp
            image = p + linear.forward(Cp.reshape(tangent.x.shape))
            curvature = inner(p, image)
            alive = alive & (curvature >= 0.9 * inner(p, p))
            length = torch.where(alive, rz / curvature, 0.0)
            change = change + per_sample(length, change) * Cp
            residual = residual - per_sample(length, residual) * image
            z = linear.precondition(residual, variance)
            square = inner(residual, z)
            p = z + per_sample(torch.where(alive, square / rz, 0.0), z) * p
            rz = square
        return change, (inner(residual, residual) / total).sqrt()

    def estimate(self, state: TweedieMatheronState) -> Tensor:
        return state.denoised
