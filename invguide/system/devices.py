"""Where to compute, and how much at once."""

from __future__ import annotations

import time
from collections.abc import Sequence

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
    if resolved.type == "meta":
        raise InputError(
            "device 'meta' holds shapes and no numbers: moving a network there loses its weights; use 'cpu' or 'auto'"
        )
    return resolved


def resolve_devices(
    device: str | torch.device | Sequence[str | torch.device] | None,
) -> list[torch.device]:
    """Return one device or several: of a list each, of "cuda:all" every GPU."""
    if device == "cuda:all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError("device 'cuda:all' cannot be used here; use 'cpu' or 'auto'")
        return [torch.device("cuda", i) for i in range(count)]
    if device is None or isinstance(device, str | torch.device):
        return [resolve_device(device)]
    if not len(device):
        raise InputError("device is an empty list; expected at least one device")
    return [resolve_device(one) for one in device]


def chunk_size(batch_size: int | str, shape: tuple[int, ...], device: torch.device) -> int:
    """Return how many samples of this shape advance together; `batch_size` as given to `driver.run`."""
    if batch_size == "auto":
        # On a CPU batching buys nothing beyond a few thousand numbers; on a GPU it does until memory is short.
        numbers = 2**16 if device.type == "cpu" else 2**22
        return max(1, numbers // max(1, torch.Size(shape).numel()))
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a positive number or 'auto'")
    return batch_size


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
    )


def now(device: torch.device) -> float:
    """Seconds of a clock, when all that a device was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
