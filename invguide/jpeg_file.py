"""What a JPEG file stores: its quantisation tables, chroma sampling, and the coefficients, read through Pillow alone.

Pillow gives pixels, rounded and cut off to 0 ... 255. But a file whose tables are overwritten decodes to the bare
integers k in place of k times their step: a step of 8 is more than the rounding of 64 pixels can hide, so that k is
known for certain wherever no pixel was cut off.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from invguide.errors import InputError

BLOCK = 8
ORIENTATION = 0x0112  # the EXIF tag
# Of 8-bit pixels that are rounded, in their own units; a block's DCT is orthonormal and keeps it.
ROUNDING = 12**-0.5
# The DCT of 64 rounding errors of at most 1/2 each is at most 4 (Cauchy), half of this step. Where a plane was enlarged
# by 2, `shrink` makes 64 values of 128 errors, and its least singular value is 1 / sqrt(2): at most 8, twice as much.
PROBE_STEP = 8
# So near to 0 or 255 a pixel may have been cut off; more than 0, since the inverse of an enlargement is not exact.
CUT_OFF = 1.5
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class Component(NamedTuple):
    """One plane of a JPEG file."""

    sampling: tuple[int, int]  # vertical, horizontal; larger is finer
    table: np.ndarray  # (8, 8) steps, rows are vertical frequencies


@dataclass(frozen=True)
class JPEGFile:
    """A JPEG file without its pixels.

    Attributes:
        data: The first picture of the file, up to its end marker.
        size: (height, width) as stored.
        colour: "grey", "ycbcr", or "rgb" (no colour transform).
        components: One of grey, else three.
        orientation: EXIF, 1 to 8: how the stored picture is turned upright.
        progressive: Stored in several scans.
    """

    data: bytes
    size: tuple[int, int]
    colour: str
    components: tuple[Component, ...]
    orientation: int
    progressive: bool

    @property
    def finest(self) -> tuple[int, int]:
        """(vertical, horizontal) sampling of the finest plane."""
        return (
            max(c.sampling[0] for c in self.components),
            max(c.sampling[1] for c in self.components),
        )

    @property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """How many pixels (down, across) share one value of each plane."""
        v, h = self.finest
        return tuple((v // c.sampling[0], h // c.sampling[1]) for c in self.components)

    @property
    def subsampling(self) -> str:
        """Return such as "4:2:0"; "grey" for one plane."""
        if len(self.components) == 1:
            return "grey"
        names = {(1, 1): "4:4:4", (1, 2): "4:2:2", (2, 2): "4:2:0", (2, 1): "4:4:0"}
        names |= {(1, 4): "4:1:1", (2, 4): "4:1:0"}
        luma, *chroma = self.factors
        plain = luma == (1, 1) and chroma[0] == chroma[1]
        text = " ".join(f"{v}x{h}" for v, h in self.factors)
        return names.get(chroma[0], text) if plain else text


class Coefficients(NamedTuple):
    """The coefficients of one plane, on the scale of 8-bit pixels with an orthonormal DCT; grey 128 is 0.

    Every value was within half a step of `values`, but for errors of standard deviation `error` (rounding to eight
    bits in the encoder, and here where a coefficient could not be read exactly).
    """

    values: np.ndarray  # (rows, columns, 8, 8)
    error: np.ndarray  # the same shape


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def parse_jpeg(data: bytes, name: str = "the file") -> JPEGFile:
    """Read the headers of a JPEG file; `name` it in errors.

    Raises:
        InputError: CMYK, or a way of sampling or coding that Pillow's decoder or this model does not know.
    """
    tables: dict[int, np.ndarray] = {}
    frame: bytes | None = None
    kind, jfif, adobe = 0, False, None
    end = len(data)
    for marker, start, stop in _segments(data):
        body = data[start:stop]
        if marker == 0xDB:
            tables |= {t: table for t, table, _, _ in _tables(data, start, stop)}
        elif marker in _SIZES:
            frame, kind = body, marker
        elif marker == 0xE0 and body[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xD9:
            end = stop
            break
    if frame is None:
        raise InputError(f"{name} is damaged: a JPEG file without a frame header")
    bits, height, width, count = struct.unpack(">BHHB", frame[:6])
    if count not in (1, 3) or bits != 8:
        raise InputError(
            f"{name} is a JPEG of {count} components and {bits} bits; expected grey or three colours of 8 bits: "
            "convert it first, or use --task denoise"
        )
    parts = [frame[6 + 3 * i : 9 + 3 * i] for i in range(count)]
    try:
        found = [Component((p[1] & 15, p[1] >> 4), tables[p[2]]) for p in parts]
    except (KeyError, IndexError):
        raise InputError(f"{name} is damaged: a JPEG plane without quantisation table") from None
    if count == 1:
        found = [found[0]._replace(sampling=(1, 1))]  # of one plane it says nothing
    identifiers = bytes(p[0] for p in parts)
    colour = "grey" if count == 1 else _colour(identifiers, jfif, adobe)
    file = JPEGFile(
        data[:end], (height, width), colour, tuple(found), _orientation(data), kind != 0xC0
    )
    v, h = file.finest
    if any(v % c.sampling[0] or h % c.sampling[1] for c in found):
        raise InputError(
            f"{name} samples its planes {[c.sampling for c in found]} (down, across), which do not divide each other; "
            "save it as PNG and use --task denoise"
        )
    return file


def _colour(identifiers: bytes, jfif: bool, adobe: int | None) -> str:
    """The rule of libjpeg: what JFIF and Adobe say, else the names of the planes."""
    if jfif:
        return "ycbcr"
    if adobe is not None:
        return "rgb" if adobe == 0 else "ycbcr"
    return "rgb" if identifiers == b"RGB" else "ycbcr"


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, stop) of the contents of each marker segment up to the end of the first picture."""
    found, position = [], 2
    while match := _NEXT_MARKER.search(data, position):
        marker, start = data[match.end() - 1], match.end()
        if marker == 0xD9:
            found.append((marker, start, start))
            break
        if marker == 0x01 or start + 2 > len(data):
            position = start
            continue
        (length,) = struct.unpack(">H", data[start : start + 2])
        found.append((marker, start + 2, start + length))
        position = start + length
    return found


def _tables(data: bytes, start: int, stop: int) -> list[tuple[int, np.ndarray, int, int]]:
    """(number, steps (8, 8), where its values start, bytes per value) of each table of a DQT segment."""
    found = []
    while start < stop:
        width = 1 + (data[start] >> 4)
        values = np.frombuffer(
            data[start + 1 : start + 1 + 64 * width], ">u1" if width == 1 else ">u2"
        )
        table = np.empty(64, np.float64)
        table[ZIGZAG] = values
        found.append((data[start] & 15, table.reshape(BLOCK, BLOCK), start + 1, width))
        start += 1 + 64 * width
    return found


def _zigzag() -> np.ndarray:
    """Position (row * 8 + column) of the n-th coefficient as it is stored."""
    cells = [(r, c) for r in range(BLOCK) for c in range(BLOCK)]
    cells.sort(key=lambda rc: (sum(rc), rc[0] if sum(rc) % 2 else rc[1]))
    return np.array([r * BLOCK + c for r, c in cells])


ZIGZAG = _zigzag()


def _orientation(data: bytes) -> int:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


# ---- coefficients


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
    for marker, start, stop in _segments(file.data):
        if marker == 0xDB and table is not None:
            for _, _, first, width in _tables(file.data, start, stop):
                values = table.reshape(-1)[ZIGZAG].astype(">u1" if width == 1 else ">u2")
                data[first : first + 64 * width] = values.tobytes()
        elif marker in _SIZES:
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


def standard_tables(quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (8, 8) steps of luma and chroma that libjpeg uses at this quality, 1 to 100."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (BLOCK, BLOCK)).save(buffer, "JPEG", quality=quality)
    luma, chroma, _ = parse_jpeg(buffer.getvalue()).components
    return luma.table, chroma.table
