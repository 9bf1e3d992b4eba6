"""TIFF kinds that PIL does not read, or cuts to eight bits: colour of 16 bits, and floating point of any kind.

The layout (byte order, strips, tiles, planes, predictors) is undone by tifffile, compression by libtiff through PIL: it
stops at the size that the header names, and has LZW, for which tifffile needs one more package.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from invguide.errors import InputError
from invguide.images.keepsakes import Keepsakes, keepsakes_of

_KINDS = {
    1: "unsigned integers",
    2: "signed integers",
    3: "floating point",
    5: "complex",
    6: "complex",
}
_COMPRESSIONS = {1, 5, 8, 32773, 32946, 34925, 50000}  # none, LZW, deflate, PackBits, LZMA, Zstd
_HEAD = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
_ASSOCIATED = 1  # alpha by which the colours are multiplied


@dataclass(frozen=True)
class Tiff:
    """The first page of a file: pixels (H, W, C), uint16 or float32, alpha last, and what else it tells."""

    array: np.ndarray
    bits: int
    pages: int
    profile: bytes | None
    orientation: int
    kept: Keepsakes


def read_tiff(path: Path, check_size: Any) -> Tiff | None:
    """Read a TIFF of a kind that is not for PIL; None for all other files, damaged ones too.

    Args:
        path: Of a regular file.
        check_size: Called with (width, height, path) before memory is taken.

    Raises:
        InputError: A kind that cannot be read.
        ValueError: A damaged file.
    """
    from PIL import Image

    try:
        return _read(path, check_size)
    except (InputError, OSError, Image.DecompressionBombError):
        raise
    except Exception as error:  # tifffile has as many as there are ways to damage a file
        raise ValueError(" ".join(str(error).split())) from error


def _read(path: Path, check_size: Any) -> Tiff | None:
    with _first_page(path) as (tiff, page):
        if page is None or _for_pil(page):
            return None
        _check_kind(page, path)
        check_size(page.imagewidth, page.imagelength, path)
        array = _pixels(page, path, check_size)
        profile = page.tags.valueof(34675)
        resolution = page.get_resolution("inch") if 282 in page.tags else None
        return Tiff(
            array,
            16 if array.dtype == np.uint16 else 32,
            len(tiff.pages),
            profile if isinstance(profile, bytes) else None,
            int(page.tags.valueof(274, 1)),
            keepsakes_of(_exif(path), resolution),
        )


def tiff_kind(path: Path) -> str:
    """In words what a TIFF holds, and as what to save it; empty where it is none, or told nothing by its header."""
    with _first_page(path) as (_, page):
        return "" if page is None else _words(page)


def _words(page: Any) -> str:
    channels, bits = page.samplesperpixel, page.bitspersample
    bits = bits[0] if isinstance(bits, tuple) else bits
    form = _KINDS.get(page.sampleformat or 1, "numbers of an unknown kind")
    kind = f"{channels} channel{'' if channels == 1 else 's'} of {bits}-bit {form}"
    if channels > 4:
        return f"{kind}; expected 1 to 4: save the channels that are a picture"
    if page.photometric not in (1, 2):
        name = getattr(page.photometric, "name", page.photometric)
        return f"{kind}, {name}; save it as grey or RGB"
    if page.compression not in _COMPRESSIONS or page.fillorder != 1:
        name = getattr(page.compression, "name", page.compression)
        return f"{kind}, compressed as {name}; save it with deflate, or without compression"
    if not _predictor_is_known(page):
        return f"{kind}, as differences of parts of them; save it without a predictor, or pip install imagecodecs"
    return f"{kind}; save it as 8 or 16 bit without sign, or as 32-bit floating point"


@contextmanager
def _first_page(path: Path) -> Iterator[tuple[Any, Any]]:
    """The opened file and its first page; (None, None) for what is no TIFF, or not whole enough to be one."""
    with path.open("rb") as file:
        if file.read(4) not in _HEAD:
            yield None, None
            return
    import tifffile

    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # faults are said here
    try:
        tiff = tifffile.TiffFile(path)
    except Exception:  # of the many that a damaged header makes; PIL says which it is
        yield None, None
        return
    with tiff:
        try:
            page = tiff.pages.first
        except Exception:
            page = None
        yield tiff, page


def _for_pil(page: Any) -> bool:
    """Eight bits and fewer, and grey of all kinds that PIL has modes for."""
    bits, form, channels = page.bitspersample, page.sampleformat or 1, page.samplesperpixel
    if isinstance(bits, tuple) or bits <= 8 or page.photometric not in (0, 1, 2, 5):
        return True  # what PIL does not know of these is named by `tiff_kind`
    return channels == 1 and ((bits in (12, 16, 32) and form in (1, 2)) or (bits, form) == (32, 3))


def _predictor_is_known(page: Any) -> bool:
    """Those of integers always; that of floating point where imagecodecs is installed."""
    import tifffile

    try:
        return bool(tifffile.TIFF.UNPREDICTORS[page.predictor])
    except KeyError:
        return False


def _check_kind(page: Any, path: Path) -> None:
    numbers = (page.sampleformat or 1, page.bitspersample)
    known = numbers in {(1, 16), (3, 16), (3, 32), (3, 64)} and page.samplesperpixel <= 4
    stored = page.compression in _COMPRESSIONS and page.fillorder == 1
    stored = stored and _predictor_is_known(page)
    if not known or not stored or page.photometric not in (1, 2) or page.imagedepth != 1:
        raise InputError(f"{path} is a TIFF of a kind that cannot be read: {_words(page)}")


def _pixels(page: Any, path: Path, check_size: Any) -> np.ndarray:
    """(H, W, C); C = 2 and 4 have alpha last."""
    array = np.moveaxis(_stored(page, path, check_size), 0, -2)[0]  # (H, W, planes, channels)
    array = array.reshape(*array.shape[:2], -1)
    top = 65535 if array.dtype == np.uint16 else 1
    extra = next(reversed(tuple(page.extrasamples or ())), 0)  # of the last channel
    if array.shape[-1] in (2, 4) and extra not in (1, 2):
        warnings.warn(f"{path}: its last channel is said to be no opacity; it is left out")
        array = array[..., :-1]
    elif array.shape[-1] in (2, 4) and extra == _ASSOCIATED:
        alpha = array[..., -1:].astype(np.float64)
        colour = array[..., :-1] * (top / np.where(alpha > 0, alpha, top))
        colour = np.rint(colour.clip(0, top)) if top > 1 else colour
        array = np.concatenate([colour, alpha], -1)
    if array.shape[-1] == 2 and page.photometric == 2:
        raise InputError(f"{path} is said to be RGB, and has two channels")
    return array.astype(np.uint16 if top > 1 else np.float32)


def _stored(page: Any, path: Path, check_size: Any) -> np.ndarray:
    """(planes, 1, H, W, channels) as stored, filled segment by segment."""
    if page.is_tiled:  # strips are no larger than the picture
        check_size(page.tilewidth, page.tilelength, path)
    compression, page.compression = int(page.compression), 1  # `decode` is asked for the layout
    total = math.prod(page.chunked)
    if min(len(page.dataoffsets), len(page.databytecounts)) < total:
        raise ValueError("pieces of the picture are missing")
    out = np.empty(page.shaped, page.dtype)
    with path.open("rb") as file:
        for index in range(total):
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
            _, _, shape = page.decode(None, index)
            size = math.prod(shape) * out.itemsize
            if compression != 1:
                data = _decompressed(data, compression, size)
            if len(data) < size:
                raise ValueError(f"piece {index + 1} of {total} is cut off")
            segment, (plane, _, row, column, _), _ = page.decode(data[:size], index)
            place = out[plane, 0, row : row + shape[1], column : column + shape[2]]
            place[:] = segment[0, : place.shape[0], : place.shape[1]]
    return out


def _decompressed(data: bytes, compression: int, size: int) -> bytes:
    """So many bytes, read as one row of a grey picture."""
    from PIL import Image

    tags = {256: size, 257: 1, 258: 8, 259: compression, 262: 1, 273: 0, 277: 1, 278: 1}
    tags[279] = len(data)
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bytes, and not pixels
        with Image.open(io.BytesIO(head + bytes(4) + data), formats=["TIFF"]) as image:
            return image.tobytes()


def _exif(path: Path) -> Any:
    """The tags of the file; those of the exposure are read before it is closed."""
    from PIL import Image

    found = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.load(path.read_bytes())
    except Exception:  # they say nothing about the pixels
        return Image.Exif()
    return found


def write_float_tiff(
    path: Path, pixels: np.ndarray, profile: bytes | None, kept: Keepsakes
) -> None:
    """Write (H, W, C) as 32-bit floating point, C = 1 to 4 with alpha last."""
    import tifffile

    channels = pixels.shape[-1]
    options: dict[str, Any] = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    if kept.dpi is not None:
        options |= {"resolution": kept.dpi, "resolutionunit": "inch"}
    tifffile.imwrite(
        path,
        pixels[..., 0].astype(np.float32) if channels == 1 else pixels.astype(np.float32),
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        iccprofile=profile,
        metadata=None,
        software=False,
        **options,
    )
