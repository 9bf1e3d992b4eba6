"""Normal variables that are known to lie between two levels: how likely that was, and their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT2 = math.sqrt(2)
TINY = 1e-300


def log_mass_and_mean(mean: Tensor, std: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return log P(low <= c <= high) and E[c | low <= c <= high] of c ~ N(mean, std^2), in float64.

    Nothing underflows, however far the interval lies from the mean. One end may be infinite; mean and std broadcast.
    """
    mean, std = mean.double(), std.double()
    a, b = (low - mean) / std, (high - mean) / std
    turned = a + b < 0  # mirrored, so that a is the end near the mean: |a| <= |b|
    a, b = torch.where(turned, -b, a), torch.where(turned, -a, b)
    shift = standard_mean(a, b)
    return log_mass(a, b), (mean + std * torch.where(turned, -shift, shift)).clamp(low, high)


def log_mass(a: Tensor, b: Tensor) -> Tensor:
    """log [Phi(b) - Phi(a)] of float64 ends |a| <= b, without underflow."""
    inside, far = _inside(a, b), a.clamp_min(0)
    beyond = torch.log(_beyond(far, b) / 2) - far.square() / 2
    return torch.where(a > 0, beyond, torch.log(inside / 2))


def standard_mean(a: Tensor, b: Tensor) -> Tensor:
    """E[n | a <= n <= b] of a standard normal n, (phi(a) - phi(b)) / (Phi(b) - Phi(a)); float64 ends, |a| <= b."""
    near, far = a.clamp_max(0), a.clamp_min(0)
    inside = (torch.exp(-near.square() / 2) - torch.exp(-b.square() / 2)) / _inside(a, b)
    beyond = -torch.expm1(-(b - far) * (b + far) / 2) / _beyond(far, b)
    return math.sqrt(2 / math.pi) * torch.where(a > 0, beyond, inside)


def _inside(a: Tensor, b: Tensor) -> Tensor:
    """2 [Phi(b) - Phi(a)] where a <= 0; a finite number elsewhere."""
    return (torch.erfc(a.clamp_max(0) / SQRT2) - torch.erfc(b / SQRT2)).clamp_min(TINY)


def _beyond(a: Tensor, b: Tensor) -> Tensor:
    """2 [Phi(b) - Phi(a)] exp(a^2 / 2) for 0 <= a <= b."""
    erfcx = torch.special.erfcx
    scaled = erfcx(a / SQRT2) - torch.exp(-(b - a) * (b + a) / 2) * erfcx(b / SQRT2)
    return scaled.clamp_min(TINY)
