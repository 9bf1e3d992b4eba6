"""Missing pixels."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.arguments.rules import Count, CountOrNone, Items, Number
from invguide.errors import InputError, ShapeError
from invguide.forward_operator import SVD, LinearOperator

from ._images import check_images

Pixels = Annotated[
    tuple[int, ...], Items((Number(1, whole=True),), least=2, most=2**28, of="(C, H, W)")
]


def _same(x: Tensor) -> Tensor:
    return x


class Inpainting(LinearOperator):
    """Keep the pixels where the mask is 1 and set the others to 0.

    Args:
        mask: 1 or True where the pixel is known, 0 or False where it is missing; (C or 1, H, W) or (H, W), shared by
            all images.

    Raises:
        InputError: Values other than 0 and 1; nothing missing; nothing known.
        ShapeError: A mask of another rank, or images of another size than the mask.

    Example:
        >>> import torch
        >>> Inpainting.box((3, 8, 8), top=2, left=2, height=4, width=4)(torch.ones(1, 3, 8, 8)).mean()
        tensor(0.7500)
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3:
            raise ShapeError(
                f"Inpainting: mask has shape {tuple(mask.shape)}; expected (C or 1, H, W) or (H, W)"
            )
        known = mask != 0
        if not bool(((mask == 1) | ~known).all()):
            raise InputError(
                f"Inpainting: mask has values from {mask.min():g} to {mask.max():g}; expected only 1 (known) and 0 "
                f"(missing): threshold it, such as mask > 0.5"
            )
        if bool(known.all()):
            raise InputError(
                "Inpainting: the mask marks every pixel as known (1), so nothing is missing: use Identity()"
            )
        if not bool(known.any()):
            raise InputError(
                "Inpainting: the mask marks no pixel as known (1); is it inverted? Use 1 - mask"
            )
        self.register_buffer("mask", known)

    @classmethod
    @checked
    def random(cls, shape: Pixels, fraction_missing: float, seed: int = 0) -> Inpainting:
        """Drop round(fraction_missing * H * W) random pixels, all channels at once; shape (C, H, W) or (H, W)."""
        height, width = shape[-2:]
        if not 0 < fraction_missing < 1:
            raise InputError(
                f"Inpainting: fraction_missing={fraction_missing!r}; expected a number between 0 and 1"
            )
        order = torch.randperm(
            height * width, generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        return cls((order >= round(fraction_missing * height * width)).reshape(1, height, width))

    @classmethod
    @checked
    def box(
        cls,
        shape: Pixels,
        height: Count | None = None,
        width: Count | None = None,
        top: CountOrNone | None = None,
        left: CountOrNone | None = None,
    ) -> Inpainting:
        """Drop one box, by default the middle half of each axis; sizes in pixels, shape (C, H, W) or (H, W)."""
        spans = []
        for name, size, length, start in zip(
            ("rows", "columns"), shape[-2:], (height, width), (top, left)
        ):
            length = max(1, size // 2) if length is None else length
            start = (size - length) // 2 if start is None else start
            if length < 1 or start < 0 or start + length > size:
                raise InputError(
                    f"Inpainting: the box covers {name} {start} to {start + length}; the image has 0 to {size}"
                )
            spans.append(slice(start, start + length))
        mask = torch.ones(1, *shape[-2:], dtype=torch.bool, device="cpu")
        mask[:, spans[0], spans[1]] = False
        return cls(mask)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self, x)
        channels, *size = self.mask.shape
        if list(x.shape[-2:]) != size or channels not in (1, x.shape[1]):
            raise ShapeError(
                f"Inpainting: the mask has shape {tuple(self.mask.shape)} and the images {tuple(x.shape[1:])}; "
                f"expected the same (C or 1, H, W): resize the mask (nearest) or the images"
            )
        return torch.where(self.mask, x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.forward(y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return y_shape

    def observed(self) -> Tensor:
        return self.mask

    def svd(self, x: Tensor) -> SVD:
        return SVD(self.mask.to(x).expand(x.shape[1:]), _same, _same, _same, _same)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, known={self.mask.double().mean():.1%}"
