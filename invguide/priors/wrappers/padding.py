"""Images of sizes that a network does not take: reflected at their far ends, and cropped again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from invguide.arguments.rules import Count
from invguide.errors import InputError, ShapeError
from invguide.numerics.padding import extend, round_up
from invguide.prior import Prior


def image_conditions(condition: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the conditions that are images as large as x (B, C, ...), such as a mask: they are padded and cut as x."""
    return {n: c for n, c in condition.items() if c.ndim == x.ndim and c.shape[2:] == x.shape[2:]}


class WrappedPrior(Prior):
    """A prior around another one, with its noise levels and units: data are what the one inside makes of x.

    Attributes:
        prior: The one inside.
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        if len(prior.shape) < 2:
            raise InputError(
                f"{type(self).__name__} is for images (C, ...); this prior takes {prior.shape}"
            )
        self.prior = prior
        self.shape = (prior.shape[0], *(None for _ in prior.shape[1:]))
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max
        self.scale, self.shift, self.affine = prior.scale, prior.shift, prior.affine
        self.symmetric, self.sigma_data = prior.symmetric, prior.sigma_data
        self.min_size, self.precision = prior.min_size, prior.precision
        self.knows_objects = prior.knows_objects

    def optimise(self, *args: Any, **settings: Any) -> WrappedPrior:
        """Make the network inside faster, in place: see `invguide.priors.network.NetworkPrior.optimise`."""
        self.prior.optimise(*args, **settings)
        self.precision = self.prior.precision
        return self

    def check(self, images: Tensor | None = None, **condition: Tensor) -> object:
        """Tell whether the network inside is read as it was trained: see `invguide.priors.NetworkPrior.check`."""
        return self.prior.check(images, **condition)

    def to_data(self, x: Tensor) -> Tensor:
        return self.prior.to_data(x)

    def to_normalised(self, x: Tensor) -> Tensor:
        return self.prior.to_normalised(x)

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.prior.data_shape(shape)

    def normalised_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.prior.normalised_shape(shape)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        return (self.prior.sample_shape[0], *self.shape[1:])

    def _check(self, x: Tensor) -> None:
        if x.ndim != 1 + len(self.shape) or self.shape[0] not in (None, x.shape[1]):
            wanted = ", ".join("any" if n is None else str(n) for n in self.shape)
            raise ShapeError(f"this prior takes x of shape (B, {wanted}), got {tuple(x.shape)}")


class Padded(WrappedPrior):
    """A prior for images of any size, by reflection to sizes that the prior inside takes.

    D(x) = crop(D_inside(reflect(x))), where free axes grow to a multiple and fixed ones to their size; larger images
    than a fixed size are for `Tiled`. Networks wrapped by `from_network` are padded already.

    Args:
        prior: For images (C, ...).
        multiple: Of the sizes along free axes (None in the shape), pixels. Default 8; 2^n for a network that halves
            images n times.
    """

    def __init__(self, prior: Prior, multiple: Count = 8) -> None:
        super().__init__(prior)
        self.multiple = multiple
        if multiple >= prior.min_size:
            self.min_size = 1

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self._check(x)
        inside = zip(x.shape[2:], self.prior.shape[1:], strict=True)
        sizes = [fixed or round_up(got, self.multiple) for got, fixed in inside]
        if any(size < got for size, got in zip(sizes, x.shape[2:], strict=True)):
            raise ShapeError(
                f"x of shape {tuple(x.shape)} is larger than the {self.prior.shape} of the prior inside; use "
                "priors.Tiled for it"
            )
        images = {n: extend(c, sizes) for n, c in image_conditions(condition, x).items()}
        denoised = self.prior.denoise(extend(x, sizes), sigma, **{**condition, **images})
        return denoised[(..., *(slice(size) for size in x.shape[2:]))]

    def extra_repr(self) -> str:
        return f"multiple={self.multiple}"
