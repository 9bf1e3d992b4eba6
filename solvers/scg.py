"""SCG: stochastic control guidance, the best of several next states by the reward of their clean estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from invguide.arguments.rules import MOST, Count, CountOrNone, Items, Number, OneOf, Positive
from invguide.errors import InputError
from invguide.problem.problem import Problem
from invguide.reverse import ddim
from invguide.rng import Noise
from invguide.sampling.particles import log_mean_exp, look_around
from invguide.schedule import Schedule, WindowOrNone
from invguide.solver import Requires, Solver

SELECT = ("greedy", "softmax")


class SCGState(NamedTuple):
    x: Tensor  # (B, *shape) at the current level
    denoised: Tensor  # (B, *shape), D of x at the current level


class SCGInfo(NamedTuple):
    sigma: float
    value: Tensor  # (B,) of the chosen candidate; NaN where the step was not guided
    failed: Tensor  # (B,) evaluations that gave NaN
    lost: Tensor  # (B,) booleans: every candidate failed, and the first one was kept


@dataclass(frozen=True)
class SCG(Solver[SCGState]):
    """Draw several next states, denoise them, and go on with one that the target likes.

    Algorithm:
        c_k = DDIM_eta(x, D, a -> b) with noise n_k, k = 1 ... K = num_candidates
        D_k = D(c_k; b),   V_k = target(D_k), the log likelihood or reward
        greedy:   k = argmax V, ties at random
        softmax:  k ~ exp(K / (K - 1) V_k / temperature)
        x, D <- c_k, D_k;   the last step returns D

        num_draws > 0:  V_k = log mean_m exp(target(D_k + r n_m)),   r^2 = b^2 s^2 / (b^2 + s^2), data of size s
        blocks:         one k for each block, from the last axes cut into that many parts, in turn: the other blocks
                        stay as chosen so far, which are those of c_1 at first

    Source:
        Huang et al. 2024, "Symbolic music generation with non-differentiable rule guided diffusion", arXiv 2402.14285,
        alg. 1; official code yjhuangcd/rule-guided-music. Softmax selection: Li et al. 2024 (SVDD), arXiv 2408.08252.

    Differences:
        The released code denoises the candidates of level b as if they were at a; here at b, and D of the winner
        serves the next step: as many network calls as candidates. `window` is the part of the steps with a choice
        (released: from 0.25 on); elsewhere one candidate is drawn. Candidates whose evaluation fails are skipped;
        where all fail, the first is kept. The factor K / (K - 1) is ours: without it, few candidates guide too
        little, by that factor to first order. `num_draws` is ours too: V is log E[exp(target(x0))], for which
        the target at D stands in the paper. Blocks pay where the reward is a sum over them: then choosing one
        by one is choosing among K^blocks candidates. Otherwise it is a search along coordinates, no worse than
        c_1 by the reward of the mosaic of clean estimates. It costs blocks times as many evaluations, and one
        network call more, for the mosaic's own D.

    Bias:
        Greedy overshoots the target, the more so with more candidates and steps: spread is lost, and with sharp targets
        samples leave the prior. Softmax with temperature 1 tends to p(x) exp(target) for many steps as far as V is
        right: at D it overshoots as DPS does; num_draws helps where p(x0 | x) is roughly white, and
        widens far too much where it is not. Both are measured by `invguide verify`. No weights correct for it: see
        FeynmanKac.

    Args:
        num_steps: Noise levels, num_candidates calls of the network and of the target each (blocks and num_draws
            multiply the latter). Default 100; fewer are faster and less accurate.
        num_candidates: K, next states to choose from. Default 16; more follow the target more closely, at their price;
            1 is the prior.
        select: How to choose: "greedy" or "softmax", as above. Default "greedy"; "softmax" for samples and not the
            best.
        temperature: Of "softmax": in units of the log target, above 0. Default 1.0, for samples; lower is greedier.
        num_draws: Calls of the target around each D_k, for V_k. Default 0, at D_k itself; some where the target is
            sharp and p(x0 | x) roughly white.
        blocks: Into how many parts the last axes are cut, for a choice in each, such as (2, 2) for quarters of a
            picture. Default (), whole signals; several where the reward is a sum over them.
        window: (start, end), fractions of the run, both included, in which there is a choice. Default (0.0, 1.0);
            (0.25, 1), as released, saves calls while D is vague.
        eta: Noise that a step adds, by which candidates differ, as a share of that of ancestral sampling, above 0.
            Default 1.0; lower for candidates nearer to each other.
        schedule: Noise levels: "karras", "exponential", "vp-linear" or "cosine" over the range of the prior, or
            num_steps + 1 levels of your own, normalised units, falling to 0. Default "karras"; another to repeat the
            runs of a paper.
    """

    requires: ClassVar[Requires] = Requires(target="either", gradient=False)
    warm_start: ClassVar[bool] = True

    num_steps: Count = 100
    num_candidates: Count = 16
    select: Annotated[str, OneOf(SELECT)] = "greedy"
    temperature: Positive = 1.0
    num_draws: CountOrNone = 0
    blocks: Annotated[tuple[int, ...], Items((Number(1, MOST, whole=True),))] = ()
    window: WindowOrNone = (0.0, 1.0)
    eta: Positive = 1.0
    schedule: Schedule = "karras"

    def init(self, problem: Problem, noise: Noise) -> SCGState:
        level = problem.levels(self.schedule, self.num_steps, 0)[0]
        x = problem.begin(level, noise("init"))
        return SCGState(x, problem.denoise(x, level))

    def step(
        self, problem: Problem, state: SCGState, k: int, noise: Noise
    ) -> tuple[SCGState, SCGInfo]:
        a, b = problem.levels(self.schedule, self.num_steps, k)
        if b == 0:
            return SCGState(state.denoised, state.denoised), self._unguided(a, state.x)
        start, end = self.window
        if self.num_candidates == 1 or not start <= k / self.num_steps <= end:
            x = ddim(state.x, state.denoised, a, b, noise(), self.eta)
            return SCGState(x, problem.denoise(x, b)), self._unguided(a, x)
        return self._select(problem, state, a, b, noise)

    def _select(
        self, problem: Problem, state: SCGState, a: float, b: float, noise: Noise
    ) -> tuple[SCGState, SCGInfo]:
        rows, count, shape = len(state.x), self.num_candidates, problem.shape
        problem_of_each = problem.repeat(count, rows)

        def each(t: Tensor) -> Tensor:
            return t.repeat_interleave(count, 0)

        # The first candidate has the noise of the unguided step.
        fresh = torch.cat([noise()[:, None], noise("candidates", (count - 1, *shape))], 1)
        xs = ddim(each(state.x), each(state.denoised), a, b, fresh.flatten(0, 1), self.eta)
        estimates = problem_of_each.denoise(xs, b).unflatten(0, (rows, count))
        xs = xs.unflatten(0, (rows, count))
        x, denoised = xs[:, 0], estimates[:, 0]
        draws = [each(n) for n in noise("draws", (self.num_draws, *shape)).unbind(1)]
        info, masks = self._unguided(a, x), _masks(self.blocks, x[0])
        for i, block in enumerate(masks):
            # Each candidate in turn, in this block, within the mosaic of the blocks chosen so far.
            mosaic = torch.where(block, estimates, denoised[:, None]).flatten(0, 1)
            if draws:
                values = look_around(problem_of_each, mosaic, b, draws)
            else:
                values = problem_of_each.evaluate(mosaic)[0][None]
            value = log_mean_exp(values).unflatten(0, (rows, count))
            chosen = self._choose(value, noise.uniform(f"choice {i}", (count,)))
            at = torch.arange(rows, device=x.device), chosen
            x, denoised = (
                torch.where(block, xs[at], x),
                torch.where(block, estimates[at], denoised),
            )
            failed = values.isnan().unflatten(1, (rows, count)).sum((0, 2))
            lost = info.lost | value.isnan().all(1)
            info = SCGInfo(a, value[at], info.failed + failed, lost)
        if len(masks) > 1:
            denoised = problem.denoise(x, b)
        return SCGState(x, denoised), info

    def _choose(self, value: Tensor, u: Tensor) -> Tensor:
        """Index (B,) by values and uniforms (B, K); NaN is passed over, and where there is nothing else it is 0."""
        known = ~value.isnan()
        best = torch.where(known, value, -torch.inf).amax(1, keepdim=True)
        gap = torch.where(value == best, 0.0, value - best)  # equal infinities are ties
        if self.select == "greedy":
            score = torch.where(gap == 0, 0.0, -torch.inf)
        else:
            score = gap * (value.shape[1] / (value.shape[1] - 1) / self.temperature)
        # The argmax of scores plus Gumbel noise is a draw from their softmax.
        gumbel = -torch.log(-torch.log(u.clamp_min(torch.finfo(u.dtype).tiny)))
        chosen = torch.where(known, score + gumbel, -torch.inf).argmax(1)
        return torch.where(known.any(1), chosen, 0)

    def _unguided(self, sigma: float, x: Tensor) -> SCGInfo:
        none = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return SCGInfo(sigma, x.new_full((len(x),), torch.nan), none, none.bool())

    def estimate(self, state: SCGState) -> Tensor:
        return state.denoised


def _masks(blocks: tuple[int, ...], sample: Tensor) -> list[Tensor]:
    """Booleans shaped like one sample, one for each block of its last axes; together they cover it once."""
    sizes = sample.shape[sample.ndim - len(blocks) :] if blocks else ()
    if len(sizes) != len(blocks) or any(n > size for n, size in zip(blocks, sizes)):
        raise InputError(
            f"blocks is {blocks}; expected at most as many as there are entries along the last axes of x, "
            f"which has shape {tuple(sample.shape)}"
        )
    labels = torch.zeros(sizes, dtype=torch.long, device=sample.device)
    for axis, (parts, size) in enumerate(zip(blocks, sizes)):
        along = torch.arange(size, device=sample.device) * parts // size
        labels = labels * parts + along.reshape(-1, *(1,) * (len(sizes) - 1 - axis))
    labels = labels.expand(sample.shape)
    return [labels == i for i in range(int(labels.max()) + 1)]
