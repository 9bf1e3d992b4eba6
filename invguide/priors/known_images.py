"""Clean pictures to examine a network with: parts of the photograph that ships with the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from invguide.errors import InputError
from invguide.images.example import PHOTO
from invguide.images.reading import read_picture

FREE_SIZE = 64  # of pictures for a network that takes any size
CENTRES = ((0.3, 0.3), (0.5, 0.62), (0.75, 0.25), (0.8, 0.8))  # of the parts: eyes, nose, fur


def known_images(
    shape: tuple[int | None, ...], picture: Tensor | None = None, *, min_size: int = 1
) -> Tensor:
    """Return pictures of the shape that a prior takes, (N, C, H, W), data units.

    Four parts of a picture, two of them mirrored; if they would be more than half as large, the whole of it,
    continued by reflection where it is too small, and its mirror image.

    Args:
        shape: Of one picture, None where any size will do.
        picture: (1, C, H, W), data units; by default the photograph that ships with the package.
        min_size: Of the pictures where any size will do.

    Raises:
        InputError: This is not the shape of grey or colour pictures.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(
            f"this prior takes signals of shape {shape}, not grey or colour pictures: pass known clean ones, "
            "images=(N, *shape) in data units"
        )
    picture = read_picture(PHOTO).values if picture is None else picture
    picture = picture.mean(1, keepdim=True) if shape[0] == 1 else picture.expand(-1, 3, -1, -1)
    free = max(FREE_SIZE, min_size)
    size = [n or free for n in shape[1:]]
    full = picture.shape[2:]
    if any(2 * part > whole for part, whole in zip(size, full, strict=True)):
        whole = _continued(picture, size)[..., : size[0], : size[1]]
        return torch.cat([whole, whole.flip(-1)])
    parts = []
    for k, centre in enumerate(CENTRES):
        top, left = (int(c * (n - m)) for c, n, m in zip(centre, full, size, strict=True))
        part = picture[..., top : top + size[0], left : left + size[1]]
        parts.append(part.flip(-1) if k % 2 else part)
    return torch.cat(parts)


def _continued(picture: Tensor, size: list[int]) -> Tensor:
    while any(missing := [max(m - n, 0) for m, n in zip(size, picture.shape[2:], strict=True)]):
        down, right = (min(m, n - 1) for m, n in zip(missing, picture.shape[2:], strict=True))
        picture = F.pad(picture, (0, right, 0, down), mode="reflect")
    return picture
