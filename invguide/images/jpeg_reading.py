"""The coefficients that a JPEG file stores, read through Pillow alone.

Pillow gives pixels, rounded and cut off to 0 ... 255. But a file whose tables are overwritten decodes to the bare
integers k in place of k times their step: a step of 8 is more than the rounding of 64 pixels can hide, so that k is
known for certain wherever no pixel was cut off.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from typing import NamedTuple

import numpy as np

from invguide.images.jpeg_file import BLOCK, FRAMES, ZIGZAG, JPEGFile, segments, tables_of

# Of 8-bit pixels that are rounded, in their own units; a block's DCT is orthonormal and keeps it.
ROUNDING = 12**-0.5
# The DCT of 64 rounding errors of at most 1/2 each is at most 4 (Cauchy), half of this step. Where a plane was enlarged
# by 2, `shrink` makes 64 values of 128 errors, and its least singular value is 1 / sqrt(2): at most 8, twice as much.
PROBE_STEP = 8
# So near to 0 or 255 a pixel may have been cut off; more than 0, since the inverse of an enlargement is not exact.
CUT_OFF = 1.5


class Coefficients(NamedTuple):
    """The coefficients of one plane, on the scale of 8-bit pixels with an orthonormal DCT; grey 128 is 0.

    Every value was within half a step of `values`, but for errors of standard deviation `error` (rounding to eight
    bits in the encoder, and here where a coefficient could not be read exactly).
    """

    values: np.ndarray  # (rows, columns, 8, 8)
    error: np.ndarray  # the same shape


def read_coefficients(file: JPEGFile) -> list[Coefficients]:
    """Return the coefficients of every plane."""
    found: dict[int, Coefficients] = {}
    for factors in dict.fromkeys(file.factors):
        chosen = [i for i, those in enumerate(file.factors) if those == factors]
        found |= zip(chosen, _read_planes(file, chosen, min(factors)))
    return [found[i] for i in range(len(file.components))]


def _read_planes(file: JPEGFile, chosen: list[int], scale: int) -> list[Coefficients]:
    """Read the planes that a decoder of 1/scale of the size gives as they are stored."""
    plain = _decode(file, chosen, scale, None)
    frequency = np.indices((BLOCK, BLOCK)).sum(0)
    constant, changing = _probe(file, chosen, scale, frequency == 0, frequency > 0)
    # Blocks of much contrast are cut off even so; in four parts by symmetry there is less of it in each.
    if not all(sure.all() for _, sure in changing):
        rows, columns = np.indices((BLOCK, BLOCK)) % 2
        quarters = [(rows == r) & (columns == c) & (frequency > 0) for r in (0, 1) for c in (0, 1)]
        parts = _probe(file, chosen, scale, *quarters)
        changing = [
            (
                np.where(sure[..., None, None], k, sum(part[i][0] for part in parts)),
                sure | np.logical_and.reduce([part[i][1] for part in parts]),
            )
            for i, (k, sure) in enumerate(changing)
        ]
    return [
        _combine(file.components[i].table, plain[n], constant[n], changing[n])
        for n, i in enumerate(chosen)
    ]


Probe = list[
    tuple[np.ndarray, np.ndarray]
]  # of each plane: integers k, and whether a block's are certain


def _probe(file: JPEGFile, chosen: list[int], scale: int, *masks: np.ndarray) -> list[Probe]:
    enlarged = any(factor > scale for i in chosen for factor in file.factors[i])
    step = PROBE_STEP * (2 if enlarged else 1)
    found: list[Probe] = []
    for mask in masks:
        planes = _decode(file, chosen, scale, mask * step)
        blocks = [blocks_of(plane) for plane in planes]
        found.append(
            [
                (
                    np.rint(block_dct(b - 128) / step) * mask,
                    np.all((b > CUT_OFF) & (b < 255 - CUT_OFF), axis=(-2, -1)),
                )
                for b in blocks
            ]
        )
    return found


def _combine(
    steps: np.ndarray,
    plain: np.ndarray,
    constant: tuple[np.ndarray, np.ndarray],
    changing: tuple[np.ndarray, np.ndarray],
) -> Coefficients:
    """The certain integers times their steps; elsewhere the DCT of the decoded plane, with its rounding."""
    decoded = block_dct(blocks_of(plain) - 128)
    values, error = decoded.copy(), np.full(decoded.shape, 2**0.5 * ROUNDING)
    # All pixels of a flat block are rounded alike, so that its mean is as uncertain as one pixel.
    error[..., 0, 0] = BLOCK * ROUNDING
    (dc, dc_sure), (ac, ac_sure) = constant, changing
    sure = np.broadcast_to(ac_sure[..., None, None], decoded.shape).copy()
    sure[..., 0, 0] = dc_sure
    values[sure] = ((dc + ac) * steps)[sure]
    error[sure] = ROUNDING
    return Coefficients(values, error)


def _decode(
    file: JPEGFile, chosen: list[int], scale: int, table: np.ndarray | None
) -> list[np.ndarray]:
    """Planes of whole blocks (rows * 8, columns * 8), 0 to 255, of some components; under another table if given."""
    from PIL import Image

    v, h = file.finest
    # Whole blocks of the planes asked for. Larger sizes would break the scans of a progressive file's finer planes,
    # which are of no interest then.
    down, across = (BLOCK * max(file.factors[i][axis] for i in chosen) for axis in (0, 1))
    if not file.progressive:
        down, across = BLOCK * v, BLOCK * h
    size = math.ceil(file.size[0] / down) * down, math.ceil(file.size[1] / across) * across
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(_rewritten(file, size, table))) as image:
            mode = {"grey": "L", "rgb": "RGB", "ycbcr": "YCbCr"}[file.colour]
            image.draft(mode, (size[1] // scale, size[0] // scale))  # pyright: ignore[reportAttributeAccessIssue]
            pixels = np.asarray(image).astype(np.float64)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    planes = []
    for i in chosen:
        plane = pixels[..., i]
        for axis, factor in enumerate(file.factors[i]):
            plane = shrink(plane, factor // scale, axis)
        rows, columns = (
            BLOCK * math.ceil(math.ceil(n / f) / BLOCK) for n, f in zip(file.size, file.factors[i])
        )
        planes.append(plane[:rows, :columns])
    return planes


def _rewritten(file: JPEGFile, size: tuple[int, int], table: np.ndarray | None) -> bytes:
    """The file with another size and, if given, another table (8, 8) for every plane; without metadata."""
    data = bytearray(file.data)
    kept, position = bytearray(), 0
    for marker, start, stop in segments(file.data):
        if marker == 0xDB and table is not None:
            for _, _, first, width in tables_of(file.data, start, stop):
                values = table.reshape(-1)[ZIGZAG].astype(">u1" if width == 1 else ">u2")
                data[first : first + 64 * width] = values.tobytes()
        elif marker in FRAMES:
            data[start + 1 : start + 5] = struct.pack(">HH", *size)
        elif (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE:
            kept += data[position : start - 4]
            position = stop
    return bytes(kept + data[position:])


def shrink(plane: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """Undo the enlargement of a decoder along one axis: repeated values, or those of libjpeg's triangle.

    The triangle gives 3/4 of the nearest value and 1/4 of the next one on each side, the outermost value repeated;
    the values are the least-squares solution, since pixels are rounded.
    """
    if factor == 1:
        return plane
    x = np.moveaxis(plane, axis, 0)
    parts = [x[j::factor] for j in range(factor)]
    short = min(len(part) for part in parts)
    repeated = all(np.array_equal(parts[0][:short], part[:short]) for part in parts[1:])
    if factor != 2 or repeated:
        return np.moveaxis(parts[0], 0, axis)
    from scipy.linalg import solveh_banded
    from scipy.sparse import csr_matrix

    n, row = -(-len(x) // 2), np.arange(len(x))
    near = row // 2
    other = (near + np.where(row % 2, 1, -1)).clip(0, n - 1)
    weights = np.repeat([0.75, 0.25], len(x))
    triangle = csr_matrix((weights, (np.tile(row, 2), np.concatenate([near, other]))), (len(x), n))
    gram = triangle.T @ triangle
    band = np.stack([np.append(0, gram.diagonal(1)), gram.diagonal()])
    flat = x.reshape(len(x), -1)
    found = solveh_banded(band, triangle.T @ flat).reshape(n, *x.shape[1:])
    return np.moveaxis(found, 0, axis)


def blocks_of(plane: np.ndarray) -> np.ndarray:
    """(rows * 8, columns * 8) -> (rows, columns, 8, 8)."""
    height, width = plane.shape
    split = plane.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return split.swapaxes(1, 2)


def block_dct(blocks: np.ndarray) -> np.ndarray:
    """Orthonormal DCT-II of the last two axes."""
    from scipy.fft import dctn

    return np.asarray(dctn(blocks, axes=(-2, -1), norm="ortho"))
