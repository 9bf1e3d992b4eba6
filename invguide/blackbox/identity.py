"""A hash of what a function computes, the same in every process: its code, and the values it holds."""

from __future__ import annotations

import copyreg
import hashlib
import io
import threading
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from invguide.errors import InputError

STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    io.IOBase,
)  # cannot be pickled, and compute nothing
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def identity(function: Any) -> str:
    """Hash the code of a function with its defaults, closure and the globals it names; of an object, its state.

    Functions and classes of the same module are followed, those of other modules count by name. Pickled bytes would
    not do: they hold addresses of tensors, depend on the interning of strings, and name a function of a module only.

    Raises:
        InputError: It holds something whose state cannot be read.
    """
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    return _Hasher(getattr(inner, "__module__", None) or "__main__").of(function).hex()


class _Hasher:
    def __init__(self, home: str) -> None:
        self.home = {home, "__main__"}
        self.known: dict[int, bytes] = {}
        self.alive: list[Any] = []  # so that no id is used twice

    def of(self, thing: Any) -> bytes:
        if isinstance(thing, PLAIN):
            return _hash(type(thing).__name__, repr(thing))
        if id(thing) not in self.known:
            self.alive.append(thing)
            self.known[id(thing)] = b"cycle"
            self.known[id(thing)] = self._of(thing)
        return self.known[id(thing)]

    def all(self, *things: Any) -> bytes:
        return _hash(*(self.of(thing) for thing in things))

    def _of(self, thing: Any) -> bytes:
        if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
            return _hash("array", thing.dtype.str, repr(thing.shape), thing.tobytes())
        if isinstance(thing, torch.Tensor):
            values = thing.detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
            return _hash("tensor", str(thing.dtype), repr(tuple(thing.shape)), raw)
        if isinstance(thing, tuple | list):
            return _hash(type(thing).__name__, *(self.of(item) for item in thing))
        if isinstance(thing, set | frozenset):
            return _hash("set", *sorted(self.of(item) for item in thing))
        if isinstance(thing, dict):
            return _hash("dict", *(self.all(key, value) for key, value in thing.items()))
        if isinstance(thing, CodeType):
            names = (thing.co_names, thing.co_varnames, thing.co_freevars)
            return _hash("code", thing.co_code, self.all(thing.co_consts, *names))
        if isinstance(thing, ModuleType):
            return _hash("module", thing.__name__)
        if isinstance(thing, MethodType):
            return self.all(thing.__self__, thing.__func__)
        if isinstance(thing, partial):
            return self.all(thing.func, thing.args, thing.keywords)
        if isinstance(thing, FunctionType | BuiltinFunctionType | type):
            return self._named(thing)
        return self._object(thing)

    def _named(self, thing: Any) -> bytes:
        name = f"{thing.__module__}.{thing.__qualname__}"
        if thing.__module__ not in self.home:
            return _hash("name", name)
        if isinstance(thing, FunctionType):
            names = sorted(_names(thing.__code__) & thing.__globals__.keys())
            used = {name: thing.__globals__[name] for name in names}
            return _hash(
                name,
                self.all(thing.__code__, thing.__defaults__, thing.__kwdefaults__),
                self.all(_cells(thing), used),
            )
        if isinstance(thing, type):
            members = (getattr(value, "__func__", value) for value in vars(thing).values())
            methods = [value for value in members if isinstance(value, FunctionType)]
            return _hash(name, self.all(thing.__bases__, methods))
        return _hash(name)

    def _object(self, thing: Any) -> bytes:
        """By what it would be pickled from."""
        if isinstance(thing, STATELESS):
            return _hash("stateless", type(thing).__name__)
        try:
            reducer = copyreg.dispatch_table.get(type(thing))
            reduced: Any = thing.__reduce_ex__(4) if reducer is None else reducer(thing)
        except Exception as error:  # picklers raise whatever the object raises
            raise InputError(
                f"the function holds a {type(thing).__name__} that cannot be pickled ({error}), so nobody can tell "
                f"whether a result in the cache is of the same function; make it inside the function, or use no cache"
            ) from error
        if isinstance(reduced, str):
            return _hash("global", reduced)
        parts = [list(part) if hasattr(part, "__next__") else part for part in reduced]
        return self.all(type(thing), *parts)


def _cells(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            found.append(None)
    return found


def _names(code: CodeType) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def _hash(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()
