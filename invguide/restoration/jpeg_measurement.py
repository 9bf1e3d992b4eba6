"""A JPEG picture as a measurement: the coefficients of its file, each known to half a quantisation step."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.images.jpeg_file import BLOCK, JPEGFile, is_jpeg, parse_jpeg, standard_tables
from invguide.images.jpeg_reading import (
    ROUNDING,
    Coefficients,
    block_dct,
    blocks_of,
    read_coefficients,
    shrink,
)
from invguide.images.reading import Picture
from invguide.noise import Quantised
from invguide.operators import JPEGCoefficients
from invguide.operators.jpeg_coefficients import YCBCR

# Of the values that are not 0, the mean distance from the nearest multiple of the step, in steps: 1/4 where the
# grid or table is another one, near 0 where they are right.
MISFIT = 0.17
# Root mean square distance of a block's coefficients from multiples of their steps, on the scale of 8-bit pixels:
# rounding alone makes about 0.3; more is pixels that were cut off, or changed since.
ON_GRID = 1.0


class Measurement(NamedTuple):
    """What a task takes a picture for.

    Attributes:
        operator: From the prior's picture to y.
        y: (1, *y_shape).
        noise: The law of y.
        note: What was read or assumed, in words.
    """

    operator: JPEGCoefficients
    y: Tensor
    noise: Quantised
    note: str


def measure_jpeg(
    picture: Picture, quality: float | None, colours: int, sigma_y: float | None = None
) -> Measurement:
    """Return the coefficients of a JPEG file; or of another picture that was one, where its quality is known.

    Args:
        picture: As read.
        quality: Of the compression, 1 to 100; None: the file tells.
        colours: Channels of the prior's pictures, 3 or 1; a grey file is then the luma of a colour picture, or it.
        sigma_y: Noise standard deviation of the picture before it was compressed, white = 1; None is none.

    Raises:
        InputError: No JPEG file and no quality; a quality out of range; a file of CMYK and the like.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise InputError(f"quality={quality}; expected a number from 1 to 100")
    data = picture.path.read_bytes() if picture.path is not None else b""
    own = quality is None or round(quality) == picture.jpeg_quality
    if is_jpeg(data) and own:
        file = parse_jpeg(data, str(picture.path))
        planes, steps = read_coefficients(file), [c.table for c in file.components]
        factors, colour, orientation = file.factors, file.colour, file.orientation
        note = _describe(file, picture.jpeg_quality)
    elif quality is None:
        raise InputError(
            "the task jpeg needs --quality 1..100: the picture is no JPEG file, which would tell its tables"
        )
    else:
        planes, steps, factors, note = _assumed(picture, round(quality))
        colour, orientation = "grey" if picture.grey else "ycbcr", 1
    if picture.grey:  # of a file of three planes too, whose chroma is 0
        planes, steps, factors = planes[:1], steps[:1], factors[:1]
        colour = "luma" if colours == 3 else "grey"
    operator = JPEGCoefficients(picture.size, colour, factors, orientation)
    return Measurement(operator, *_law(operator, planes, steps, sigma_y or 0.0), note)


def _law(
    operator: JPEGCoefficients,
    planes: list[Coefficients],
    steps: list[np.ndarray],
    sigma_y: float,
) -> tuple[Tensor, Quantised]:
    """Measurement (1, m) and its law, white = 1."""
    y, step, error = [], [], []
    for i, (plane, table) in enumerate(zip(planes, steps)):
        values = plane.values.copy()
        if i == 0 or operator.colour == "rgb":
            values[..., 0, 0] += 128 * BLOCK  # the constant that a file leaves out
        y.append(values.reshape(-1))
        step.append(np.broadcast_to(table, values.shape).reshape(-1))
        error.append(plane.error.reshape(-1))
    found, width, spread = (
        torch.from_numpy(np.concatenate(part) / 255).float()[None] for part in (y, step, error)
    )
    before = sigma_y * operator.row_norms(found)
    return found, Quantised(width, (spread**2 + before**2).sqrt())


def _describe(file: JPEGFile, quality: int | None) -> str:
    parts = ["tables of the file" if quality is None else f"quality {quality}", file.subsampling]
    parts += ["RGB"] if file.colour == "rgb" else []
    parts += [] if file.orientation == 1 else [f"turned by EXIF ({file.orientation})"]
    return ", ".join(parts)


# ---- pictures that are no JPEG file any more


def _assumed(
    picture: Picture, quality: int
) -> tuple[list[Coefficients], list[np.ndarray], tuple[tuple[int, int], ...], str]:
    """Coefficients, steps and factors under libjpeg's tables, blocks from the top left, and the better sampling."""
    luma, chroma = standard_tables(quality)
    values = picture.values[0].double().numpy() * 255
    if picture.grey:
        candidates = {"grey": ((1, 1),)}
        planes, steps = values, [luma]
    else:
        candidates = {"4:2:0": ((1, 1), (2, 2), (2, 2)), "4:4:4": ((1, 1),) * 3}
        planes, steps = np.einsum("pc,chw->phw", np.array(YCBCR), values), [luma, chroma, chroma]
    found = {}
    for name, factors in candidates.items():
        cut = [_plane_coefficients(*part) for part in zip(planes, factors, (128, 0, 0))]
        misfits = [_misfit(c, s) for c, s in zip(cut, steps)]
        found[name] = cut, factors, misfits
    name = min(found, key=lambda n: sum(found[n][2]))
    cut, factors, misfits = found[name]
    if misfits[0] > MISFIT:
        warnings.warn(
            f"the picture does not look like a JPEG of quality {quality} with blocks from its top left corner: it was "
            "cut, resized or changed since, or had another quality; its blocks are taken as they should have been"
        )
    snapped = [_snap(c, s, picture.size, f) for c, s, f in zip(cut, steps, factors)]
    note = f"assumed: quality {quality}, standard tables, {name}, blocks from the top left corner"
    return snapped, steps, factors, note


def _plane_coefficients(plane: np.ndarray, factors: tuple[int, int], level: int) -> np.ndarray:
    for axis, factor in enumerate(factors):
        plane = shrink(plane, factor, axis)
    missing = [(0, -n % BLOCK) for n in plane.shape]
    return block_dct(blocks_of(np.pad(plane, missing, mode="edge") - level))


def _misfit(coefficients: np.ndarray, steps: np.ndarray) -> float:
    k = coefficients / steps
    distance = np.abs(k - np.rint(k))[np.abs(k) > 0.5]
    return float(distance.mean()) if distance.size else 0.0


def _snap(
    values: np.ndarray, steps: np.ndarray, size: tuple[int, int], factors: tuple[int, int]
) -> Coefficients:
    """Multiples of the steps where the pixels leave no doubt; elsewhere the values as they are, and how sure."""
    k = np.rint(values / steps) * steps
    distance = np.sqrt(((values - k) ** 2).mean((-2, -1)))
    whole = [np.arange(n) < s // f // BLOCK for n, s, f in zip(values.shape, size, factors)]
    complete = whole[0][:, None] & whole[1]  # of the others only a part of the pixels is there
    sure = (complete & (distance < ON_GRID))[..., None, None]
    spread = np.maximum(distance[..., None, None], ROUNDING)
    error = np.where(sure, ROUNDING, np.where(complete[..., None, None], spread, steps / 2))
    return Coefficients(np.where(sure, k, values), error)
