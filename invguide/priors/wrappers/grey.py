"""Grey pictures, from a prior of colour pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.prior import Prior
from invguide.priors.wrappers.padding import WrappedPrior


class Grey(WrappedPrior):
    """A prior of grey pictures (B, 1, H, W): colour pictures whose C channels are equal.

    D(x; s) = mean over channels of D_inside((x, ..., x); sqrt(C) s)

    Along the unit vector (1, ..., 1) / sqrt(C) of colour space such a picture is sqrt(C) x, so its noise is sqrt(C) s
    there, and this is the level that the network is told. Across it a grey picture is known to be zero; noise drawn
    there would make the whole white and the answer hardly better, but dependent on the draw. The level s itself would
    be too low by far: noise would pass for structure.

    Args:
        prior: Of colour pictures in pixels (C, H, W), C at least 2.

    Raises:
        InputError: The prior's channels are one, or not colours: latents.
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior)
        channels = prior.shape[0]
        if channels is None or channels < 2 or not prior.affine:
            raise InputError(
                f"Grey is for priors of colour pictures in pixels; {type(prior).__name__} takes {prior.shape}"
                f"{'' if prior.affine else ', which it decodes'}: use it as it is"
            )
        self.channels = channels
        self.shape = (1, *prior.shape[1:])
        self.sigma_min, self.sigma_max = (
            sigma / channels**0.5 for sigma in (prior.sigma_min, prior.sigma_max)
        )

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self._check(x)
        colour = x.expand(-1, self.channels, *x.shape[2:])
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device) * self.channels**0.5
        return self.prior.denoise(colour, level, **condition).mean(1, keepdim=True)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        return self.shape
