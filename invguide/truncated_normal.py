"""Normal variables that are known to lie between two levels: how likely that was, and their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT2 = math.sqrt(2)


def log_mass_and_mean(mean: Tensor, std: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return log P(low <= c <= high) and E[c | low <= c <= high] of c ~ N(mean, std^2), in float64.

    Nothing underflows, however far the interval lies from the mean. One end may be infinite; mean and std broadcast.
    """
    mean, std = mean.double(), std.double()
    a, b = (low - mean) / std, (high - mean) / std
    turned = a + b < 0  # mirrored, so that a is the end near the mean: |a| <= |b|
    a, b = torch.where(turned, -b, a), torch.where(turned, -a, b)
    # Near: differences of erfc. Far: everything divided by exp(-a^2 / 2).
    near, far = a.clamp_max(0), a.clamp_min(0)
    inside = (torch.erfc(near / SQRT2) - torch.erfc(b / SQRT2)).clamp_min(1e-300)
    inside_shift = (torch.exp(-near.square() / 2) - torch.exp(-b.square() / 2)) / inside
    width = (b - far) * (b + far) / 2
    scaled = (
        torch.special.erfcx(far / SQRT2) - torch.exp(-width) * torch.special.erfcx(b / SQRT2)
    ).clamp_min(1e-300)
    log_mass = torch.where(a > 0, torch.log(scaled / 2) - far.square() / 2, torch.log(inside / 2))
    shift = torch.where(a > 0, -torch.expm1(-width) / scaled, inside_shift)
    shift = math.sqrt(2 / math.pi) * torch.where(turned, -shift, shift)
    return log_mass, (mean + std * shift).clamp(low, high)
