"""Which files are opened as pictures, and what is said of those that are not: formats and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from invguide.errors import InputError
from invguide.images.tiff_file import tiff_kind

if TYPE_CHECKING:
    from PIL.Image import Image

# By suffix. Formats that PIL hands to other programs (EPS to Ghostscript), or that are no photographs, are left out.
FORMATS = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".jp2": "JPEG2000",
    ".jpe": "JPEG",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".mpo": "MPO",
    ".pgm": "PPM",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
BOMB = 2**24  # pixels; smaller pictures fit anywhere
EMPTY = 400  # pixels per byte: the flattest photograph has fifty, a bomb of zeros thousands
WORK = 160  # bytes per pixel that a restoration takes at least, the network left aside


def readable() -> dict[str, str]:
    """The formats that PIL can read here, by suffix; older ones lack AVIF."""
    from PIL import Image

    Image.init()
    return {suffix: name for suffix, name in FORMATS.items() if name in Image.OPEN}


def check_regular(path: Path) -> None:
    """Raise InputError for what would wait for ever or never end when it is read: pipes, devices, folders."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a picture file")
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path} is no regular file (a pipe or a device); save it as a file first"
        )


@contextmanager
def open_picture(path: Path) -> Iterator[Image]:
    """Open a picture of a format above, its pixels not yet read, as `PIL.Image.open` does.

    Raises:
        InputError: No file, none of these formats, or too many pixels for this machine or for its bytes.
    """
    from PIL import Image, UnidentifiedImageError

    check_regular(path)
    formats = readable()
    try:
        with Image.open(path, formats=sorted(set(formats.values()))) as image:
            check_size(image.width, image.height, path)
            yield image
    except UnidentifiedImageError:
        kind = tiff_kind(path)
        if kind:
            raise InputError(f"{path} is a TIFF of a kind that cannot be read: {kind}") from None
        names = ", ".join(suffix[1:] for suffix in formats)
        raise InputError(
            f"{path} is not a picture that can be read; expected one of {names}"
        ) from None


def check_size(width: int, height: int, path: Path) -> None:
    """Raise InputError for more pixels than this machine, or the bytes of the file, can have."""
    count, size = width * height, path.stat().st_size
    if count > BOMB and count > EMPTY * size:
        raise InputError(
            f"{path} has {count / 1e6:.0f} million pixels in {size / 1e3:.0f} kB: one flat area, or made to fill the "
            "memory; cut it up first"
        )
    memory = _memory()
    if memory is not None and count * WORK > memory:
        raise InputError(
            f"{path} has {count / 1e6:.0f} million pixels, which take at least {count * WORK / 1e9:.0f} GB, and this "
            f"machine has {memory / 1e9:.0f}; cut it up first"
        )


def _memory() -> int | None:
    """Bytes of this machine, where it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
