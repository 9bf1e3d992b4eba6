"""D-Flow: optimise the noise from which a deterministic roll-out starts, through the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.adjoint.symplectic import guide_through
from invguide.arguments.rules import Count, NonNegative, OneOf
from invguide.errors import InputError
from invguide.likelihood import Likelihood
from invguide.noise import Gaussian
from invguide.numerics.lbfgs import newton_step, remember, shorten
from invguide.numerics.linear import inner, norm, per_sample
from invguide.numerics.tableaus import METHODS
from invguide.problem.problem import Problem
from invguide.rng import Noise
from invguide.schedule import Schedule
from invguide.solver import Requires, Solver

REGULARISERS = ("gaussian", "chi")
ENOUGH = 1e-4  # share of the promised rise that a step must bring


class DFlowState(NamedTuple):
    z: Tensor  # (B, *shape), starting noise in units of the first level
    x0: Tensor  # (B, *shape), where its roll-out ends
    log_density: Tensor  # (B,), log target - prior_weight R at z
    slope: Tensor  # (B, *shape), its gradient in z
    direction: Tensor  # (B, *shape), of the line search under way
    length: Tensor  # (B,), to try next
    steps: Tensor  # (B, memory, *shape), history of L-BFGS, newest last
    turns: Tensor  # (B, memory, *shape)


class DFlowInfo(NamedTuple):
    log_density: Tensor  # (B,), best so far
    chi2: Tensor  # (B,) of the last trial
    length: Tensor  # (B,)


@dataclass(frozen=True)
class DFlow(Solver[DFlowState]):
    """Find the noise whose roll-out explains the measurement and is likely itself.

    Algorithm:
        maximise log p(y | Phi(z)) - prior_weight R(z) over z, from z ~ N(0, I), by L-BFGS
        Phi: the probability flow from sigma_max z to 0 in num_inner_steps; its gradient by the adjoint method
        gaussian: R = |z - c|^2 / 2, c = 0;   chi: R = |z|^2 / 2 - (d - 1) log |z|
        Each step is one trial of a line search per sample: kept if it rises enough, else tried again, shorter.
        randomised: y <- y + sigma_y e and c <- the first z, with e ~ N(0, I) drawn once for each sample

    Source:
        Ben-Hamu, Puny, Gat, Karrer, Singer, Lipman 2024, "D-Flow: differentiating through flows for controlled
        generation", arXiv 2402.14017, alg. 1. Randomised: Oliver, He, Reynolds 1996, "Conditioning permeability fields
        to pressure data"; Bardsley, Solonen, Haario, Laine 2014, "Randomize-then-optimize".

    Differences:
        The true likelihood in the place of a plain square, so that prior_weight = 1 is Bayes' rule for z. "gaussian"
        by default, where the paper has the chi prior of |z|. Gradients by the symplectic adjoint in the memory of one
        network graph, for checkpointed back-propagation. Line searches per sample, where torch.optim.LBFGS has one for
        a batch; backtracking from a full step, for strong Wolfe. Starts from noise (there, mixed with the inversion of
        an initial guess). "randomised" is not in the paper.

    Bias:
        One point, not a sample: the most likely noise, so that spread is lost; for a Gaussian prior and a linear
        operator that point is the posterior mean. "chi" starts a null space from its own noise and leaves some spread
        there, of no particular size. randomised=True is exact for a Gaussian prior and a linear operator; otherwise it
        draws around each mode, and modes are those in which a search starts. `invguide verify` prints the distances of
        the default.

    Args:
        num_steps: Trials of the line search, each a roll-out there and back. Default 50; more where the log density of
            the last steps still rises.
        num_inner_steps: Steps of the roll-out from noise to signal. Default 20; more for a finer one: they cost time,
            hardly any memory.
        method: Of the roll-out: "euler", "midpoint", "heun", "ralston", "rk4", "ddim", "dpm++2s" or "dpm++2m". Default
            "dpm++2m", second order for one network call a step; "rk4" takes four, "euler" and "ddim" one, the others
            two.
        regulariser: R, "gaussian" or "chi". Default "gaussian"; "chi" keeps |z| that of noise, and some spread where y
            tells nothing.
        prior_weight: Weight of R against the log target, 0 or more, no unit. Default 1.0, Bayes' rule; lower to explain
            y more closely, noise and all.
        randomised: Whether each sample has a y and a centre c of its own, so that samples spread. Default False, one
            point; True for Gaussian noise, with "gaussian" and prior_weight 1.
        memory: Steps that L-BFGS remembers, two signals each per sample. Default 10; fewer to save memory.
        schedule: Noise levels of the roll-out: "karras", "exponential", "vp-linear" or "cosine" over the range of the
            prior, or num_inner_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another
            to repeat the runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=True, prior_vjp=True)

    num_steps: Count = 50
    num_inner_steps: Count = 20
    method: Annotated[str, OneOf(METHODS)] = "dpm++2m"
    regulariser: Annotated[str, OneOf(REGULARISERS)] = "gaussian"
    prior_weight: NonNegative = 1.0
    randomised: bool = False
    memory: Count = 10
    schedule: Schedule = "karras"

    @property
    def point_estimate(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.randomised

    def __post_init__(self) -> None:
        if self.randomised and (self.regulariser, self.prior_weight) != ("gaussian", 1):
            raise InputError(
                "randomised=True samples under the Gaussian prior of the noise; leave regulariser='gaussian' and "
                "prior_weight=1"
            )

    def init(self, problem: Problem, noise: Noise) -> DFlowState:
        law = None if problem.likelihood is None else problem.likelihood.noise
        if self.randomised and not isinstance(law, Gaussian):
            raise InputError(
                "DFlow(randomised=True) perturbs a measurement with Gaussian noise, and this problem has none"
            )
        z = noise("init")
        zero, row = torch.zeros_like(z), z.new_zeros(len(z))
        history = z.new_zeros(len(z), self.memory, *z.shape[1:])
        return DFlowState(z, zero, row - torch.inf, zero, zero, row, history, history)

    def step(
        self, problem: Problem, state: DFlowState, k: int, noise: Noise
    ) -> tuple[DFlowState, DFlowInfo]:
        centre = torch.zeros_like(state.z)
        if self.randomised:
            problem, centre = _perturbed(problem, noise.at(-1)), noise.at(-1)("init")
        z = state.z + per_sample(state.length, state.z) * state.direction
        x0, log_density, slope, chi2 = self._evaluate(problem, z, centre)
        promised = inner(state.slope, state.direction)
        rise = log_density - state.log_density
        # The first trial is the start itself. NaN is no rise.
        better = (rise >= ENOUGH * promised * state.length) | (k == 0)
        kept = per_sample(better.to(z.dtype), z) > 0
        steps, turns = remember(state.steps, state.turns, z - state.z, state.slope - slope, better)
        new = newton_step(-slope, steps, turns)
        # Without a history, a tenth of the noise's own size at most.
        first = (0.1 * z[0].numel() ** 0.5 / norm(slope).clamp_min(1e-30)).clamp_max(1.0)
        full = torch.where(turns.flatten(1).any(1), 1.0, first)
        after = DFlowState(
            torch.where(kept, z, state.z),
            torch.where(kept, x0, state.x0),
            torch.where(better, log_density, state.log_density),
            torch.where(kept, slope, state.slope),
            torch.where(kept, new, state.direction),
            torch.where(better, full, shorten(state.length, -promised, -rise)),
            steps,
            turns,
        )
        return after, DFlowInfo(after.log_density, chi2, state.length)

    def _evaluate(
        self, problem: Problem, z: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the end of the roll-out, log target - prior_weight R, its gradient in z, and chi2."""
        n = self.num_inner_steps
        levels = [problem.levels(self.schedule, n, i)[0] for i in range(n)] + [0.0]
        _, guidance = guide_through(problem, levels[0] * z, levels, self.method)
        away = z - centre
        value, slope = 0.5 * inner(away, away), away
        if self.regulariser == "chi":
            free, square = z[0].numel() - 1, inner(z, z)
            value = value - 0.5 * free * square.log()
            slope = slope - per_sample(free / square, z) * z
        log_density = guidance.log_prob - self.prior_weight * value
        gradient = levels[0] * guidance.gradient - self.prior_weight * slope
        return guidance.denoised, log_density, gradient, guidance.chi2

    def estimate(self, state: DFlowState) -> Tensor:
        return state.x0


def _perturbed(problem: Problem, noise: Noise) -> Problem:
    """Return the problem with noise of the measurement's own law added to y once more; its counters go on."""
    likelihood = problem.likelihood
    assert likelihood is not None
    assert isinstance(likelihood.noise, Gaussian)
    y = likelihood.y
    parts = 2 if y.is_complex() else 1
    e = noise("measurement", (*y.shape[1:], parts))
    e = torch.view_as_complex(e) if y.is_complex() else e[..., 0]
    moved = Likelihood(likelihood.operator, y + likelihood.noise.sigma_y * e, likelihood.noise)
    twin = Problem(
        problem.prior, moved, problem.reward, shape=problem.data_shape, condition=problem.condition
    )
    twin.counters, twin.batch_size = problem.counters, problem.batch_size
    return twin
