"""Which files are opened as pictures, and what is said of those that are not: formats, sizes, kinds of TIFF."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from invguide.errors import InputError

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
            _check_size(image, path)
            yield image
    except UnidentifiedImageError:
        kind = tiff_kind(path)
        if kind:
            raise InputError(f"{path} is a TIFF of a kind that cannot be read: {kind}") from None
        names = ", ".join(suffix[1:] for suffix in formats)
        raise InputError(
            f"{path} is not a picture that can be read; expected one of {names}"
        ) from None


def _check_size(image: Image, path: Path) -> None:
    count, size = image.width * image.height, path.stat().st_size
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


# ---- what is in a TIFF that PIL does not know

_KINDS = {
    1: "unsigned integers",
    2: "signed integers",
    3: "floating point",
    5: "complex",
    6: "complex",
}
_SIZES = {3: 2, 4: 4}  # bytes of the types that matter, SHORT and LONG


def tiff_kind(path: Path) -> str:
    """In words what a TIFF holds, and as what to save it; empty where it is none, or told nothing by its header."""
    try:
        tags = _tags(path)
    except (OSError, struct.error, ValueError):
        return ""
    if not tags:
        return ""
    bits, channels = tags.get(258, [1]), tags.get(277, [1])[0]
    form = _KINDS.get(tags.get(339, [1])[0], "numbers of an unknown kind")
    kind = f"{channels} channel{'' if channels == 1 else 's'} of {bits[0]}-bit {form}"
    if channels > 4:
        return f"{kind}; expected 1 to 4: save the channels that are a picture"
    if form == "floating point":
        wanted = (
            "32 bit, one channel" if channels == 1 else "16-bit integers, or each channel alone"
        )
        return f"{kind}; save it as {wanted}"
    return f"{kind}; save it as 8 or 16 bit without sign"


def _tags(path: Path) -> dict[int, list[int]]:
    """The numbers of the first directory, by tag."""
    with path.open("rb") as file:
        head = file.read(8)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or struct.unpack(f"{order}H", head[2:4]) != (42,):
            return {}
        file.seek(struct.unpack(f"{order}I", head[4:8])[0])
        (count,) = struct.unpack(f"{order}H", file.read(2))
        entries = file.read(12 * count)
        tags: dict[int, list[int]] = {}
        for i in range(count):
            tag, kind, number = struct.unpack_from(f"{order}HHI", entries, 12 * i)
            if kind not in _SIZES or not 0 < number <= 64:
                continue
            size = _SIZES[kind] * number
            content = entries[12 * i + 8 : 12 * i + 12]
            if size > 4:
                file.seek(struct.unpack(f"{order}I", content)[0])
                content = file.read(size)
            form = "H" if kind == 3 else "I"
            tags[tag] = list(struct.unpack_from(f"{order}{number}{form}", content))
        return tags
