"""Noise levels: n + 1 decreasing values, the last one 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.arrays import Refused, as_tensor
from invguide.arguments.rules import Number, Rule
from invguide.errors import InputError, suggest

SCHEDULES = ("karras", "exponential", "vp-linear", "cosine")


class _Levels(Rule):
    expected = "the name of a schedule, or strictly decreasing levels that end in 0"

    def take(self, value: Any) -> str | tuple[float, ...]:
        if isinstance(value, str):
            if value in SCHEDULES:
                return value
            raise Refused(suggest(value, SCHEDULES))
        levels = _numbers(value)
        if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in pairwise(levels)):
            raise Refused("")
        return levels


@dataclass(frozen=True)
class _Part(Rule):
    """Fractions of a run; `empty`: start may be end."""

    empty: bool = False

    @property
    def expected(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        sign = "<=" if self.empty else "<"
        return f"(start, end) as fractions of the run, 0 <= start {sign} end <= 1"

    def take(self, value: Any) -> tuple[float, float]:
        ends = _numbers(value)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            raise Refused("")
        if ends[0] == ends[1] and not self.empty:
            raise Refused("")
        return ends[0], ends[1]


def _numbers(value: Any) -> tuple[float, ...]:
    """A sequence of finite numbers as floats."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        value = as_tensor(value).tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Refused("")
    return tuple(float(Number().take(item)) for item in value)


Schedule = Annotated[str | Sequence[float], _Levels()]
Window = Annotated[tuple[float, float], _Part()]
WindowOrNone = Annotated[tuple[float, float], _Part(empty=True)]


def make_sigmas(
    schedule: Schedule, num_steps: int, sigma_min: float, sigma_max: float, *, rho: float = 7.0
) -> Tensor:
    """Return num_steps + 1 noise levels from sigma_max down to sigma_min, then 0, as float64.

    Args:
        schedule: "karras" (sigma^(1/rho) linear; arXiv 2206.00364, eq. 5), "exponential" (log sigma linear),
            "vp-linear" (beta linear in time, 0.1 to 20; arXiv 2011.13456, eq. 33), "cosine" (arctan-uniform; arXiv
            2102.09672, eq. 17 without offset), or the levels themselves (then the other arguments are ignored
            but for num_steps, which must be one less than their number).

    Raises:
        InputError: Unknown name, or user levels that do not decrease strictly to 0.
    """
    if not isinstance(schedule, str):
        return _user_sigmas(schedule, num_steps)
    if num_steps < 1:
        raise InputError(f"num_steps is {num_steps}; expected at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise InputError(
            f"noise levels from {sigma_max} to {sigma_min}; expected 0 < sigma_min <= sigma_max"
        )
    u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if schedule == "karras":
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        sigmas = (high + u * (low - high)) ** rho
    elif schedule == "exponential":
        sigmas = (math.log(sigma_max) + u * math.log(sigma_min / sigma_max)).exp()
    elif schedule == "vp-linear":
        # sigma^2 + 1 = exp(0.1 t + 19.9 t^2 / 2), solved for t at both ends.
        ends = [_vp_time(s) for s in (sigma_max, sigma_min)]
        t = ends[0] + u * (ends[1] - ends[0])
        sigmas = torch.expm1(0.1 * t + 9.95 * t**2).sqrt()
    elif schedule == "cosine":
        ends = [math.atan(sigma_max), math.atan(sigma_min)]
        sigmas = torch.tan(ends[0] + u * (ends[1] - ends[0]))
    else:
        raise InputError(f"unknown schedule {schedule!r}; {suggest(schedule, SCHEDULES)}")
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _vp_time(sigma: float) -> float:
    return (-0.1 + math.sqrt(0.01 + 4 * 9.95 * math.log1p(sigma**2))) / (2 * 9.95)


def _user_sigmas(levels: Sequence[float], num_steps: int) -> Tensor:
    sigmas = torch.as_tensor(levels, dtype=torch.float64)
    if (
        sigmas.ndim != 1
        or len(sigmas) < 2
        or sigmas[-1] != 0
        or not bool((sigmas.diff() < 0).all())
    ):
        raise InputError(
            f"schedule {list(levels)!r}: expected at least two strictly decreasing levels that end in 0"
        )
    if len(sigmas) != num_steps + 1:
        raise InputError(
            f"{len(sigmas)} noise levels for num_steps={num_steps}; expected {num_steps + 1}"
        )
    return sigmas


@lru_cache(maxsize=64)
def level_list(
    schedule: Schedule, num_steps: int, sigma_min: float, sigma_max: float
) -> tuple[float, ...]:
    """Return `make_sigmas` as numbers, remembered: solvers ask for it at every step."""
    return tuple(make_sigmas(schedule, num_steps, sigma_min, sigma_max).tolist())


def split_levels(start: Tensor, middle: float, low: float, num_steps: int) -> Tensor:
    """Return num_steps + 1 levels of each row, from its own start (B,) to 0, (num_steps + 1, B).

    Rows that start above `middle` spend a sixth of the levels, one at least, above it, equally spaced in log sigma:
    nothing but the mean of the data is decided there. The others are those of "karras", down to `low`.
    """
    first = start.double()
    top = max(1, num_steps // 6) if num_steps > 1 else 0
    u = torch.arange(top, dtype=first.dtype, device=first.device)[:, None] / max(top, 1)
    above = first * (middle / first) ** u
    split = torch.cat([above, _karras(first.clamp_max(middle), low, num_steps - top)])
    whole = _karras(first, low, num_steps)
    levels = torch.where(first > middle, split, whole)
    return torch.cat([levels, torch.zeros_like(levels[:1])]).to(start.dtype)


def _karras(first: Tensor, low: float, count: int, rho: float = 7.0) -> Tensor:
    """Levels (count, B) from `first` (B,) to `low`, or all the same where that is above."""
    u = torch.linspace(0, 1, count, dtype=first.dtype, device=first.device)[:, None]
    high, last = first ** (1 / rho), first.clamp_max(low) ** (1 / rho)
    return (high + u * (last - high)) ** rho
