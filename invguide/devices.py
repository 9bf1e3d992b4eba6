"""Where to compute, and how much at once."""

from __future__ import annotations

import torch

from invguide.errors import InputError


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for; None or "auto": CUDA where there is one, else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here; use 'cpu' or 'auto'"
        ) from error
    return resolved


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    )
