"""Pictures extended to sizes that a network takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def extend(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reflect the image axes of x (B, C, ...) at their far ends up to these sizes; repeat the edge where x is short."""
    extra = [size - got for size, got in zip(sizes, x.shape[2:], strict=True)]
    if not any(extra):
        return x
    # Reflection needs the pad to be smaller than the image.
    reflects = all(pad < size for pad, size in zip(extra, x.shape[2:], strict=True))
    pads = [value for pad in reversed(extra) for value in (0, pad)]
    return F.pad(x, pads, mode="reflect" if reflects else "replicate")


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
