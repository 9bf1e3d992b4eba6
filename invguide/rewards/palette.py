"""Palette: how near the pixels of a picture are to a few given colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from invguide.errors import InputError, ShapeError
from invguide.rewards.per_sample import PerSample, check_image


@dataclass(frozen=True)
class Palette(PerSample):
    """-mean over pixels of the Euclidean distance to the k nearest colours, themselves averaged.

    Args:
        colours: K colours of C channels each, values in [0, 1]: nested sequences, an array or a tensor (K, C).
        k: How many of the nearest colours count, 1 to K.

    Raises:
        InputError: Colours that are not a finite (K, C), or a k that cannot be.
        ShapeError: Samples that are not images (C, H, W) with as many channels as a colour.

    Example:
        >>> import torch
        >>> Palette([(0, 0, 0), (1, 1, 1)])(torch.zeros(1, 3, 4, 4)) == 0
        tensor([True])
    """

    colours: Sequence[Sequence[float]]
    k: int = 1

    def __post_init__(self) -> None:
        try:
            colours = np.asarray(self.colours, dtype=float)
        except (TypeError, ValueError) as error:
            raise InputError(f"colours are {self.colours!r}; expected (K, C) numbers") from error
        if colours.ndim != 2 or not colours.size or not np.isfinite(colours).all():
            raise InputError(
                f"colours have shape {colours.shape}; expected K colours of C finite channels each, (K, C)"
            )
        if not 1 <= self.k <= len(colours):
            raise InputError(f"k is {self.k}; expected 1 to {len(colours)}, the number of colours")
        object.__setattr__(self, "colours", tuple(map(tuple, colours.tolist())))

    def score(self, sample: np.ndarray) -> float:
        from scipy.spatial import KDTree

        check_image(sample, self)
        if len(sample) != len(self.colours[0]):
            raise ShapeError(
                f"the images have {len(sample)} channels and the colours {len(self.colours[0])}; they must agree"
            )
        distances, _ = KDTree(self.colours).query(sample.reshape(len(sample), -1).T, k=self.k)
        return -float(np.mean(distances))
