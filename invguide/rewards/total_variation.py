"""TotalVariation: how smooth a picture is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invguide.reward import Reward
from invguide.rewards._images import check_images


@dataclass(frozen=True)
class TotalVariation(Reward):
    """-(mean |x(i+1, j) - x(i, j)| + mean |x(i, j+1) - x(i, j)|) over pixels and channels, data units.

    Anisotropic (Rudin et al. 1992), by kornia, and of the same size in pictures of any resolution. More texture is
    `-1 * TotalVariation()`.

    Raises:
        ShapeError: Samples that are not images (C, H, W) of at least 2 x 2 pixels.

    Example:
        >>> import torch
        >>> TotalVariation()(torch.ones(1, 3, 4, 4)) == 0
        tensor([True])
    """

    def __call__(self, x: Tensor) -> Tensor:
        from kornia.losses import total_variation

        check_images(self, x, minimum=2)
        return -total_variation(x, reduction="mean").mean(1)
