"""Perceptual: how alike two pictures are to a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invguide.rewards.feature_distance import FeatureDistance


@dataclass(frozen=True, repr=False, eq=False)
class Perceptual(FeatureDistance):
    """-sum_l weight_l * mean (F_l(x) - F_l(reference))^2 over channels and positions (Johnson et al. 2016).

    The other arguments are those of `FeatureDistance`: `Perceptual(features, reference, weights=None, transform=None)`.
    Features are (N, C, ...): of a picture, or one vector (N, C) such as an embedding.

    Args:
        normalise: Divide the C numbers at each position by their root mean square first, so that a layer's distance is
            2 - 2 * cosine, averaged over positions; as LPIPS (Zhang et al. 2018) does, without its learned weights.
    """

    normalise: bool = False

    def statistic(self, features: Tensor) -> Tensor:
        if not self.normalise:
            return features
        # The floor bounds the slope where all features of a position are zero.
        return features / (features.square().mean(1, keepdim=True) + 1e-8).sqrt()
