"""Traces of JPEG in pixels: where its blocks begin, and the steps that their spectra were rounded to."""

from __future__ import annotations

import numpy as np

from invguide.noise_blocks import INDEX, LUMA, SIDE, spectra

BLOCKS = 160  # for each of the 64 places that a grid can begin at
LARGEST = 100  # step looked for; in values 0 to 255
LEAST = 0.5  # mean cosine: exp(-2 pi^2 s^2 / q^2) of values that decoding rounds by s = 0.25 is 0.73 for a step of 2
FEW = 12  # values that tell a step


def comb(values: np.ndarray, step: int) -> float:
    """Return the mean cosine of values beyond half a step: 1 where all are multiples of it, about 0 or less otherwise."""
    beyond = values[np.abs(values) >= step / 2]
    if len(beyond) < FEW:
        return 0.0
    return float(np.cos(2 * np.pi / step * beyond).mean())


def step_of(values: np.ndarray) -> int:
    """Return the largest whole number >= 2 that these values are multiples of; 0 where there is none."""
    largest = int(min(LARGEST, np.abs(values).max() + 1)) if len(values) else 0
    for step in range(largest, 1, -1):
        least = LEAST + 1.5 / max(1, np.count_nonzero(np.abs(values) >= step / 2)) ** 0.5
        if comb(values, step) > min(least, 0.9):
            return step
    return 0


def luma(y: np.ndarray) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W), values 0 to 255."""
    return 255 * (np.tensordot(LUMA, y, (0, -3)) if y.shape[-3] == 3 else y[..., 0, :, :])


def find_grid(y: np.ndarray) -> tuple[int, int] | None:
    """Return the row and column, 0 to 7, where the blocks of a JPEG file begin; None where there are no traces.

    Args:
        y: (C, H, W) as decoded, 8 bits, white = 1.
    """
    height, width = y.shape[1:]
    rows, columns = height // SIDE - 1, width // SIDE - 1
    if rows * columns < 2 * FEW:
        return None
    random = np.random.default_rng(0)
    places = random.permutation(rows * columns)[: 8 * BLOCKS]
    corners = np.stack([places // columns, places % columns], -1) * SIDE
    windows = np.lib.stride_tricks.sliding_window_view(y, (2 * SIDE, 2 * SIDE), axis=(1, 2))
    pieces = windows[:, corners[:, 0], corners[:, 1]]  # (C, N, 16, 16): each holds every phase
    inside = ((pieces > 0) & (pieces < 1)).all((0, 2, 3)) & (np.ptp(pieces, (2, 3)) > 0).all(0)
    pieces = luma(pieces[:, inside][:, :BLOCKS].swapaxes(0, 1))
    if len(pieces) < FEW:
        return None
    best, found = 0, None
    for row in range(SIDE):
        for column in range(SIDE):
            coefficients = spectra(pieces[:, row : row + SIDE, column : column + SIDE])
            chosen = [coefficients[:, i, j] for i, j in np.argwhere((INDEX >= 1) & (INDEX <= 4))]
            count = sum(step_of(values) > 0 for values in chosen)
            if count > best:
                best, found = count, (row, column)
    return found if best >= 5 else None


def find_steps(coefficients: np.ndarray) -> np.ndarray:
    """Return the step of each coefficient, (8, 8), 0 to 255; 1 where none is seen, inf where all of them vanish.

    Args:
        coefficients: Spectra (N, 8, 8) of luma in blocks on the grid, values 0 to 255.
    """
    steps = np.ones((SIDE, SIDE))
    for i, j in np.ndindex(SIDE, SIDE):
        values = coefficients[:, i, j]
        large = values[np.abs(values) > 1]
        steps[i, j] = max(1, step_of(large)) if len(large) >= FEW else np.inf
    return steps


def rounded_power(variance: np.ndarray, step: float) -> np.ndarray:
    """E Q(c)^2 of c ~ N(0, variance) rounded to multiples of the step: 2 q^2 sum (2 n - 1) P(c > (n - 1/2) q)."""
    from scipy.special import ndtr

    scale = np.sqrt(np.maximum(variance, 1e-30))
    if step < scale.min() / 2:
        return variance + step**2 / 12
    n = np.arange(1, 2 + int(6 * scale.max() / step))
    tails = ndtr(-(n - 0.5) * step / scale[..., None])
    return 2 * step**2 * (tails * (2 * n - 1)).sum(-1)


def rounding_error(variance: float, step: float) -> float:
    """E (Q(c) - c)^2 of c ~ N(0, variance); 2 E c Q(c) follows from E c 1(c > t) = s phi(t / s)."""
    scale = variance**0.5
    if step < scale / 2:
        return step**2 / 12
    n = np.arange(1, 2 + int(6 * scale / step))
    edges = (n - 0.5) * step / scale
    cross = 2 * step * scale * float((np.exp(-edges * edges / 2) / (2 * np.pi) ** 0.5).sum())
    return variance + float(rounded_power(np.array(variance), step)) - 2 * cross
