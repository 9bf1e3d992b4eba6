"""Latent diffusion: a prior over the latents of an autoencoder, whose samples are the decoded images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from invguide.arguments.rules import Count, Positive, SmallShape, shown
from invguide.errors import InputError, ShapeError
from invguide.numerics.padding import extend, round_up
from invguide.prior import Prior
from invguide.priors.known_images import known_images
from invguide.priors.networks.conditions import Sized
from invguide.priors.wrappers.tiled import Tiled

SMALLEST_IMAGE = 128  # by which an autoencoder is judged


class LatentPrior(Prior):
    """A prior over latents z = (E(x) - shift_factor) * scaling_factor, where E encodes images x.

    The solvers move z; operators, rewards and results see the decoded image, and gradients pass through the
    decoder. The decoder is not linear, so a linear operator is not linear in z either: solvers that need one do
    not apply. No image is restored better than the autoencoder can show it: `floor` tells how well that is.

    Args:
        prior: Over the latents, such as `from_network(unet, "eps", "scaled-linear-vp", (4, None, None))`.
        autoencoder: With encode and decode for images in [-1, 1], such as diffusers.AutoencoderKL. They return a
            tensor, or an output with `latent_dist` or `latents`, and `sample`.
        scaling_factor: Of the latents, above 0, as above. Default None: that of the autoencoder's configuration; given
            for one without.
        shift_factor: Of the latents, as above. Default None: that of the configuration, else 0.
        factor: Pixels per latent, along each axis. Default None: as the configuration tells; given for an
            autoencoder without.
        channels: Of an image. Default 3, colour.
        size: (height, width) of all images, pixels; it need not be a multiple of factor: decoded images are cropped at
            their far ends, and images are reflected there before they are encoded. Default None: multiples of factor;
            see `for_size`.

    Raises:
        InputError: The factors are not given, and the autoencoder has no configuration that tells them, or one that
            scales each channel otherwise.
    """

    affine = False
    shift = 0.5  # of pixels: a blank image is grey

    def __init__(
        self,
        prior: Prior,
        autoencoder: nn.Module,
        *,
        scaling_factor: Positive | None = None,
        shift_factor: float | None = None,
        factor: Count | None = None,
        channels: Count = 3,
        size: SmallShape | None = None,
    ) -> None:
        super().__init__()
        if not all(callable(getattr(autoencoder, name, None)) for name in ("encode", "decode")):
            raise InputError(
                f"LatentPrior: autoencoder is {shown(autoencoder)}; expected a module with encode and decode"
            )
        config = dict(getattr(autoencoder, "config", {}))
        told = scaling_factor if scaling_factor is not None else config.get("scaling_factor")
        blocks = config.get("block_out_channels")
        if told is None or (factor is None and blocks is None):
            raise InputError(
                f"{type(autoencoder).__name__} does not tell how its latents are scaled: pass scaling_factor= and "
                "factor=, the pixels per latent along each axis"
            )
        uneven = config.get("latents_mean") is not None or config.get("latents_std") is not None
        if uneven and scaling_factor is None:
            raise InputError(
                f"{type(autoencoder).__name__} scales each channel of its latents otherwise (latents_mean, "
                "latents_std), which is not known here: wrap it in a module whose encode and decode do that, and "
                "pass scaling_factor=1"
            )
        self.prior, self.autoencoder = prior, autoencoder.requires_grad_(False)
        self.scaling_factor = float(told)
        offset = config.get("shift_factor") if shift_factor is None else shift_factor
        self.shift_factor = float(offset or 0.0)
        self.factor = factor or 2 ** (len(blocks or ()) - 1)
        self.channels, self.size = channels, size
        for part in prior.modules():
            if isinstance(part, Sized):
                part.pixels = self.factor
        self.shape, self.min_size = prior.shape, prior.min_size
        if size is not None:
            self.shape = (prior.shape[0], *(round_up(n, self.factor) // self.factor for n in size))
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max
        self.sigma_data, self.precision = prior.sigma_data, prior.precision
        self.eval()

    def train(self, mode: bool = True) -> LatentPrior:
        """Stay in evaluation mode."""
        return super().train(False)

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return self.prior.denoise(x, sigma, **condition)

    def to_data(self, x: Tensor) -> Tensor:
        """Decode latents, (B, c, h, w) -> (B, channels, H, W) in [0, 1], or a little beyond."""
        z = x / self.scaling_factor + self.shift_factor
        output: Any = self.autoencoder.decode(z.to(self._like.dtype))  # pyright: ignore[reportCallIssue]
        image = (getattr(output, "sample", output).to(x.dtype) + 1) / 2
        return image if self.size is None else image[(..., *map(slice, self.size))]

    def to_normalised(self, x: Tensor) -> Tensor:
        """Encode images: the most likely latents, not a draw of them."""
        if self.size is not None:
            x = extend(x, [self.factor * (n or 0) for n in self.shape[1:]])
        output: Any = self.autoencoder.encode((2 * x - 1).to(self._like.dtype))  # pyright: ignore[reportCallIssue]
        law = getattr(output, "latent_dist", None)
        z = getattr(output, "latents", output) if law is None else law.mode()
        return (z.to(x.dtype) - self.shift_factor) * self.scaling_factor

    def for_size(self, *size: int, tile: int | None = None) -> LatentPrior:
        """Return this prior for images of one size, such as height and width.

        Args:
            size: In pixels; where the network takes another one only, it sees tiles.
            tile: Pixels along each side of overlapping tiles, for a network that takes any size. The autoencoder sees
                whole images.

        Raises:
            InputError: tile is no multiple of factor, or not what the network takes.
        """
        if tile is not None and tile % self.factor:
            raise InputError(
                f"tile is {tile}; expected a multiple of {self.factor}, the pixels of one latent"
            )
        latents = [round_up(n, self.factor) // self.factor for n in size]
        fits = all(own in (None, n) for own, n in zip(self.prior.shape[1:], latents, strict=True))
        inside = self.prior
        if tile is not None or not fits:
            inside = Tiled(self.prior, None if tile is None else tile // self.factor)
        return LatentPrior(
            inside,
            self.autoencoder,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            factor=self.factor,
            channels=self.channels,
            size=size,
        )

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.channels, *(self.size or (self.factor * size for size in shape[1:])))

    def normalised_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.size is not None and shape == (self.channels, *self.size):
            return tuple(int(n or 0) for n in self.shape)
        wrong = any(size % self.factor for size in shape[1:])
        if wrong or len(shape) != 3 or shape[0] != self.channels or self.shape[0] is None:
            raise ShapeError(
                f"this prior makes images of {self.channels} channels whose height and width are multiples of "
                f"{self.factor}; got {shape}: crop or extend the picture, or take prior.for_size(height, width)"
            )
        return (self.shape[0], *(size // self.factor for size in shape[1:]))

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        return (self.channels, *(self.size or (n and self.factor * n for n in self.shape[1:])))

    def floor(self, images: Tensor | None = None) -> Tensor:
        """Return the root mean square error of decode(encode(x)) of each image, (N,), data units.

        Args:
            images: (N, channels, H, W) in [0, 1]; by default parts of the photograph that ships with the package.
        """
        x = self._pictures(images)
        with torch.no_grad():
            error = self.to_data(self.to_normalised(x)) - x
        return error.square().flatten(1).mean(1).sqrt().cpu()

    def check(self, images: Tensor | None = None, **condition: Tensor) -> object:
        """Examine the network on the latents of known images: see `invguide.priors.NetworkPrior.check`."""
        with torch.no_grad():
            latents = self.prior.to_data(self.to_normalised(self._pictures(images)))
        return self.prior.check(latents, **condition)

    def optimise(self, *args: Any, **settings: Any) -> LatentPrior:
        """Make the network inside faster, in place; the autoencoder stays as it is."""
        self.prior.optimise(*args, **settings)
        self.precision = self.prior.precision
        return self

    def _pictures(self, images: Tensor | None) -> Tensor:
        """These images, or known ones, where the autoencoder is."""
        if images is None:
            images = known_images(self.sample_shape, min_size=SMALLEST_IMAGE)
        return images.to(self._like.device)

    @property
    def _like(self) -> Tensor:
        """Where the autoencoder is, and what it computes in: the prior's, where it has no weights."""
        first = next(self.autoencoder.parameters(), None)
        return (
            torch.empty(0, dtype=self.prior.dtype, device=self.prior.device)
            if first is None
            else first
        )
