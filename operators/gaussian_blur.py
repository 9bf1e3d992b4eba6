"""Blur by a Gaussian, as of a lens out of focus."""

from __future__ import annotations

import math

from ._images import Width
from ._separable import Filter, Padding, SeparableOperator


class GaussianBlur(SeparableOperator):
    """Convolution with a Gaussian, cut off at four standard deviations and normalised.

    Args:
        sigma: Standard deviation of the Gaussian, pixels, above 0.
        padding: How the image goes on beyond its edges. "reflect" (the edge pixel repeated, as in `scipy.ndimage`) and
            "circular" keep the size; "valid" keeps only what needs no guess. Default "reflect"; "circular" for periodic
            signals, "valid" where y is smaller than x.

    Raises:
        InputError: sigma is not a positive number; unknown padding.
        ShapeError: Not images (B, C, H, W), or with "valid" smaller than the kernel.

    Example:
        >>> import torch
        >>> GaussianBlur(sigma=1.5)(torch.ones(1, 3, 8, 10)).shape
        torch.Size([1, 3, 8, 10])
    """

    def __init__(self, sigma: Width, padding: Padding = "reflect") -> None:
        self.sigma, self.padding = sigma, padding
        radius = max(1, int(4 * self.sigma + 0.5))
        weights = [math.exp(-0.5 * (i / self.sigma) ** 2) for i in range(-radius, radius + 1)]
        super().__init__(Filter.normalised(weights, padding=padding))

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, padding={self.padding!r}"
