"""Whether a noise level can be true, as the prior sees it: at the likeliest level what it removes is what noise is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invguide.prior import Prior, denoise_at

SIZE = 128  # pixels per side of the part that is looked at
TOO_MUCH = 0.25  # by which the balance of an estimate may be short: a level 1.3 times the true one, or more
ENOUGH = 0.05  # by which that of the level taken may be: the prior's own error at 1.1 times the true one
TEXTURE = 3.0  # times the likely level: an estimate beyond is of texture
BLIND = 1.4  # times the prior's least level: what is below, it cannot tell from texture
LEAST = 0.001  # data units; rounding to 8 bits alone is this much


def balance(prior: Prior, y: Tensor, sigma: float, **condition: Tensor) -> float:
    """Return |y - D|^2 / (n s^2) + div D / n - 1: 0 at the level of largest likelihood under the prior, below 0 above.

    The noisy density p_s obeys the heat equation dp/ds = s Laplace p, and D = y + s^2 grad log p (Tweedie), so this is
    s / n times d log p_s(y) / ds. The divergence is that of one random direction (Hutchinson).

    Args:
        prior: Of pictures in pixels.
        y: A noisy picture in data units, (1, C, H, W); clipped pixels, 0 and 1, do not count.
        sigma: Noise level, data units.
        condition: Of the prior, one row.
    """
    where = prior.device or y.device
    x = prior.to_normalised(y).to(where)
    inside = ((y > 0) & (y < 1)).to(x)
    level = torch.tensor([sigma / prior.scale], dtype=x.dtype, device=where)
    source = torch.Generator().manual_seed(0)
    probe = inside * torch.randn(x.shape, generator=source, dtype=x.dtype).to(where)
    step = 0.1 * float(level)
    with torch.no_grad():
        denoised = denoise_at(prior.denoise, x, level, prior.sigma_min, **condition)
        moved = denoise_at(prior.denoise, x + step * probe, level, prior.sigma_min, **condition)
    removed = (inside * (x - denoised)).square().sum() / inside.sum() / level**2
    divergence = (probe * (moved - denoised)).sum() / step / probe.square().sum()
    return float(removed + divergence - 1)


def likely_level(prior: Prior, y: Tensor, sigma: float, **condition: Tensor) -> float:
    """Return sigma, or the lower level that the prior finds likely where sigma would take texture for noise.

    LEAST, with which a picture is hardly changed, where that is about the prior's least level or below: there may be
    less noise yet, and to leave some costs less than to take texture away. An estimate less than TEXTURE times too high
    stays. To be asked only where something else speaks for texture too: noise whose neighbours resemble each other is
    no more likely under the prior than texture is. Looks at the middle of the picture: 2 network calls, and 2 more for
    each level that is tried.

    Args:
        prior, y, condition: As for `balance`.
        sigma: An estimate, data units.
    """
    if all(size is None for size in prior.shape[1:]):
        for axis in (-2, -1):
            size = min(SIZE, y.shape[axis])
            y = y.narrow(axis, (y.shape[axis] - size) // 2, size)
    high, found = sigma, balance(prior, y, sigma, **condition)
    if not found < -TOO_MUCH or sigma <= LEAST:
        return sigma
    while True:
        low = max(high / math.sqrt(2), LEAST)
        lower = balance(prior, y, low, **condition)
        if not lower < -ENOUGH:
            share = (lower + ENOUGH) / (lower - found) if lower > found else 0.0
            likely = low * (high / low) ** share
            if likely > sigma / TEXTURE:
                return sigma
            return likely if likely > BLIND * prior.sigma_min * prior.scale else LEAST
        if low == LEAST:
            return LEAST
        high, found = low, lower
