"""Pickles of NVIDIA's training code (EDM, EDM2), which carry source code: a reader that builds tensors and no more.

Every name in the file is looked up in a short list of our own stand-ins; none is ever imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.errors import CheckpointError
from invguide.priors.checkpoints.file import unsafe_names

DEEPEST = 100  # modules within modules
LONGEST = (
    4096  # bytes of an array of numpy's that is read; those of EDM2 have a number per channel
)


class StoredObject(NamedTuple):
    """An object of a pickle: the name of its class, such as "EDMPrecond", and what it had; numbers among that."""

    kind: str
    attributes: dict[str, Any]


class StoredNetwork(NamedTuple):
    """The averaged network of a pickle.

    Attributes:
        weights: Its tensors by their names in a state dict.
        parts: Its modules by their dotted names; its own is "".
        encoder: What makes its inputs from pictures, of EDM2; None of others.
    """

    weights: dict[str, Tensor]
    parts: dict[str, StoredObject]
    encoder: StoredObject | None

    @property
    def kind(self) -> str:
        return self.parts[""].kind

    @property
    def attributes(self) -> dict[str, Any]:
        return self.parts[""].attributes


def read_nvidia_pickle(path: str | Path) -> StoredNetwork:
    """Return the network of a .pkl file, as tensors by name; the source code in it is not run.

    Raises:
        CheckpointError: Damaged, or it holds anything that such files do not.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = _Reader(file).load()
        whole = content if isinstance(content, dict) else {"ema": content}
        network, encoder = whole.get("ema"), whole.get("encoder")
        if not isinstance(network, _Stored):
            raise ValueError("no network under 'ema'")
        modules = dict(_modules(network, "", set()))
        weights = {k: v for name, m in modules.items() for k, v in _tensors(m, name)}
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes the reader do
        raise CheckpointError(
            f"{path} cannot be read as a pickle of EDM ({type(error).__name__}: {error}); it is truncated or "
            "another kind of file: download it again"
        ) from error
    parts = {name: StoredObject(m.kind, m.state) for name, m in modules.items()}
    known = isinstance(encoder, _Stored)
    return StoredNetwork(
        weights, parts, StoredObject(encoder.kind, encoder.state) if known else None
    )


class _Stored:
    """Stands for any module of the file: its class is never looked up, its state is only kept."""

    kind = ""

    def __init__(self, *_: Any) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Inert:
    """Stands for numpy's numbers, which are of no use here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Type:
    """Stands for a type of numpy's; name is such as "<f4"."""

    name = ""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.name = f"{state[1]}{self.code}"


class _Array:
    """Stands for an array of numpy's; values are its numbers, of short ones in single precision only."""

    values: tuple[float, ...] = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, _, kind, _, content = state
        if kind.name == "<f4" and len(content) <= LONGEST:
            self.values = tuple(v for (v,) in struct.iter_unpack("<f", content))


class _Dictionary(dict):
    """Stands for a dictionary with attributes."""


def _persistent(meta: Any) -> _Stored:
    """An object that was saved together with the source of its class."""
    stored = _Stored()
    stored.kind = str(meta["class_name"])
    stored.__setstate__(meta["state"])
    return stored


def _storage(content: bytes) -> Any:
    """A storage, saved by torch.save within the pickle: a file within the file, checked like one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stream = io.BytesIO(content)
    if names := [name for _ in range(4) for name in unsafe_names(stream)]:
        raise CheckpointError(f"it would import {names[0]} to read a tensor")
    with FakeTensorMode():  # reserves nothing
        fake = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    declared = fake._untyped_storage.nbytes()
    if declared > len(content):
        raise CheckpointError(f"a tensor of {len(content)} bytes is said to have {declared}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    untyped = storage._untyped_storage
    stored = untyped.nbytes() // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Checked before: a tensor that reaches beyond its storage would make it grow.
    if min(offset, *size, *stride, 0) < 0 or last >= stored or math.prod(size) > stored:
        raise CheckpointError(
            f"a tensor of shape {tuple(size)} is larger than what is stored of it"
        )
    return torch.empty(0, dtype=storage.dtype).set_(untyped, offset, size, stride)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "dnnlib.util.EasyDict": _Dictionary,
    "numpy.dtype": _Type,
    "numpy.ndarray": _Inert,  # named as the type of the array that is made
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
for _numpy in ("numpy.core.multiarray", "numpy._core.multiarray"):
    STAND_INS |= {f"{_numpy}.scalar": _Inert, f"{_numpy}._reconstruct": _Array}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if re.fullmatch(r"torch\.nn\.modules\.\w+\.\w+", name):
            return _Stored
        if name not in STAND_INS:
            raise CheckpointError(
                f"it names {name}, which no file of EDM does, and reading that could run code"
            )
        return STAND_INS[name]


def _modules(module: _Stored, name: str, seen: set[int]) -> Iterator[tuple[str, _Stored]]:
    """Yield the module and all within it, by dotted name."""
    if id(module) in seen or name.count(".") > DEEPEST:
        raise ValueError("its modules contain one another")
    seen.add(id(module))
    yield name, module
    for child, part in (module.state.get("_modules") or {}).items():
        if isinstance(part, _Stored):
            yield from _modules(part, f"{name}.{child}" if name else str(child), seen)


def _tensors(module: _Stored, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what state_dict would of this module alone: parameters and buffers."""
    hidden = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for key, value in (module.state.get(kind) or {}).items():
            if isinstance(value, Tensor) and key not in hidden:
                yield f"{name}.{key}" if name else key, value
