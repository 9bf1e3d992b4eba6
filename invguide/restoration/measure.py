"""A picture as a measurement, and the prior in the form that its unknown calls for."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.forward_operator import Operator
from invguide.images.known_pixels import stay_by_default
from invguide.images.noise_level import NoiseLevel, estimate_noise
from invguide.images.reading import Picture
from invguide.images.transparency import visible, without_hidden_colours
from invguide.noise.model import NoiseModel
from invguide.numerics.padding import round_up
from invguide.operators import Identity
from invguide.operators.composition import Composition
from invguide.operators.grayscale import Grayscale
from invguide.operators.inpainting import Inpainting
from invguide.prior import Prior
from invguide.priors.wrappers.grey import Grey
from invguide.priors.wrappers.latent import LatentPrior
from invguide.priors.wrappers.padding import Padded
from invguide.priors.wrappers.tiled import Tiled
from invguide.restoration.jpeg_measurement import Measurement
from invguide.restoration.likely_noise import LEAST, TEXTURE, likely_level
from invguide.restoration.settings import Job, in_tiles
from invguide.restoration.tasks import to_grey

WHOLE = 1024 * 1024  # pixels; larger pictures are cut into tiles


LARGE_TILE = 384


@dataclass
class Measured:
    """A picture as a measurement.

    Attributes:
        picture: As read.
        y: (1, C, H, W), what the operator gives.
        operator: From the prior's image to y.
        known: Where y has pixels, for the panel; None: everywhere.
        grey: The unknown is a colour picture, whose luma is measured: the result is made grey.
        keep_known: The known pixels of the result are those of the picture.
        sigma_y: Given or estimated; None where `noise` is another law.
        noise: Of y, where it is not Gaussian of sigma_y.
        note: What was read from the file or assumed of it.
        estimate: Of sigma_y; None where it was given, or is not needed.
    """

    picture: Picture
    y: Tensor
    operator: Operator
    known: Tensor | None
    grey: bool
    sigma_y: float | None
    noise: NoiseModel | None = None
    note: str = ""
    keep_known: bool = False
    estimate: NoiseLevel | None = None

    @property
    def unknown_shape(self) -> tuple[int, ...]:
        shape = self.operator.input_shape(tuple(self.y.shape[1:]))
        assert shape is not None  # of every task
        return shape

    def describe(self) -> str:
        """The operator in words."""
        parts = getattr(self.operator, "parts", [self.operator])
        names = [f"{type(p).__name__}({p.extra_repr()})" for p in parts]
        if self.grey:
            return f"{names[-1]} of the luma of a colour picture"
        text = " then ".join(names)
        if self.known is None:
            return text
        return f"{text}; white is known" + (" and stays" if self.keep_known else "")


def measure(job: Job, picture: Picture, name: str) -> Measured:
    """Turn a picture into a measurement for the job's prior; colours that nobody sees do not count."""
    shown = visible(picture)
    picture = without_hidden_colours(picture)
    if job.task.measure is not None:
        return _measured_otherwise(job, job.task.measure, picture, name)
    inner = job.task.operator(job.settings.options, picture)
    if isinstance(inner, Inpainting) and shown is not None:
        inner = Inpainting(inner.mask & shown)
    if picture.holes is not None and isinstance(inner, Inpainting):
        _check_holes(picture.holes, inner, name)
    colours = job.prior.sample_shape[0]
    y, operator, grey = picture.values, inner, False
    if isinstance(inner, Grayscale):
        y = to_grey(y)
        if colours != 3:
            raise InputError(
                f"the prior {job.settings.prior} has {colours} channel; colours need one with 3"
            )
    elif picture.grey and colours == 3:
        if not job.prior.affine:  # its decoder gives colours
            operator, grey = Composition(Grayscale(), inner), True
    elif y.shape[1] != colours:
        raise _unfit(job, picture, name)
    known = inner.mask if isinstance(inner, Inpainting) else None
    if known is not None:
        y = y * known.to(y)
    sigma, estimate = job.settings.sigma_y, None
    if sigma is None:
        estimate = estimate_noise(y, shown if known is None else known, picture.bits)
        sigma = estimate.total
        if not estimate.trusted:
            warnings.warn(
                f"{name}: the noise level is a guess, {estimate.sigma:.3g}: {estimate.reason}"
            )
    keep = job.settings.keep_known
    if keep is None:
        keep = stay_by_default(job.settings.sigma_y, picture.bits)
    keep = keep and known is not None
    return Measured(picture, y, operator, known, grey, sigma, keep_known=keep, estimate=estimate)


def _check_holes(holes: np.ndarray, operator: Inpainting, name: str) -> None:
    """Raise InputError where the mask marks as known what the file does not tell."""
    wrong = torch.from_numpy(holes) & operator.mask.any(0)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{name} has {int(wrong.sum())} NaN or infinite values where the mask marks pixels as known (first at row "
            f"{row}, column {column}); paint the mask black there"
        )


def _measured_otherwise(
    job: Job, how: Callable[..., Measurement], picture: Picture, name: str
) -> Measured:
    """The measurement of a task that does not take the pixels for it."""
    colours, sigma = job.prior.sample_shape[0], job.settings.sigma_y
    if colours != 3 and not (picture.grey and colours == 1):
        raise _unfit(job, picture, name)
    found = how(job.settings.options, picture, colours, sigma)
    grey = picture.grey and colours == 3
    return Measured(picture, found.y, found.operator, None, grey, sigma, found.noise, found.note)


def _unfit(job: Job, picture: Picture, name: str) -> InputError:
    return InputError(
        f"{name} has {picture.values.shape[1]} channels and the prior {job.settings.prior} "
        f"{job.prior.sample_shape[0]}; use another prior"
    )


def prior_for(job: Job, measured: Measured) -> Prior:
    """Return the job's prior: grey for a grey unknown, in tiles where asked for or where the picture calls for them.

    A grey picture is its own unknown. Taken as the luma of an unknown colour picture it would not be a noisy signal of
    the prior, and denoising would take a solver for what is one network call and 0.3 dB better.
    """
    shape = measured.unknown_shape
    prior = _tiled(job, shape)
    grey = shape[0] == 1 and prior.sample_shape[0] == 3
    return Grey(prior) if grey else prior


def _tiled(job: Job, shape: tuple[int, ...]) -> Prior:
    prior, tile = job.prior, job.settings.tile
    if min(shape[1:]) < prior.min_size and prior.affine and None in prior.shape[1:]:
        return Padded(prior, round_up(prior.min_size, getattr(prior, "multiple", 1)))
    if tile is None and not isinstance(prior, LatentPrior):
        if any(
            own not in (None, size) for own, size in zip(prior.shape[1:], shape[1:], strict=True)
        ):
            return Tiled(prior)
        tile = LARGE_TILE if math.prod(shape[1:]) > WHOLE else 0
    return in_tiles(prior, tile, tuple(shape[1:]))


def below_texture(job: Job, measured: Measured, prior: Prior, name: str) -> Measured:
    """Return the measurement with a lower noise level where the estimated one would take texture for noise.

    Only where nothing but noise is to be removed, and brightness has far more of it than colours, as texture has. Noise
    that is not white, as after JPEG or a change of size, is no more likely under the prior than texture is.
    """
    estimate, sigma = measured.estimate, measured.sigma_y
    plain = isinstance(measured.operator, Identity) and measured.noise is None
    if estimate is None or sigma is None or estimate.compression or not (plain and prior.affine):
        return measured
    if not estimate.chroma < sigma / TEXTURE:
        return measured
    likely = likely_level(prior, measured.y, sigma, **job.condition)
    if likely == sigma:
        return measured
    found = "no noise that it could tell" if likely == LEAST else f"{likely:.3g} likely"
    reason = f"the estimate {sigma:.3g} would take texture for noise, and the prior finds {found}"
    warnings.warn(f"{name}: {reason}; pass --sigma-y NUMBER (white = 1) if you know better")
    told = estimate._replace(sigma=likely, trusted=False, reason=reason)
    return dataclasses.replace(measured, sigma_y=likely, estimate=told)


def told(noise: NoiseLevel | None) -> str:
    """Where the noise level is from."""
    if noise is None:
        return "given"
    rounding = (
        f": noise {noise.sigma:.3g}, rounding of the JPEG file {noise.compression:.3g}"
        if noise.compression
        else ""
    )
    return f"estimated{'' if noise.trusted else ', not to be trusted'}{rounding}"
