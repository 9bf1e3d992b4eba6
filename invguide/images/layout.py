"""Tiles put together into one picture, with words and bars."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont


from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INK, GREY, PAPER = (24, 24, 27), (113, 113, 122), (255, 255, 255)


@dataclass
class Tile:
    """One cell: an image as it is shown, a name above, a caption or a colour bar below."""

    name: str
    image: Image
    caption: str = ""
    bar: tuple[str, str, str] | None = None  # map, label of its low end, of its high end


@lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    from matplotlib import get_data_path
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _compose(rows: list[list[Tile]], title: str, facts: Sequence[str]) -> Image:
    from PIL import Image as Pil
    from PIL import ImageDraw

    width, height = rows[0][0].image.size
    columns = max(map(len, rows))
    size = max(13, min(19, round(width / 20)))  # of the text
    gap, margin = max(8, size * 3 // 4), size + size // 2
    name_height, strip = round(1.75 * size), round(2.0 * size)
    total_width = columns * width + (columns - 1) * gap + 2 * margin
    head = _head(title, facts, size, total_width - 2 * margin)
    head_height = sum(h for _, _, h in head) + (size // 2 if head else 0)
    strips = [strip if any(t.caption or t.bar for t in row) else size // 2 for row in rows]
    body = sum(name_height + height + s for s in strips) + (len(rows) - 1) * (gap // 2)
    total_height = margin + head_height + body + margin // 2
    canvas = Pil.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = margin
    for text, (font, ink), line in head:
        draw.text((margin, top), text, font=font, fill=ink)
        top += line
    top += size // 2 if head else 0
    for row, below_row in zip(rows, strips, strict=True):
        for i, tile in enumerate(row):
            left = margin + i * (width + gap)
            draw.text(
                (left, top + name_height * 0.68),
                tile.name,
                font=_font(size, True),
                fill=INK,
                anchor="ls",
            )
            canvas.paste(tile.image, (left, top + name_height))
            below = top + name_height + height
            if tile.bar:
                _draw_bar(canvas, draw, tile.bar, (left, below), width, size)
            else:
                at = left, below + size * 0.55
                draw.text(at, tile.caption, font=_font(size), fill=GREY, anchor="lt")
        top += name_height + height + below_row + gap // 2
    return canvas


def _head(
    title: str, facts: Sequence[str], size: int, width: int
) -> list[tuple[str, tuple[Any, tuple[int, int, int]], int]]:
    """Lines of the header: text, font and colour, height. Facts are wrapped to the width."""
    lines: list[tuple[str, tuple[Any, tuple[int, int, int]], int]] = []
    if title:
        large = _font(round(size * 1.45), True)
        while large.getlength(title) > width and len(title) > 8:
            title = title[:-5].rstrip() + " …"
        lines.append((title, (large, INK), round(size * 2.15)))
    small, line = _font(size), ""
    for fact in facts:
        longer = f"{line}   ·   {fact}" if line else fact
        if line and small.getlength(longer) > width:
            lines.append((line, (small, GREY), round(size * 1.5)))
            longer = fact
        line = longer
    if line:
        lines.append((line, (small, GREY), round(size * 1.5)))
    return lines


def _draw_bar(
    canvas: Image,
    draw: ImageDraw,
    bar: tuple[str, str, str],
    corner: tuple[int, int],
    width: int,
    size: int,
) -> None:
    """The colours from left to right under a tile, between the labels of their ends."""
    from PIL import Image as Pil

    name, low, high = bar
    font, (left, top) = _font(size), corner
    start = left + round(font.getlength(low)) + size // 2
    stop = left + width - round(font.getlength(high)) - size // 2
    middle = top + round(size * 0.95)
    draw.text((left, middle), low, font=font, fill=GREY, anchor="lm")
    draw.text((left + width, middle), high, font=font, fill=GREY, anchor="rm")
    if stop > start:
        ramp = np.tile(np.linspace(0, 1, stop - start), (max(6, size * 5 // 8), 1))
        canvas.paste(Pil.fromarray(colour(ramp, name)), (start, middle - len(ramp) // 2))


def colour(values: np.ndarray, name: str) -> np.ndarray:
    """(H, W) in [0, 1] -> (H, W, 3) uint8 by a matplotlib colour map."""
    from matplotlib import colormaps

    return (
        colormaps[name](np.nan_to_num(values, nan=0.0).clip(0, 1))[..., :3] * 255 + 0.5
    ).astype(np.uint8)
