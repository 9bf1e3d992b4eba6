"""What a picture file tells besides its pixels and colours: the camera, the date, the resolution of prints."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# What describes the scene. Tags of how the file is stored (sizes, strips, thumbnails, orientation) would be wrong.
_DESCRIBE = (
    0x010E,
    0x010F,
    0x0110,
    0x0131,
    0x0132,
    0x013B,
    0x8298,
)  # title, camera, program, date, artist, rights
_PARTS = (0x8769, 0x8825)  # of the exposure, of the place
_STORED = (
    0x927C,
    0xA002,
    0xA003,
    0xA005,
)  # notes of the maker with offsets inside, sizes, interoperability


@dataclass(frozen=True)
class Keepsakes:
    """What results pass on.

    Attributes:
        exif: As a TIFF structure without prefix, upright; None where there is none.
        dpi: Pixels per inch, across and down; None where it is not told.
    """

    exif: bytes | None = None
    dpi: tuple[float, float] | None = None


def keepsakes(image: Image) -> Keepsakes:
    """Return what an opened picture tells."""
    return keepsakes_of(image, image.info.get("dpi"))


def keepsakes_of(told: Any, dpi: Any) -> Keepsakes:
    """Return what is told by camera data (`PIL.Image.Exif`, or a picture that has some) and a resolution."""
    return Keepsakes(_exif(told), _dpi(dpi))


def _dpi(told: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in told)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 1 <= across <= 1e5 and 1 <= down <= 1e5 else None


def _exif(told: Any) -> bytes | None:
    """The descriptive tags; none where they are damaged, which says nothing about the pixels."""
    from PIL import Image as pil

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = told if isinstance(told, pil.Exif) else told.getexif()
            kept = pil.Exif()
            for tag in _DESCRIBE:
                if tag in found:
                    kept[tag] = found[tag]
            for tag in _PARTS:
                part = {k: v for k, v in found.get_ifd(tag).items() if k not in _STORED}
                if part:
                    kept[tag] = part
            return kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) else None
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        SyntaxError,
        struct.error,
        ZeroDivisionError,
    ):
        return None
