"""Traces of JPEG in pixels: where its blocks begin, and the steps that their spectra were rounded to."""

from __future__ import annotations

import numpy as np

from invguide.images.noise_blocks import INDEX, LUMA, SIDE, spectra

BLOCKS = 160  # for each of the 64 places that a grid can begin at
LARGEST = 100  # step looked for; in values 0 to 255
LEAST = 0.5  # mean cosine: exp(-2 pi^2 s^2 / q^2) of values that decoding rounds by s = 0.25 is 0.73 for a step of 2
FEW = 12  # values that tell a step
ENOUGH = 1500  # blocks that tell the steps
TOLD = (
    (INDEX > 0) & (INDEX <= 6) & (INDEX % 2 == 0)
)  # of fine and of coarse files some of these are rounded


def step_of(values: np.ndarray, largest: int = LARGEST) -> int:
    """Return the whole number >= 2 that these values are multiples of, as nearly as decoding leaves them; 0: none.

    For each step the mean cosine of 2 pi value / step over the values beyond half a step: 1 where all are multiples,
    about 0 or less otherwise; of a step and its divisors, the step's, which decoding blurs least. A small number of
    values is asked for more.
    """
    steps = np.arange(2, max(2, min(largest, int(np.abs(values).max(initial=0)) + 1)) + 1)[:, None]
    beyond = np.abs(values) >= steps / 2
    count = beyond.sum(1)
    cosine = (np.cos(2 * np.pi / steps * values) * beyond).sum(1) / np.maximum(count, 1)
    least = np.minimum(0.9, LEAST + 1.5 / np.maximum(count, 1) ** 0.5)
    cosine[(count < FEW) | (cosine <= least)] = 0
    best = int(cosine.argmax())
    return int(steps[best, 0]) if cosine[best] > 0 else 0


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
            chosen = [coefficients[:, i, j] for i, j in np.argwhere(TOLD)]
            count = sum(step_of(values, LARGEST // 2) > 0 for values in chosen)
            if count > best:
                best, found = count, (row, column)
    return found if best >= 4 else None


def find_steps(coefficients: np.ndarray) -> np.ndarray:
    """Return the step of each coefficient, (8, 8), 0 to 255; 1 where none is seen, inf where all of them vanish.

    Args:
        coefficients: Spectra (N, 8, 8) of luma in blocks on the grid, values 0 to 255.
    """
    steps = np.ones((SIDE, SIDE))
    coefficients = coefficients[:: max(1, len(coefficients) // ENOUGH)]
    for i, j in np.ndindex(SIDE, SIDE):
        values = coefficients[:, i, j]
        large = values[np.abs(values) > 1]
        steps[i, j] = max(1, step_of(large)) if len(large) >= FEW else np.inf
    return steps


def rounded(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the values at the nearest multiples of these steps; 0 where a step is infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(steps), np.rint(values / steps) * steps, 0.0)
