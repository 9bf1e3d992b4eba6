"""SoftPalette: how near the pixels of a picture are to a few given colours, with a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invguide.arguments.rules import Colours, Positive
from invguide.reward import Reward
from invguide.rewards._images import check_images
from invguide.rewards.palette import Palette


@dataclass(frozen=True)
class SoftPalette(Reward):
    """-mean over pixels of softmin_k d_k = -T log mean_k exp(-d_k / T), d_k the Euclidean distance to colour k.

    Between `Palette`, where T goes to 0, and the mean distance to all colours: softmin lies between the smallest d_k
    and that plus T log K.

    Args:
        colours: K colours of C channels each, values in [0, 1]: nested sequences, an array or a tensor (K, C).
        temperature: T, data units, above 0; colours that are nearer to each other than this are not told apart. Default
            0.05; lower for close colours.

    Raises:
        InputError: Colours that are not a finite (K, C), or a temperature that cannot be.
        ShapeError: Samples that are not images (C, H, W) with as many channels as a colour.
    """

    colours: Colours
    temperature: Positive = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "colours", Palette(self.colours).colours)

    def __call__(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=len(self.colours[0]))
        colours = x.new_tensor(self.colours)[:, :, None]  # (K, C, 1)
        # vector_norm has slope zero at zero, where a pixel is a colour.
        distances = torch.linalg.vector_norm(x.flatten(2)[:, None] - colours, dim=2)  # (N, K, HW)
        closeness = torch.logsumexp(-distances / self.temperature, 1) - math.log(len(colours))
        return self.temperature * closeness.mean(1)
