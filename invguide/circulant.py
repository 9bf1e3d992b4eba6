"""The nearest thing to an inverse that images allow for any linear map: A* A taken as a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from invguide.prior import per_sample

if TYPE_CHECKING:
    from invguide.forward_operator import LinearOperator

_SPECTRA: WeakKeyDictionary[LinearOperator, dict[object, Tensor]] = WeakKeyDictionary()


def inverse(
    operator: LinearOperator, like: Tensor, ridge: Tensor | float
) -> Callable[[Tensor], Tensor] | None:
    """Return about (A* A + ridge I)^-1 on images like these (B, C, H, W); None for other signals.

    A* A of projections, blurs and Fourier sampling is nearly a convolution, the same everywhere, so that its answer to
    one bright pixel in the middle of each channel tells it. Negative parts of that spectrum are set to zero; what is
    returned is symmetric and positive definite whatever the operator is.

    Args:
        operator: A.
        like: For shape, dtype and device.
        ridge: Above 0, scalar or (B,).
    """
    if like.ndim != 4 or like.is_complex() or min(like.shape[-2:]) < 2:
        return None
    size = (like.shape[-2], like.shape[-1])
    gain = 1 / (_spectrum(operator, like) + per_sample(ridge, like))
    return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=size)


@torch.inference_mode(False)  # it outlives the call
@torch.no_grad()
def _spectrum(operator: LinearOperator, like: Tensor) -> Tensor:
    """Eigenvalues of each channel's convolution, (C, H, W // 2 + 1), found once per operator and kind of image."""
    known = _SPECTRA.setdefault(operator, {})
    kind = (tuple(like.shape[1:]), like.dtype, like.device)
    if kind not in known:
        channels, height, width = like.shape[1:]
        middle = (height // 2, width // 2)
        pixel = torch.zeros(channels, *like.shape[1:], dtype=like.dtype, device=like.device)
        index = torch.arange(channels, device=like.device)
        pixel[index, index, middle[0], middle[1]] = 1
        response = operator.adjoint(operator(pixel))[index, index]
        response = torch.roll(response, (-middle[0], -middle[1]), (-2, -1))
        known[kind] = torch.fft.rfft2(response).real.clamp_min(0)
    return known[kind]
