"""Known pixels stay: what was measured is put back into restored pictures, and the rest is fitted to it at the seam."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.numerics.harmonic import harmonic_extension


def stay_by_default(sigma_y: float | None, bits: int) -> bool:
    """Return whether known pixels are returned as they are unless the user says otherwise.

    They are where nobody said that they are noisy.

    Args:
        sigma_y: Noise standard deviation that the user gave, white = 1; None where none was given.
        bits: Of the file. Half a grey level of it is no noise that a file can show.
    """
    return sigma_y is None or sigma_y <= (0.5 / (2**bits - 1) if bits < 32 else 0.0)


def put_back(samples: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """Return the samples with their known pixels replaced by the measured ones, and no edge at the seam.

    Unknown pixels are shifted by the harmonic extension of the mismatch `values - samples` at the known ones, so that
    differences of neighbours inside a hole stay as near to the sample's as its rim allows: Poisson image editing
    (Perez, Gangnet, Blake 2003, equations 2 and 4) with the restored picture as the source.

    Args:
        samples: Restored pictures (..., C, H, W), finite.
        values: As measured, (1, C, H, W), same units.
        known: (1, H, W) or (H, W), nonzero where values are known.

    Returns:
        The shape and type of samples; where known, exactly `values`.
    """
    measured = values.to(samples)[0]
    flat = samples.reshape(-1, *samples.shape[-3:])
    shifted = flat + harmonic_extension(measured - flat, known)
    return torch.where(known != 0, measured, shifted).reshape(samples.shape)
