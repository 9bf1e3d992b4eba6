"""Pictures in and out: any size, grey or colour, with or without alpha, 8 or 16 bits, given back in kind."""

from __future__ import annotations

import dataclasses
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invguide.errors import InputError
from invguide.images import profiles
from invguide.images.keepsakes import Keepsakes, keepsakes
from invguide.images.picture_files import check_regular, check_size, open_picture
from invguide.images.tiff_file import read_tiff

if TYPE_CHECKING:
    from PIL.Image import Image

# Luminance quantisation of JPEG at quality 50 (ITU-T T.81, table K.1).
_JPEG_LUMA = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87
80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72
92 95 98 112 100 103 99
"""
ORIENTATION = 0x0112  # the EXIF tag
_UNEVEN = ("WEBP", "AVIF")  # formats whose decoders round each channel of a grey pixel its own way
_SIXTEEN_BIT_GREY = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass
class Picture:
    """A picture as numbers, and all that is needed to give a result back in kind.

    Attributes:
        values: (1, C, H, W), float32 in [0, 1], C = 1 (grey) or 3 (colour).
        alpha: Opacity as stored, (H, W) uint8, uint16 or float32; None where there is none.
        bits: 8, 16, or 32 for floating point.
        profile: ICC colour profile that fits what is stored, passed on untouched.
        jpeg_quality: Of the file, where it is a JPEG with the usual tables.
        rgb: A grey picture is stored as colour, with R = G = B; it is written so again.
        path: Of the file.
        holes: (H, W) booleans, where the file holds NaN or infinity; None: nowhere.
        kept: What else the file tells, and results pass on.
    """

    values: Tensor
    alpha: np.ndarray | None = None
    bits: int = 8
    profile: bytes | None = None
    jpeg_quality: int | None = None
    rgb: bool = False
    path: Path | None = None
    holes: np.ndarray | None = None
    kept: Keepsakes = dataclasses.field(default_factory=Keepsakes)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.values.shape[-2], self.values.shape[-1]

    @property
    def grey(self) -> bool:
        return self.values.shape[1] == 1

    @property
    def suffix(self) -> str:
        """PNG is lossless and holds every kind but floating point."""
        return ".tiff" if self.bits == 32 else ".png"

    def describe(self) -> str:
        """Return such as '640 x 480 pixels, colour with alpha, 16 bit'."""
        kind = "colour" if not self.grey else "grey as R = G = B" if self.rgb else "grey"
        kind += " with alpha" if self.alpha is not None else ""
        return f"{self.size[1]} x {self.size[0]} pixels, {kind}, {self.bits} bit"


def read_picture(path: str | Path, holes: bool = False) -> Picture:
    """Read a picture upright (EXIF orientation applied); a palette becomes colour or grey, the first frame is taken.

    Colours that are the same in all visible pixels, R = G = B, are read as grey. CMYK and Lab become sRGB.

    Args:
        path: Of the file.
        holes: Pixels that are not finite are allowed: they are zeros, and `Picture.holes` says where they are.

    Raises:
        InputError: A missing or damaged file, one that is no picture, or one with values that are not finite.
    """
    from PIL import Image

    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            stored = _read(path)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except PermissionError:
        raise InputError(f"{path} cannot be opened: permission denied") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels; cut it up first"
        ) from None
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {error}") from error
    found = None
    if holes and stored.bits == 32:
        finite = np.isfinite(stored.array).all(-1)
        found = None if finite.all() else ~finite
        stored.array = np.where(np.isfinite(stored.array), stored.array, 0)
    return dataclasses.replace(_picture(stored, path), holes=found)


@dataclass
class _Stored:
    """What is in a file, upright: pixels (H, W, C), alpha last where C is 2 or 4."""

    array: np.ndarray
    bits: int
    profile: bytes | None
    kept: Keepsakes
    quality: int | None = None
    uneven: bool = False


def _read(path: Path) -> _Stored:
    check_regular(path)
    tiff = read_tiff(path, check_size)
    if tiff is not None:
        _tell_frames(path, tiff.pages)
        return _Stored(_upright(tiff.array, tiff.orientation), tiff.bits, tiff.profile, tiff.kept)
    with open_picture(path) as image:
        quality = _jpeg_quality(image)
        _tell_frames(path, getattr(image, "n_frames", 1))
        profile = image.info.get("icc_profile")
        pixels = image
        if image.mode in profiles.FOREIGN:
            pixels, profile = profiles.to_srgb(image, profile, path)
        array, bits = _pixels(pixels, path)
        kept = keepsakes(image)
        # Asked for after loading: PIL turns TIFF upright itself, and then forgets the tag.
        array = _upright(array, image.getexif().get(ORIENTATION, 1))
        return _Stored(array, bits, profile, kept, quality, image.format in _UNEVEN)


def _tell_frames(path: Path, count: int) -> None:
    if count > 1:
        warnings.warn(f"{path} has {count} frames; the first is taken")


def _picture(stored: _Stored, path: Path) -> Picture:
    array, bits = stored.array, stored.bits
    if bits == 32:
        _check_floats(array, path)
    alpha = array[..., -1] if array.shape[-1] in (2, 4) else None
    colour = array if alpha is None else array[..., :-1]
    profile = profiles.checked(stored.profile, colour.shape[-1], path)
    rgb = colour.shape[-1] == 3 and _neutral(colour, alpha, 1 if stored.uneven else 0)
    colour = np.sort(colour, -1)[..., 1:2] if rgb else colour
    scale = {8: 255, 16: 65535, 32: 1}[bits]
    values = torch.from_numpy(
        np.ascontiguousarray(colour.transpose(2, 0, 1))[None].astype(np.float32)
    )
    return Picture(
        values / scale, alpha, bits, profile, stored.quality, rgb, path, kept=stored.kept
    )


def _neutral(colour: np.ndarray, alpha: np.ndarray | None, tolerance: int) -> bool:
    """Whether R = G = B, to within a tolerance, wherever anything is seen. JPEG without chroma decodes so exactly."""
    equal = colour.max(-1) - colour.min(-1) <= tolerance
    return bool(equal.all() if alpha is None or not alpha.any() else equal[alpha > 0].all())


def _check_floats(colour: np.ndarray, path: Path) -> None:
    bad = ~np.isfinite(colour)
    if bad.any():
        row, column = np.argwhere(bad)[0][:2]
        raise InputError(
            f"{path} has {int(bad.sum())} NaN or infinite values (first at row {row}, column {column}); every value "
            f"must be finite: leave unknown pixels out with --task inpaint and a mask"
        )
    if colour.min() < -0.5 or colour.max() > 1.5:
        raise InputError(
            f"{path} is floating point with values from {colour.min():g} to {colour.max():g}; expected 0 to 1: "
            f"rescale it"
        )


def _pixels(image: Image, path: Path) -> tuple[np.ndarray, int]:
    """Return (H, W, C) with C = 1, 2, 3 or 4 (alpha last), and the bits."""
    mode = image.mode
    if mode in _SIXTEEN_BIT_GREY:
        return np.asarray(image).astype(np.uint16)[..., None], 16
    if mode == "I":
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise InputError(
                f"{path} has integers from {array.min()} to {array.max()}; expected 0 to 65535, 8 or 16 bits without "
                "sign: shift and scale them first"
            )
        return array.astype(np.uint16)[..., None], 16
    if mode == "F":
        return np.asarray(image)[..., None], 32
    if mode in ("RGB", "RGBA", "RGBX", "LA") and _stored_with_16_bits(image):
        return _sixteen_bit_colour(image, path), 16
    if mode == "P":
        mode = "RGBA" if "transparency" in image.info else "RGB"
        image = image.convert(mode)
        array = np.asarray(image)
        # With a profile, which is for RGB, it stays three channels.
        grey = mode == "RGB" and "icc_profile" not in image.info
        if grey and (array[..., :1] == array).all():
            return array[..., :1], 8
        return array, 8
    if mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("LA" if mode == "L" else "RGBA")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        simpler = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
        image = image.convert(simpler.get(mode, "RGB"))
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None], 8


def _rawmode(image: Image) -> str:
    if not getattr(image, "tile", None):
        return ""
    argument: Any = image.tile[0][3]  # pyright: ignore[reportAttributeAccessIssue]
    return str(argument[0] if isinstance(argument, tuple) else argument)


def _stored_with_16_bits(image: Image) -> bool:
    return ";16" in _rawmode(image)


def _sixteen_bit_colour(image: Image, path: Path) -> np.ndarray:
    """PIL would keep the upper eight bits of each channel."""
    if image.format == "PNG":
        return _decode_png16(path.read_bytes(), path)
    raise InputError(f"{path}: 16-bit colour of this kind cannot be read; save it as PNG first")


def _decode_png16(data: bytes, path: Path) -> np.ndarray:
    """Return (H, W, C) uint16; the filters are undone along diagonals, on which no pixel needs another."""
    width, height, _, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if interlaced:
        raise InputError(
            f"{path}: 16-bit colour that is interlaced cannot be read; save it without interlacing"
        )
    channels = {2: 3, 4: 2, 6: 4}[kind]
    position, parts = 8, []
    while position + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[position : position + 8])
        if name == b"IDAT":
            parts.append(data[position + 8 : position + 8 + length])
        position += length + 12
    step = 2 * channels
    rows = np.frombuffer(zlib.decompress(b"".join(parts)), np.uint8).reshape(height, -1)
    filters, raw = (
        rows[:, 0].astype(np.int64),
        rows[:, 1:].reshape(height, width, step).astype(np.int64),
    )
    done = np.zeros(
        (height + 1, width + 1, step), np.int64
    )  # with a row above and a column to the left
    for diagonal in range(height + width - 1):
        r = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        c = diagonal - r
        left, above, corner = done[r + 1, c], done[r, c + 1], done[r, c]
        guess = left + above - corner
        to_left, to_above, to_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
        nearest = np.where(to_above <= to_corner, above, corner)
        paeth = np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest)
        choices = [np.zeros_like(left), left, above, (left + above) // 2, paeth]
        done[r + 1, c + 1] = (raw[r, c] + np.choose(filters[r, None], choices)) & 255
    pairs = done[1:, 1:].reshape(height, width, channels, 2)
    return (pairs[..., 0] * 256 + pairs[..., 1]).astype(np.uint16)


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the EXIF orientation 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _jpeg_quality(image: Image) -> int | None:
    """Return the quality whose standard luminance table is the file's, or None."""
    tables = getattr(image, "quantization", None)
    if image.format != "JPEG" or not tables:
        return None
    found = np.sort(np.asarray(tables[min(tables)], dtype=np.float64))
    qualities = np.arange(1, 101)
    scale = np.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)
    standard = np.clip(
        (np.sort(np.array(_JPEG_LUMA.split(), np.int64))[None] * scale[:, None] + 50) // 100,
        1,
        255,
    )
    error = np.abs(standard - found).mean(1)
    best = int(error.argmin())
    return int(qualities[best]) if error[best] <= 0.5 else None


# ---- writing
