"""Colourfulness: how vivid a picture looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invguide.arguments.rules import NonNegative
from invguide.reward import Reward
from invguide.rewards._images import check_images


@dataclass(frozen=True)
class Colourfulness(Reward):
    """M, or -|M - target|: M = sigma + 0.3 mu (Hasler and Suesstrunk 2003, the measure that they call M^(3)).

    sigma and mu are the lengths of the standard deviations and of the means, over pixels, of the two opponent colours
    R - G and (R + G) / 2 - B. On [0, 255] the authors call 33 moderately and 109 extremely colourful: in data units,
    0.13 and 0.43. A grey picture has M = 0 and no slope.

    Args:
        target: M to aim at, data units, 0 or more. Default None: as colourful as can be; 0.13 is moderate.

    Raises:
        InputError: A target that cannot be.
        ShapeError: Samples that are not colour images (3, H, W).
    """

    target: NonNegative | None = None

    def __call__(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=3)
        red, green, blue = x.flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)  # (N, 2, HW)
        mean = opponents.mean(2, keepdim=True)
        # Lengths by vector_norm, whose slope at zero is zero; a square root would give NaN for grey pictures.
        sigma = torch.linalg.vector_norm(opponents - mean, dim=(1, 2)) / opponents.shape[2] ** 0.5
        measure = sigma + 0.3 * torch.linalg.vector_norm(mean, dim=(1, 2))
        return measure if self.target is None else -(measure - self.target).abs()
