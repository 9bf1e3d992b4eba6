"""Blocks of a picture for the estimate of its noise: which, their spectra, and what clipping leaves of noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDE = 8  # pixels; JPEG's, so that its blocks can be taken as they are
MOST = 12000  # blocks of one picture: the error of the estimate is below one per cent well before
INDEX = np.add.outer(np.arange(SIDE), np.arange(SIDE))  # of a spectrum: how fine a coefficient is
LUMA = np.array([0.299, 0.587, 0.114])
# Of red, green and blue with independent noise of one level, the level of each row is the same: rows have length 1.
COLOURS = np.array([LUMA, [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
COLOURS = COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)
GAIN = float(np.linalg.norm(LUMA))  # noise of luma in noise of a colour


def cosines() -> np.ndarray:
    """Rows of the orthonormal discrete cosine transform of 8 values, (8, 8)."""
    rows = np.cos(np.pi * np.outer(np.arange(SIDE), np.arange(SIDE) + 0.5) / SIDE) / 2
    rows[0] /= 2**0.5
    return rows


@dataclass(frozen=True)
class Blocks:
    """Blocks of 8 x 8 pixels, none of them constant in a channel.

    Attributes:
        values: (N, C, 8, 8), data units.
        known: (N, 8, 8) bool; None: all.
        where: Upper left corners, (N, 2): row, column.
        ends: Values beyond which the picture was cut off, (low, high); -inf, inf where it was not.
        places: Blocks with enough known pixels, the constant ones too.
    """

    values: np.ndarray
    known: np.ndarray | None
    where: np.ndarray
    ends: tuple[float, float]
    places: int

    def __len__(self) -> int:
        return len(self.values)

    def means(self) -> np.ndarray:
        """Of the known pixels, (N, C)."""
        if self.known is None:
            return self.values.mean((2, 3))
        share = self.known.sum((1, 2))[:, None]
        return np.einsum("ncij,nij->nc", self.values, self.known) / share

    def take(self, chosen: np.ndarray) -> Blocks:
        known = None if self.known is None else self.known[chosen]
        return Blocks(self.values[chosen], known, self.where[chosen], self.ends, self.places)

    def area(self) -> int:
        """Pixels that the blocks cover together; those that overlap are counted as far as their corners are apart."""
        corners = np.unique(self.where // SIDE, axis=0)
        share = 1.0 if self.known is None else float(self.known.mean())
        return int(len(corners) * SIDE * SIDE * share)


def cut(
    y: np.ndarray,
    mask: np.ndarray | None = None,
    grid: tuple[int, int] | None = None,
    least_known: int = SIDE * SIDE,
) -> Blocks:
    """Take blocks at regular places, at most about 12000.

    Args:
        y: (C, H, W).
        mask: Where y is known, (H, W) bool.
        grid: Row and column where blocks of JPEG begin; blocks lie on that grid alone.
        least_known: Pixels that a block needs.
    """
    height, width = y.shape[1:]
    row, column = grid or (0, 0)
    rows, columns = max(0, height - SIDE - row + 1), max(0, width - SIDE - column + 1)
    step = max(1, int(np.ceil((rows * columns / MOST) ** 0.5)))
    if grid is not None:
        step = SIDE * int(np.ceil(step / SIDE))
    elif step % SIDE == 0:
        step += 1  # never the same phase of a JPEG's blocks only
    corners = np.stack(
        np.meshgrid(
            np.arange(0, rows, step) + row, np.arange(0, columns, step) + column, indexing="ij"
        ),
        -1,
    ).reshape(-1, 2)
    known = None
    if mask is not None and len(corners):
        windows = np.lib.stride_tricks.sliding_window_view(mask, (SIDE, SIDE))
        known = windows[corners[:, 0], corners[:, 1]]
        enough = known.sum((1, 2)) >= least_known
        corners, known = corners[enough], known[enough]
        known = None if known.all() else known
    if not len(corners):
        values = np.zeros((0, len(y), SIDE, SIDE))
        return Blocks(values, known, corners, (-np.inf, np.inf), 0)
    windows = np.lib.stride_tricks.sliding_window_view(y, (SIDE, SIDE), axis=(1, 2))
    values = windows[:, corners[:, 0], corners[:, 1]].swapaxes(0, 1).astype(np.float64)
    return Blocks(values, known, corners, _ends(y, mask), len(corners)).take(
        _varied(values, known, grid is None)
    )


def _varied(values: np.ndarray, known: np.ndarray | None, lines: bool) -> np.ndarray:
    """Which blocks (N,) have no constant channel; with `lines`, and no row or column that is constant in all of them.

    A line of eight equal pixels is the edge of a bar. After JPEG it is not: few coefficients are left.
    """
    if known is None and not lines:
        return (np.ptp(values, (2, 3)) > 0).all(1)
    if known is None:
        along_rows = (np.ptp(values, 3) == 0).all(1).any(1)
        along_columns = (np.ptp(values, 2) == 0).all(1).any(1)
        return (np.ptp(values, (2, 3)) > 0).all(1) & ~along_rows & ~along_columns
    high = np.where(known[:, None], values, -np.inf).max((2, 3))
    low = np.where(known[:, None], values, np.inf).min((2, 3))
    return (high > low).all(1)


def _ends(y: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """The extreme values, where so many pixels have exactly these that the picture was cut off there."""
    step = max(1, int((y[0].size / 1e6) ** 0.5))
    part = y[:, ::step, ::step]
    part = part if mask is None else part[:, mask[::step, ::step]]
    low, high = float(part.min()), float(part.max())
    pile = max(16, 2e-4 * part.size)
    return (
        low if np.count_nonzero(part == low) >= pile else -np.inf,
        high if np.count_nonzero(part == high) >= pile else np.inf,
    )


def spectra(values: np.ndarray) -> np.ndarray:
    """Orthonormal cosine transforms of (..., 8, 8)."""
    rows = cosines()
    return rows @ values @ rows.T


def clipped_variance(means: np.ndarray, sigma: float, ends: tuple[float, float]) -> np.ndarray:
    """Variance of noise of level sigma after clipping, where the clipped values have these means.

    With Z normal, the moments of a + Z clipped to [low, high] follow from those of the rectified normal
    E max(a + Z, 0) = a Phi(a / sigma) + sigma phi(a / sigma); the mean is increasing in a and is inverted by a table.
    """
    if not any(np.isfinite(ends)):
        return np.full(means.shape, sigma**2)
    from scipy.special import ndtr

    low, high = ends
    reach = 6 * sigma
    start = low if np.isfinite(low) else min(float(means.min()), high) - reach
    stop = high if np.isfinite(high) else max(float(means.max()), low) + reach
    a = np.linspace(start - reach, stop + reach, 4000)

    def above(end: float) -> tuple[np.ndarray, np.ndarray]:
        """First and second moment of max(a + Z - end, 0)."""
        t = (a - end) / sigma
        density, share = np.exp(-t * t / 2) / (2 * np.pi) ** 0.5, ndtr(t)
        return sigma * (t * share + density), sigma**2 * ((t * t + 1) * share + t * density)

    first, second = above(low) if np.isfinite(low) else (a - start, (a - start) ** 2 + sigma**2)
    origin = low if np.isfinite(low) else start
    if np.isfinite(high):
        over, square = above(high)
        # (u - o)+ cut at the high end: u+ - o, its square u+^2 - o^2 - 2 o (high - origin).
        first, second = first - over, second - square - 2 * over * (high - origin)
    mean, variance = first + origin, np.maximum(second - first**2, 0)
    return np.interp(means, mean, variance)
