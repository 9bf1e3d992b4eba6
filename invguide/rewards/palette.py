"""Palette: how near the pixels of a picture are to a few given colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invguide.arguments.rules import Colours, Count
from invguide.errors import InputError, ShapeError
from invguide.rewards.per_sample import PerSample, check_image


@dataclass(frozen=True)
class Palette(PerSample):
    """-mean over pixels of the Euclidean distance to the k nearest colours, themselves averaged.

    Args:
        colours: K colours of C channels each, values in [0, 1]: nested sequences, an array or a tensor (K, C).
        k: How many of the nearest colours count, 1 to K. Default 1; more to allow mixtures of colours.

    Raises:
        InputError: Colours that are not a finite (K, C), or a k that cannot be.
        ShapeError: Samples that are not images (C, H, W) with as many channels as a colour.

    Example:
        >>> import torch
        >>> Palette([(0, 0, 0), (1, 1, 1)])(torch.zeros(1, 3, 4, 4)) == 0
        tensor([True])
    """

    colours: Colours
    k: Count = 1

    def __post_init__(self) -> None:
        if len({len(colour) for colour in self.colours}) > 1:
            raise InputError(f"colours are {self.colours!r}; expected as many channels of each")
        if self.k > len(self.colours):
            raise InputError(
                f"k is {self.k}; expected 1 to {len(self.colours)}, the number of colours"
            )

    def score(self, sample: np.ndarray) -> float:
        from scipy.spatial import KDTree

        check_image(sample, self)
        if len(sample) != len(self.colours[0]):
            raise ShapeError(
                f"the images have {len(sample)} channels and the colours {len(self.colours[0])}; they must agree"
            )
        distances, _ = KDTree(self.colours).query(sample.reshape(len(sample), -1).T, k=self.k)
        return -float(np.mean(distances))
