"""What the headers of a JPEG file say: quantisation tables, chroma sampling, orientation."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from invguide.errors import InputError

BLOCK = 8
ORIENTATION = 0x0112  # the EXIF tag
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers
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
    for marker, start, stop in segments(data):
        body = data[start:stop]
        if marker == 0xDB:
            tables |= {t: table for t, table, _, _ in tables_of(data, start, stop)}
        elif marker in FRAMES:
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


def segments(data: bytes) -> list[tuple[int, int, int]]:
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


def tables_of(data: bytes, start: int, stop: int) -> list[tuple[int, np.ndarray, int, int]]:
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


def standard_tables(quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (8, 8) steps of luma and chroma that libjpeg uses at this quality, 1 to 100."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (BLOCK, BLOCK)).save(buffer, "JPEG", quality=quality)
    luma, chroma, _ = parse_jpeg(buffer.getvalue()).components
    return luma.table, chroma.table
