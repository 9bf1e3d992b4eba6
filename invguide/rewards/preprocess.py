"""Preprocess: from images in [0, 1] to what a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from invguide.arguments.checks import Checked
from invguide.arguments.rules import Count, Items, Number, Size
from invguide.errors import InputError, ShapeError


@dataclass(frozen=True)
class Preprocess(metaclass=Checked):
    """(resize(x) - mean) / std, a `transform` of rewards that ask a network.

    Resizing is bilinear, antialiased and changes the proportions where they differ. A picture of one channel is
    repeated along the channels of mean and std.

    Args:
        mean: One per channel, data units. Default (0.0,); (0.5, 0.5, 0.5) with the same std for networks of [-1, 1].
        std: One per channel, data units, above 0. Default (1.0,); as the network was trained.
        size: Height and width, or one number for both, pixels. Default None: as it comes; as the network was trained.

    Raises:
        InputError: A mean, std or size that cannot be.
        ShapeError: Images whose channels are neither one nor as many as mean.

    Example:
        >>> import torch
        >>> Preprocess.imagenet(32)(torch.rand(2, 1, 20, 20)).shape
        torch.Size([2, 3, 32, 32])
    """

    mean: tuple[float, ...] = (0.0,)
    std: Annotated[tuple[float, ...], Items((Number(0, open_low=True),))] = (1.0,)
    size: Count | Size | None = None

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise InputError(
                f"mean is {self.mean} and std {self.std}; expected one number per channel in each"
            )
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))

    @classmethod
    def imagenet(cls, size: int | tuple[int, int] | None = 224) -> Preprocess:
        """Return the statistics that networks trained on ImageNet expect, those of torchvision and timm too."""
        return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size)

    def __call__(self, x: Tensor) -> Tensor:
        channels = len(self.mean)
        if x.ndim != 4 or (channels > 1 and x.shape[1] not in (1, channels)):
            raise ShapeError(
                f"{self!r} was given a batch of shape {tuple(x.shape)}; expected images (N, C, H, W), C {channels} or 1"
            )
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(v).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std
