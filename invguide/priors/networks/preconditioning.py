"""EDM preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1), shared by the adapters and the trainer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EDMCoefficients(NamedTuple):
    """D(x; sigma) = skip * x + out * F(input * x, noise)."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def edm_coefficients(sigma: Tensor, sigma_data: float) -> EDMCoefficients:
    """Return the four coefficients, each shaped like sigma; sigma_data is the standard deviation of the data."""
    total = sigma**2 + sigma_data**2
    return EDMCoefficients(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * total.rsqrt(),
        input=total.rsqrt(),
        noise=sigma.log() / 4,
    )
