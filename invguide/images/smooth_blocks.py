"""The level of noise in the smooth blocks of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from invguide.images.noise_blocks import COLOURS, INDEX, Blocks, clipped_variance, cosines, spectra

COARSE = (INDEX >= 1) & (INDEX <= 3)  # tells texture
MIDDLE = (INDEX >= 5) & (INDEX <= 6)
FINE = INDEX >= 8  # is noise, where there is no texture
SMOOTH = 0.1  # of the blocks, those with the least coarse power
LEAST_SMOOTH = 60
QUANTILE = 0.25  # of the power of smooth blocks; others among them have texture yet
FLOOR = 0.1  # the same, of middle frequencies, where there is more of it


def bisect(excess: Callable[[float], float], low: float = 1e-6, high: float = 2.0) -> float:
    """Return the root of a decreasing function of a level, to 1e-4 of it; an end where it lies beyond."""
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low * high) ** 0.5


def solve_level(
    power: np.ndarray,
    freedom: np.ndarray | int,
    variance: Callable[[float], np.ndarray],
    quantile: float,
) -> float:
    """Return the level at which this quantile of the power of blocks is that of a chi-squared law.

    Args:
        power: Sum of the squares of coefficients in each block, (N,).
        freedom: Their number, () or (N,).
        variance: Of noise of a level in each block, (N,).
    """
    from scipy.stats import chi2

    numbers, place = np.unique(np.broadcast_to(freedom, power.shape), return_inverse=True)
    scaled = power / chi2.ppf(quantile, numbers)[place]

    def excess(sigma: float) -> float:
        return float(np.quantile(scaled / np.maximum(variance(sigma), 1e-30), quantile)) - 1

    return bisect(excess)


@dataclass(frozen=True)
class Component:
    """Luma or chroma of blocks: spectra (N, K, 8, 8), K of them a block, in units in which noise is that of a channel.

    Attributes:
        weights: Of the variance of each channel in these, (C,).
        means: Of the channels in each block, (N, C).
    """

    spectra: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    ends: tuple[float, float]

    def take(self, chosen: np.ndarray) -> Component:
        return Component(self.spectra[chosen], self.weights, self.means[chosen], self.ends)

    def power(self, band: np.ndarray) -> np.ndarray:
        return np.square(self.spectra[..., band]).sum((1, 2))

    def variance(self, sigma: float) -> np.ndarray:
        """Of noise of this level, after clipping, in each block: (N,)."""
        return clipped_variance(self.means, sigma, self.ends) @ self.weights

    def smooth(self, share: float = SMOOTH) -> Component:
        coarse = self.power(COARSE)
        count = min(len(coarse), max(LEAST_SMOOTH, round(share * len(coarse))))
        return self.take(np.argpartition(coarse, count - 1)[:count])

    def unclipped(self, sigma: float) -> Component:
        """Blocks that keep half of their noise; all, where there are few of them."""
        chosen = self.variance(sigma) > sigma**2 / 2
        return self.take(chosen) if chosen.sum() >= 2 * LEAST_SMOOTH else self

    def level(self, band: np.ndarray = FINE, quantile: float = QUANTILE) -> float:
        """Of the noise in a band of the smooth blocks."""
        part, sigma = self.smooth(), 0.0
        for again in (False, True):
            if again:
                part = self.unclipped(sigma).smooth()
            freedom = int(band.sum()) * self.spectra.shape[1]
            sigma = solve_level(part.power(band), freedom, part.variance, quantile)
        return sigma

    def whiteness(self, fine: float) -> float:
        return min(1.0, fine / max(self.level(MIDDLE, FLOOR), 1e-9))


def components(blocks: Blocks) -> list[Component]:
    """Luma, and chroma where there are three channels."""
    means = blocks.means()
    if blocks.values.shape[1] == 1:
        return [Component(spectra(blocks.values), np.ones(1), means, blocks.ends)]
    turned = spectra(np.einsum("kc,ncij->nkij", COLOURS, blocks.values))
    return [
        Component(turned[:, rows], np.square(COLOURS[rows]).mean(0), means, blocks.ends)
        for rows in (slice(0, 1), slice(1, 3))
    ]


# ---- blocks with unknown pixels


def level_with_holes(blocks: Blocks) -> float:
    """From what is left of the known pixels when a coarse surface is fitted to them; all channels alike."""
    power, freedom, coarse = _residuals(blocks)
    count = min(len(coarse), max(LEAST_SMOOTH, round(SMOOTH * len(coarse))))
    smooth = np.argpartition(coarse, count - 1)[:count]
    means = blocks.means()[smooth]

    def variance(sigma: float) -> np.ndarray:
        return clipped_variance(means, sigma, blocks.ends).mean(1)

    return solve_level(power[smooth], freedom[smooth], variance, QUANTILE)


def _residuals(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Power of the residual, its degrees of freedom, and power of the surface without its mean, each (N,).

    The surface is the least-squares fit of the six coarsest cosines; of white noise, fit and residual are independent.
    """
    assert blocks.known is not None
    rows = cosines()
    basis = np.stack([np.outer(rows[i], rows[j]).ravel() for i, j in np.argwhere(INDEX <= 2)])
    known = blocks.known.reshape(len(blocks), 1, -1)
    matrix = np.where(known, basis, 0)  # (N, 6, 64)
    values = np.where(known, blocks.values.reshape(*blocks.values.shape[:2], -1), 0)
    gram = matrix @ matrix.swapaxes(1, 2) + 1e-9 * np.eye(len(basis))
    fit = np.linalg.solve(gram, matrix @ values.swapaxes(1, 2))  # (N, 6, C)
    left = values - fit.swapaxes(1, 2) @ matrix
    channels = values.shape[1]
    freedom = channels * (known.sum((1, 2)) - len(basis))
    return np.square(left).sum((1, 2)), freedom, np.square(fit[:, 1:]).sum((1, 2))
