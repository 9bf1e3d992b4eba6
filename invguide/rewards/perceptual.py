"""Perceptual: how alike two pictures are to a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invguide.rewards.feature_distance import FeatureDistance


@dataclass(frozen=True, repr=False, eq=False)
class Perceptual(FeatureDistance):
    """-sum_l weight_l * mean (F_l(x) - F_l(reference))^2 over channels and positions (Johnson et al. 2016).

    Features are (N, C, ...): of a picture, or one vector (N, C) such as an embedding.

    Args:
        features: Network of images -> features (N, C, ...) of one layer, or a list, tuple or dict of several.
        reference: A picture (C, H, W), data units.
        weights: One per layer, no unit. Default None: 1 / L each, of L layers; others to favour coarse or fine ones.
        transform: Images in [0, 1] -> what the network expects. Default None: as they are; such as
            `Preprocess.imagenet()`.
        normalise: Whether the C numbers at each position are divided by their root mean square first, so that a layer's
            distance is 2 - 2 * cosine, averaged over positions; as LPIPS (Zhang et al. 2018) does, without its learned
            weights. Default False; True for embeddings such as CLIP's, whose length says little.
    """

    normalise: bool = False

    def statistic(self, features: Tensor) -> Tensor:
        if not self.normalise:
            return features
        # The floor bounds the slope where all features of a position are zero.
        return features / (features.square().mean(1, keepdim=True) + 1e-8).sqrt()
