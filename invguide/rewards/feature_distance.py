"""FeatureDistance: the base of rewards that compare features of x with those of a reference picture."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.rewards._images import check_images, read_reference, require_image
from invguide.rewards.network_reward import Function, NetworkReward, as_floats


@dataclass(frozen=True, repr=False, eq=False)
class FeatureDistance(NetworkReward):
    """-sum over layers l of weight_l * mean (s_l(x) - s_l(reference))^2, s_l the `statistic` of the features.

    Args:
        features: Network of images -> features (N, C, ...) of one layer, or a list, tuple or dict of several.
        reference: A picture (C, H, W), data units.
        weights: One per layer, no unit. Default None: 1 / L each, of L layers; others to favour coarse or fine ones.
        transform: Images in [0, 1] -> what the network expects. Default None: as they are; such as
            `Preprocess.imagenet()`.

    Raises:
        InputError: A reference that is no picture, something else than features, weights that cannot be.
        ShapeError: Images of other channels than the reference, or features that cannot be compared.
    """

    features: Function
    reference: Tensor
    weights: tuple[float, ...] | None = None
    transform: Function | None = None

    def __post_init__(self) -> None:
        reference = require_image(self, read_reference(self, self.reference))
        object.__setattr__(self, "reference", reference)
        self.connect(self.features, self.transform)
        home = next(self.network.parameters(), reference).device
        with torch.no_grad():
            wanted = self._statistics(reference[None].to(home))
        if self.weights is not None:
            weights = tuple(map(float, self.weights))
            if len(weights) != len(wanted) or not all(map(math.isfinite, weights)):
                raise InputError(
                    f"weights are {weights}; expected {len(wanted)} finite numbers, one per layer of features"
                )
            object.__setattr__(self, "weights", weights)
        for i, statistic in enumerate(wanted):
            self.network.register_buffer(f"wanted_{i}", statistic)

    @abstractmethod
    def statistic(self, features: Tensor) -> Tensor:
        """What is compared, of one layer's features (N, C, ...)."""

    def _statistics(self, x: Tensor) -> list[Tensor]:
        name, output = type(self).__name__, self.network(x)
        if isinstance(output, Mapping):
            output = list(output.values())
        layers: list[Any] = list(output) if isinstance(output, (list, tuple)) else [output]
        for layer in layers:
            if not isinstance(layer, Tensor) or not layer.is_floating_point():
                kind = str(layer.dtype) if isinstance(layer, Tensor) else type(layer).__name__
                raise InputError(
                    f"{name}: the network returned {kind}; expected floating-point features (N, C, ...), or several"
                )
            if layer.ndim < 2 or len(layer) != len(x) or not layer.numel():
                raise ShapeError(
                    f"{name}: the network returned features {tuple(layer.shape)} for {len(x)} images; expected "
                    f"({len(x)}, C, ...)"
                )
        if not layers:
            raise InputError(f"{name}: the network returned no features")
        return [self.statistic(as_floats(layer)) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=len(self.reference))
        statistics = self._statistics(x)
        weights = self.weights or (1 / len(statistics),) * len(statistics)
        total = torch.zeros((), device=x.device)
        for i, (weight, found) in enumerate(zip(weights, statistics)):
            wanted = self.network.get_buffer(f"wanted_{i}").to(found)
            if found.shape[1:] != wanted.shape[1:]:
                raise ShapeError(
                    f"{type(self).__name__}: the features are {tuple(found.shape[1:])} and those of the reference "
                    f"{tuple(wanted.shape[1:])}; give a reference of the images' size, or resize both by transform"
                )
            total = total - weight * (found - wanted).square().flatten(1).mean(1)
        return total.to(x)
