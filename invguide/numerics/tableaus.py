"""The steps of deterministic roll-outs of the probability flow dx / d sigma = (x - D) / sigma, all in one form.

Every step of every method is a short list of denoiser calls at points that are linear in what is known:

    X_i = p_i x + sum_{j<i} q_ij D_j,    D_i = D(X_i; s_i),    x' = p x + sum_j q_j D_j + r D_prev,

D_prev being the first denoised signal of the step before (multistep methods only).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from invguide.errors import InputError, suggest


class Combination(NamedTuple):
    """The linear combination x * p + sum_j q_j D_j + r D_prev."""

    p: float
    q: tuple[float, ...]
    r: float = 0.0

    def __call__(
        self, x: Tensor, denoised: Sequence[Tensor], previous: Tensor | None = None
    ) -> Tensor:
        total = self.p * x
        for weight, image in zip(self.q, denoised, strict=True):
            total = total + weight * image
        return total if previous is None or self.r == 0 else total + self.r * previous


class Step(NamedTuple):
    """One step: the levels and points of its denoiser calls, and its end."""

    levels: tuple[float, ...]
    points: tuple[Combination, ...]
    end: Combination


# Nodes c, matrix a (strictly lower triangular), weights b of explicit Runge-Kutta methods; the variable is sigma.
TABLEAUS: dict[str, tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": ((0.0,), ((),), (1.0,)),
    "midpoint": ((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "ralston": ((0.0, 2 / 3), ((), (2 / 3,)), (0.25, 0.75)),
    "rk4": (
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
METHODS = (*TABLEAUS, "ddim", "dpm++2s", "dpm++2m")


def make_steps(sigmas: Sequence[float], method: str) -> list[Step]:
    """Return the steps of a roll-out through these levels.

    "ddim" is Euler's method in this convention. "dpm++2s" and "dpm++2m" are the exponential integrators of second order
    in log sigma, with one call between the levels or with the last step's (Lu et al. 2022, arXiv 2211.01095, alg. 1 and
    2). A step to level 0 is Euler's where the method would call the denoiser at 0, as is the first of "dpm++2m".

    Raises:
        InputError: Unknown method, or levels that are no roll-out.
    """
    levels = [float(s) for s in sigmas]
    if len(levels) < 2:
        raise InputError(
            f"sigmas has {len(levels)} levels; a roll-out of n >= 1 steps takes n + 1"
        )
    if not all(a > b for a, b in pairwise(levels)) or levels[-1] < 0:
        raise InputError(
            f"sigmas is {levels}; expected levels that decrease strictly, the last >= 0"
        )
    if not all(map(math.isfinite, levels)):
        raise InputError(f"sigmas is {levels}; expected finite levels")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    steps: list[Step] = []
    for k, (a, b) in enumerate(pairwise(levels)):
        if method == "dpm++2s" and b > 0:
            steps.append(_two_stage(a, b))
        elif method == "dpm++2m" and k > 0 and b > 0:
            steps.append(_multistep(levels[k - 1], a, b))
        else:
            nodes, matrix, weights = TABLEAUS.get(method, TABLEAUS["euler"])
            if b == 0 and 1.0 in nodes:
                nodes, matrix, weights = TABLEAUS["euler"]
            steps.append(_runge_kutta(a, b, nodes, matrix, weights))
    return steps


def _runge_kutta(
    a: float,
    b: float,
    nodes: tuple[float, ...],
    matrix: tuple[tuple[float, ...], ...],
    weights: tuple[float, ...],
) -> Step:
    """dx / d sigma = (x - D) / sigma, its stages written out in x and D."""
    h = b - a
    levels = tuple(a + c * h for c in nodes)
    rows: list[Combination] = []

    def combine(coefficients: Sequence[float]) -> Combination:
        p, q = 1.0, [0.0] * len(coefficients)
        for j, (c, row, s) in enumerate(zip(coefficients, rows, levels, strict=False)):
            p += h * c * row.p / s
            q[j] -= h * c / s
            for i, weight in enumerate(row.q):
                q[i] += h * c * weight / s
        return Combination(p, tuple(q))

    for coefficients in matrix:
        rows.append(combine(coefficients))
    return Step(levels, tuple(rows), combine(weights))


def _two_stage(a: float, b: float) -> Step:
    """DPM-Solver++(2S) with its inner level halfway in log sigma."""
    middle = math.sqrt(a * b)
    points = (Combination(1.0, ()), Combination(middle / a, (1 - middle / a,)))
    return Step((a, middle), points, Combination(b / a, (0.0, 1 - b / a)))


def _multistep(before: float, a: float, b: float) -> Step:
    """DPM-Solver++(2M): D extrapolated from this level and the one before."""
    extra = 0.5 * math.log(a / b) / math.log(before / a)
    gain = 1 - b / a
    return Step(
        (a,), (Combination(1.0, ()),), Combination(b / a, (gain * (1 + extra),), -gain * extra)
    )
