"""ConnectedComponents: how many separate bright regions a picture has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invguide.arguments.rules import Count, CountOrNone
from invguide.errors import ShapeError
from invguide.rewards.per_sample import PerSample


@dataclass(frozen=True)
class ConnectedComponents(PerSample):
    """-n, or -|n - target|, where n counts the connected regions in which the mean of the channels is above threshold.

    Signals and volumes, (C, L) and (C, D, H, W), have regions as pictures have.

    Args:
        target: Number of regions to aim at. Default None: as few as can be; a number for just so many.
        threshold: A pixel above it belongs to a region; data units. Default 0.5; that between your regions and the
            rest.
        connectivity: How many axes a neighbour may lie along: 1, pixels that share an edge (4 in a picture); 2, or a
            corner too (8). Default 1; 2 where diagonal lines are to hold together.

    Raises:
        InputError: A target or connectivity that cannot be.
        ShapeError: Samples without a channel and at least one other axis, or with fewer axes than `connectivity`.
    """

    target: CountOrNone | None = None
    threshold: float = 0.5
    connectivity: Count = 1

    def score(self, sample: np.ndarray) -> float:
        from scipy import ndimage

        if sample.ndim - 1 < self.connectivity:
            raise ShapeError(
                f"{self!r} was given samples of shape {sample.shape}; expected a channel axis and at least "
                f"{self.connectivity} more, as in images (C, H, W)"
            )
        bright = sample.mean(0) > self.threshold
        neighbours = ndimage.generate_binary_structure(bright.ndim, self.connectivity)
        _, count = ndimage.label(bright, neighbours)  # pyright: ignore[reportGeneralTypeIssues]
        return float(-count if self.target is None else -abs(count - self.target))
