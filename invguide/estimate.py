"""The noise level of a measurement that is a picture, from the picture alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError

PATCH = 6  # on photographs of 32 to 512 pixels better than 4, 5 and 8
MIN_BLOCKS = 200


def estimate_sigma(y: Tensor, mask: Tensor | None = None, bits: int = 8) -> float:
    """Return the standard deviation of white Gaussian noise in one picture y (1, C, H, W), data units.

    The smaller of two estimates that both take texture for noise: deepinv's patch covariance (Chen, Zhu, Heng 2015),
    within a few per cent on colour photographs, blurred ones too; and the median absolute deviation of diagonal Haar
    coefficients (Donoho, Johnstone 1994), better on grey ones, and the only one where pixels are missing or few.
    Clipping to [0, 1] makes heavy noise smaller, and the estimate with it. Never less than the rounding to `bits`.

    Args:
        y: The measurement, not the restored picture.
        mask: 1 where y is known, (C or 1, H, W).
        bits: Of the file that y came from.

    Raises:
        InputError: Fewer than 200 blocks of 2 x 2 known pixels.
    """
    rounding = 1 / (2**bits - 1) / 12**0.5 if bits < 32 else 1e-6
    patches = None if mask is not None else _patches(y)
    haar = _haar(y, mask)
    return max(haar if patches is None else min(haar, patches), rounding)


def _patches(y: Tensor) -> float | None:
    """The estimate from patch covariance; None where there are too few patches or it finds no balance."""
    height, width = y.shape[-2:]
    stride = max(1, round((height * width) ** 0.5 / 512))  # a large picture has patches to spare
    count = ((height - PATCH) // stride + 1) * ((width - PATCH) // stride + 1)
    if min(height, width) < PATCH or count < 4 * y.shape[1] * PATCH**2:
        return None
    from deepinv.models import PatchCovarianceNoiseEstimator

    try:
        found = PatchCovarianceNoiseEstimator.estimate_noise(y.float(), PATCH, stride)
    except RuntimeError:  # "Noise level estimation failed."
        return None
    return float(found)


def _haar(y: Tensor, mask: Tensor | None) -> float:
    def corners(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return x[..., :-1, :-1], x[..., :-1, 1:], x[..., 1:, :-1], x[..., 1:, 1:]

    values = y[0].cpu().double().numpy()
    a, b, c, d = corners(values)
    diagonal = np.abs(a - b - c + d) / 2
    if mask is not None:
        known = torch.broadcast_to(mask.cpu() != 0, values.shape).numpy()
        diagonal = diagonal[np.logical_and.reduce(corners(known))]
    if diagonal.size < MIN_BLOCKS:
        raise InputError(
            f"the noise cannot be estimated: {diagonal.size} blocks of 2 x 2 known pixels, {MIN_BLOCKS} are needed; "
            f"pass --sigma-y NUMBER"
        )
    return float(np.median(diagonal)) / 0.6745
