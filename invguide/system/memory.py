"""The most memory that tensors held at any one time: counted on the CPU, asked of the allocator on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside and still alive; what was there before is free.

    Exact and the same on every run, where the size of a process is neither: it also holds what its allocators keep.
    What an operation uses inside itself and gives back is not seen.

    Attributes:
        live, peak: Bytes now, and the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if new else 0
        self.live += size
        self._seen.add(key)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.discard(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by a call held at any one time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as allocations:
        function()
    return allocations.peak
