"""The coefficients that a JPEG file stores."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from invguide.arguments.rules import Number, OneOf, Size
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator

from ._images import check_images

BLOCK = 8
LUMA = (0.299, 0.587, 0.114)
# JFIF: rows give Y, Cb and Cr of (R, G, B); the offset of Cb and Cr is left out.
YCBCR = (
    LUMA,
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)
COLOURS: dict[str, tuple[tuple[float, ...], ...]] = {
    "ycbcr": YCBCR,
    "rgb": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "luma": (LUMA,),
    "grey": ((1.0,),),
}


class JPEGCoefficients(LinearOperator):
    """What a JPEG encoder rounds: colour transform, chroma means, cosine transform of 8 x 8 blocks.

    A x holds, for each plane, rows of blocks from the top left, in each block the frequencies (vertical, horizontal)
    row by row, and the planes follow each other: (m,). The block transform is an orthonormal DCT-II, so that a
    coefficient of a file, times its step, is 255 times A x (luma's mean level 128 included). Planes are continued to
    whole blocks as libjpeg does: the last pixel is repeated; below, the last mean is.

    Args:
        size: (height, width) of the upright picture, pixels.
        colour: Planes: "ycbcr"; "rgb" (as they are); "luma" (of a colour picture the Y plane alone, as a grey file of
            it); "grey" (one channel). Default "ycbcr", that of nearly all colour files.
        factors: How many pixels (down, across) of the stored picture share one value of each plane. Default None, none
            are shared; as the file tells: 4:2:0 is ((1, 1), (2, 2), (2, 2)).
        orientation: EXIF, 1 to 8: the stored picture is the upright one turned back by it, and its blocks with it.
            Default 1, not turned; as the file tells.

    Raises:
        InputError: A colour that is unknown, factors or an orientation that cannot be.
        ShapeError: Not images (B, channels, *size).

    Example:
        >>> import torch
        >>> codec = JPEGCoefficients((20, 33), factors=((1, 1), (2, 2), (2, 2)))
        >>> codec(torch.rand(2, 3, 20, 33)).shape  # 3 x 5 blocks of luma, 2 x 3 of each chroma plane
        torch.Size([2, 1728])
    """

    mix: Tensor
    dct: Tensor

    def __init__(
        self,
        size: Size,
        colour: Annotated[str, OneOf(tuple(COLOURS))] = "ycbcr",
        factors: tuple[Size, ...] | None = None,
        orientation: Annotated[int, Number(1, 8, whole=True)] = 1,
    ) -> None:
        super().__init__()
        self.colour = colour
        mix = COLOURS[colour]
        factors = ((1, 1),) * len(mix) if factors is None else factors
        if len(factors) != len(mix):
            raise InputError(
                f"JPEGCoefficients: factors={factors!r}; expected (down, across), each at least 1, of the "
                f"{len(mix)} planes of {colour!r}"
            )
        self.size, self.factors, self.orientation = size, factors, orientation
        self.stored = self.size[::-1] if orientation >= 5 else self.size
        self.blocks = tuple(
            (_blocks(self.stored[0], v), _blocks(self.stored[1], h)) for v, h in self.factors
        )
        self.register_buffer("mix", torch.tensor(mix, dtype=torch.float64))
        self.register_buffer("dct", _dct())

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=self._channels)
        if tuple(x.shape[-2:]) != self.size:
            raise ShapeError(
                f"JPEGCoefficients was made for pictures of {self.size}, and given {tuple(x.shape[-2:])} pixels"
            )
        planes = torch.einsum("pc,bchw->bphw", self.mix.to(x), to_stored(x, self.orientation))
        dct = self.dct.to(x)
        parts = []
        for i, (v, h) in enumerate(self.factors):
            plane = planes[:, i]
            plane = _means(plane, v, -2, below=True)
            plane = _means(plane, h, -1)
            rows, columns = self.blocks[i]
            split = plane.reshape(len(x), rows, BLOCK, columns, BLOCK).transpose(2, 3)
            parts.append((dct @ split @ dct.mT).flatten(1))
        return torch.cat(parts, 1)

    def adjoint(self, y: Tensor) -> Tensor:
        planes = []
        for part, (v, h) in zip(self._planes(y), self.factors):
            part = _means_adjoint(part, h, -1, self.stored[1])
            planes.append(_means_adjoint(part, v, -2, self.stored[0], below=True))
        return self._upright(torch.stack(planes, 1), self.mix.to(y).mT)

    def right_inverse(self, y: Tensor) -> Tensor:
        """Decode: each plane's values repeated over their pixels, and the colour transform undone."""
        planes = []
        for part, (v, h) in zip(self._planes(y), self.factors):
            part = part.repeat_interleave(v, -2).repeat_interleave(h, -1)
            planes.append(part[:, : self.stored[0], : self.stored[1]])
        mix = self.mix.to(y)
        # Of luma alone: the grey picture, not the least change, which is mostly green.
        back = mix.new_ones(3, 1) if self.colour == "luma" else torch.linalg.inv(mix)
        return self._upright(torch.stack(planes, 1), back)

    def row_norms(self, y: Tensor) -> Tensor:
        parts = []
        for row, (v, h), (rows, columns) in zip(self.mix, self.factors, self.blocks):
            squared = float(row.square().sum()) / (v * h)
            parts.append(y.new_full((rows * columns * BLOCK**2,), squared**0.5))
        return torch.cat(parts)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self._channels, *self.size)

    def extra_repr(self) -> str:
        turned = "" if self.orientation == 1 else f", orientation={self.orientation}"
        return f"size={self.size}, colour={self.colour!r}, factors={self.factors}{turned}"

    @property
    def _channels(self) -> int:
        return self.mix.shape[1]

    def _planes(self, y: Tensor) -> list[Tensor]:
        """The planes (B, rows * 8, columns * 8) of which these are the coefficients."""
        sizes = [rows * columns * BLOCK**2 for rows, columns in self.blocks]
        if y.ndim != 2 or y.shape[1] != sum(sizes):
            raise ShapeError(
                f"JPEGCoefficients was given coefficients of shape {tuple(y.shape)}; expected (B, {sum(sizes)})"
            )
        dct, planes = self.dct.to(y), []
        for part, (rows, columns) in zip(y.split(sizes, 1), self.blocks):
            split = dct.mT @ part.reshape(-1, rows, columns, BLOCK, BLOCK) @ dct
            planes.append(split.transpose(2, 3).reshape(-1, rows * BLOCK, columns * BLOCK))
        return planes

    def _upright(self, planes: Tensor, back: Tensor) -> Tensor:
        x = torch.einsum("cp,bphw->bchw", back, planes)
        return to_upright(x, self.orientation)


def to_upright(x: Tensor, orientation: int) -> Tensor:
    """Turn stored pictures (..., H, W) by the EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        x = x.mT
    if orientation in (2, 3, 6, 7):
        x = x.flip(-1)
    return x.flip(-2) if orientation in (3, 4, 7, 8) else x


def to_stored(x: Tensor, orientation: int) -> Tensor:
    """Undo `to_upright`."""
    if orientation in (3, 4, 7, 8):
        x = x.flip(-2)
    if orientation in (2, 3, 6, 7):
        x = x.flip(-1)
    return x.mT if orientation in (5, 6, 7, 8) else x


def _blocks(size: int, factor: int) -> int:
    return math.ceil(math.ceil(size / factor) / BLOCK)


def _dct() -> Tensor:
    """The orthonormal DCT-II, rows are frequencies, float64."""
    k = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(math.pi * (k + 0.5) * k[:, None] / BLOCK) * (2 / BLOCK) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


@lru_cache(maxsize=32)
def _members(size: int, factor: int, below: bool, device: torch.device) -> Tensor:
    """Which pixels (outputs, factor) each mean along an axis is of, continued to whole blocks.

    Across, the last pixel goes on; below, the last mean does: with an even height these differ.
    """
    index = torch.arange(_blocks(size, factor) * BLOCK, device=device)
    if below:
        index = index.clamp(max=math.ceil(size / factor) - 1)
    return (index[:, None] * factor + torch.arange(factor, device=device)).clamp(max=size - 1)


def _means(x: Tensor, factor: int, axis: int, below: bool = False) -> Tensor:
    members = _members(x.shape[axis], factor, below, x.device)
    if factor == 1 and len(members) == x.shape[axis]:
        return x
    total = sum(x.index_select(axis, members[:, j]) for j in range(factor))
    assert isinstance(total, Tensor)
    return total / factor


def _means_adjoint(y: Tensor, factor: int, axis: int, size: int, below: bool = False) -> Tensor:
    members = _members(size, factor, below, y.device)
    shape = list(y.shape)
    shape[axis] = size
    x = y.new_zeros(shape)
    for j in range(factor):
        x = x.index_add(axis, members[:, j], y / factor)
    return x
