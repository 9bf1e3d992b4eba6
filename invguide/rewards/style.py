"""Style: how alike the textures of two pictures are, wherever in the picture they lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invguide.errors import ShapeError
from invguide.rewards.feature_distance import FeatureDistance


@dataclass(frozen=True, repr=False, eq=False)
class Style(FeatureDistance):
    """-sum_l weight_l * |G_l(x) - G_l(reference)|_F^2 / C_l^2, G_ij the mean over positions of F_i F_j.

    G is the Gram matrix of a layer's C channels per position (Gatys et al. 2016), so that pictures of different size
    can be compared; of equal size, the distance is four times theirs. Features are (N, C, positions...): tokens
    (N, L, C) are to be transposed first.

    Args:
        features: Network of images -> features (N, C, ...) of one layer, or a list, tuple or dict of several.
        reference: A picture (C, H, W), data units.
        weights: One per layer, no unit. Default None: 1 / L each, of L layers; others to favour coarse or fine ones.
        transform: Images in [0, 1] -> what the network expects. Default None: as they are; such as
            `Preprocess.imagenet()`.
    """

    def statistic(self, features: Tensor) -> Tensor:
        if features.ndim < 3:
            raise ShapeError(
                f"Style: the network returned features {tuple(features.shape)}; expected positions to average over, "
                f"(N, C, H, W) or (N, C, L)"
            )
        flat = features.flatten(2)
        return flat @ flat.mT / flat.shape[2]
