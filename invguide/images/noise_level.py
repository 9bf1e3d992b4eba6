"""The noise level of a measurement that is a picture, from the picture alone."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.images.jpeg_grid import find_grid, find_steps, rounded
from invguide.images.noise_blocks import GAIN, INDEX, SIDE, Blocks, cut
from invguide.images.smooth_blocks import (
    FLOOR,
    LEAST_SMOOTH,
    MIDDLE,
    Component,
    bisect,
    components,
    level_with_holes,
)

LEAST_KNOWN = 16  # pixels of a block with holes
LEAST_AREA = 24 * 24  # pixels in usable blocks, for an estimate within about ten per cent
WHITE, CORRELATED = (
    0.8,
    0.6,
)  # whiteness above which colour is believed, below which there is a warning
UNEVEN, FAINT = 1.6, 0.01  # ratio of two halves, of which the larger is above the faint level
ADVICE = "pass --sigma-y NUMBER (white = 1)"


class NoiseLevel(NamedTuple):
    """What the noise of a picture seems to be; levels are standard deviations of one colour channel, data units.

    Attributes:
        sigma: Of the white Gaussian noise that the picture was taken with, before clipping and before JPEG.
        luma, chroma: The same from brightness alone and from colour alone; NaN where it cannot be told, as after JPEG,
            which leaves far less of it in colour.
        compression: Root mean square of what JPEG's rounding changed in this noise; 0 without traces of JPEG.
        whiteness: Fine over middle frequencies of the noise: 1 where it is white, less where neighbours resemble each
            other; NaN where it cannot be told, as after JPEG.
        trusted: Whether the figures fit together.
        reason: Why not, and what to pass; empty where they are trusted.
    """

    sigma: float
    luma: float
    chroma: float
    compression: float
    whiteness: float
    trusted: bool
    reason: str

    @property
    def total(self) -> float:
        """Noise with the error of JPEG's rounding: what a denoiser is best told, or it leaves that in."""
        return float(np.hypot(self.sigma, self.compression))


def estimate_sigma(y: Tensor, mask: Tensor | None = None, bits: int = 8) -> float:
    """Return `estimate_noise(y, mask, bits).sigma`: the number alone."""
    return estimate_noise(y, mask, bits).sigma


def estimate_noise(y: Tensor, mask: Tensor | None = None, bits: int = 8) -> NoiseLevel:
    """Estimate the noise of one picture y (1, C, H, W), and say whether the estimate can be trusted.

    Algorithm:
        Blocks of 8 x 8 pixels at regular places, none with a constant channel; their cosine transforms. Those with the
        least coarse power are smooth, and their fine power is noise: coarse and fine coefficients of white noise are
        independent, so that the choice does not bias the level (Ponomarenko et al. 2007, "An automatic approach to
        lossy compression of AVIRIS images"). Differences of colours have least texture. Clipping makes noise smaller
        by a factor that follows from the mean of a block. In pixels that were JPEG the coefficients are multiples of
        steps; these are found, and with them the level whose rounded coefficients have the power that is seen. Blocks
        with unknown pixels: the residual of a fitted coarse surface.

    Args:
        y: The measurement, not the restored picture.
        mask: 1 where y is known, (C or 1, H, W).
        bits: Of the file that y came from; sigma is never less than the rounding to them.

    Raises:
        InputError: No block of 8 x 8 pixels with at least 16 known ones.
    """
    values = y[0].detach().cpu().numpy()
    rounding = 1 / (2**bits - 1) / 12**0.5 if bits < 32 else 1e-6
    known = None if mask is None else mask.detach().cpu().numpy() != 0
    if known is not None and known.all():
        known = None
    same = known is None or bool((known == known[:1]).all())
    if len(values) not in (1, 3) or not same:
        return _separate(values, known, bits)
    known = None if known is None else known[0]
    grid = find_grid(values) if bits == 8 and known is None else None
    level = None if grid is None else _after_jpeg(values, grid)
    level = level or _uncompressed(values, known)
    return level if level.sigma >= rounding else level._replace(sigma=rounding)


def _separate(values: np.ndarray, known: np.ndarray | None, bits: int) -> NoiseLevel:
    """Of channels with masks of their own, or not 1 or 3 of them: the channel of median level."""
    known = np.ones(values.shape, bool) if known is None else np.broadcast_to(known, values.shape)
    each = [
        estimate_noise(torch.tensor(v)[None, None], torch.tensor(k)[None], bits)
        for v, k in zip(values, known, strict=True)
    ]
    return sorted(each, key=lambda level: level.sigma)[len(each) // 2]


def _nothing(known: bool) -> NoiseLevel:
    unknown = float("nan")
    where = "every block of known pixels" if known else "all of the picture"
    reason = f"{where} is constant or clipped, and tells nothing of noise; {ADVICE}"
    return NoiseLevel(0.0, unknown, unknown, 0.0, unknown, False, reason)


# ---- without traces of JPEG


def _uncompressed(values: np.ndarray, known: np.ndarray | None) -> NoiseLevel:
    blocks = cut(values, known)
    if known is not None and len(blocks) < 4 * LEAST_SMOOTH:
        blocks = cut(values, known, least_known=LEAST_KNOWN)
    if blocks.places == 0:
        raise InputError(
            f"the noise cannot be estimated: no block of 8 x 8 pixels has {LEAST_KNOWN} known ones; {ADVICE}"
        )
    if len(blocks) == 0:
        return _nothing(known is not None)
    if blocks.known is not None:
        return _with_holes(blocks)
    parts = components(blocks)
    levels = [part.level() for part in parts]
    whites = [part.whiteness(level) for part, level in zip(parts, levels, strict=True)]
    used, sigma = 0, levels[0]
    if len(parts) == 2 and whites[1] > WHITE:
        tinted = levels[0] > 2 * levels[1] and whites[0] > WHITE  # a grey picture, in effect
        used = 0 if tinted else 1
        if used:  # luma above chroma is texture
            pooled = ((levels[0] ** 2 + 2 * levels[1] ** 2) / 3) ** 0.5
            sigma = min(levels[1], pooled)
    white = whites[used]
    if white < CORRELATED:
        sigma = parts[used].level(MIDDLE, FLOOR)
    reasons = [_few(blocks), _correlated(white, sigma), _uneven(parts[used], blocks.where, sigma)]
    chroma = levels[1] if len(levels) == 2 else float("nan")
    return _judge(NoiseLevel(sigma, levels[0], chroma, 0.0, white, True, ""), reasons)


def _with_holes(blocks: Blocks) -> NoiseLevel:
    sigma = level_with_holes(blocks)
    unknown = float("nan")
    level = NoiseLevel(sigma, sigma, unknown, 0.0, unknown, True, "")
    return _judge(level, [_few(blocks)])


# ---- with traces of JPEG


def _after_jpeg(values: np.ndarray, grid: tuple[int, int]) -> NoiseLevel | None:
    """From luma in the blocks of the file; None where too few of them are left."""
    blocks = cut(values, grid=grid)
    if len(blocks) < LEAST_SMOOTH:
        return None
    part = components(blocks)[0]
    gain = 255 * (GAIN if values.shape[0] == 3 else 1.0)  # to luma of values 0 to 255
    low, high = blocks.values.min((1, 2, 3)), blocks.values.max((1, 2, 3))
    steps = find_steps(gain * part.take((low > 0) & (high < 1)).spectra[:, 0]) / gain
    told = np.isfinite(steps) & (INDEX >= 3)
    smooth = part.smooth()
    sigma = _rounded_level(smooth, steps, told)
    for _ in range(3):
        finest = _finest(told & (steps < 3.5 * sigma))
        if finest.sum() < 6:
            break
        sigma = _rounded_level(part.unclipped(sigma).smooth(), steps, finest)
    noise = sigma * _draws()
    compression = float(np.sqrt(np.mean(np.square(rounded(noise, steps) - noise))))
    unknown = float("nan")
    level = NoiseLevel(sigma, sigma, unknown, compression, unknown, True, "")
    return _judge(level, [_few(blocks)])


@cache
def _draws() -> np.ndarray:
    """Spectra of normal noise to be rounded, the same for all pictures: (1000, 8, 8)."""
    return np.random.default_rng(0).standard_normal((1000, SIDE, SIDE))


def _finest(chosen: np.ndarray) -> np.ndarray:
    """The finer half of these coefficients."""
    if not chosen.any():
        return chosen
    return chosen & (np.median(INDEX[chosen]) <= INDEX)


def _rounded_level(part: Component, steps: np.ndarray, band: np.ndarray) -> float:
    """The level whose rounded coefficients have the power that is seen in this band.

    Compared are the means over the quarter of the blocks with the least power, of this picture and of normal draws
    with the clipping of these blocks; over all of them, where that quarter has none.
    """
    power, draws = np.sort(part.power(band)), _draws()[:, band]
    quarter = len(power) // 4
    count = quarter if power[:quarter].sum() > 0 else len(power)
    drawn_count = round(count / len(power) * len(draws))

    def excess(sigma: float) -> float:
        spread = np.sqrt(np.resize(part.variance(sigma), len(draws)))[:, None]  # block by block
        drawn = np.sort(np.square(rounded(spread * draws, steps[band])).sum(1))
        return float(power[:count].mean() - drawn[:drawn_count].mean())

    return bisect(excess)


# ---- trust


def _judge(level: NoiseLevel, reasons: list[str]) -> NoiseLevel:
    said = "; ".join(reason for reason in reasons if reason)
    return level._replace(trusted=False, reason=f"{said}; {ADVICE}") if said else level


def _few(blocks: Blocks) -> str:
    area = blocks.area()
    return f"only {area} pixels tell of it, {LEAST_AREA} are needed" if area < LEAST_AREA else ""


def _correlated(white: float, sigma: float) -> str:
    if white >= CORRELATED or sigma < FAINT:
        return ""
    return (
        f"neighbouring pixels resemble each other, fine noise is {white:.0%} of the middle one: "
        f"a resized or processed picture, or texture everywhere"
    )


def _uneven(part: Component, where: np.ndarray, sigma: float) -> str:
    """Whether two halves disagree: dark and bright, upper and lower, left and right."""
    brightness = part.means.mean(1)
    for names, values in (
        (("dark", "bright"), brightness),
        (("upper", "lower"), where[:, 0]),
        (("left", "right"), where[:, 1]),
    ):
        first = values <= np.median(values)
        if min(first.sum(), (~first).sum()) < 4 * LEAST_SMOOTH:
            continue
        a, b = part.take(first).level(), part.take(~first).level()
        if max(a, b) > max(FAINT, UNEVEN * min(a, b)):
            return f"it is {a:.3g} in the {names[0]} half and {b:.3g} in the {names[1]} one"
    return ""
