"""A hash of what anything computes, the same in every process: functions by their code, all else by its whole content.

Followed to the end: functions and classes of the user (not those of installed packages, which count by name) with
their defaults, closures and the globals they name; every value of every tensor and array; every attribute of modules
and objects. Pickled bytes would not do: they hold addresses of tensors, depend on the interning of strings, and name a
function of a module only.

An object whose attributes hold more than what decides its results, such as counters or workers, says what does in a
method `identity_parts() -> Any`; one that has a `__getstate__` is taken by that.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
import io
import os
import site
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

# What computes nothing, or is where something is computed and not what.
STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.local,
    io.IOBase,
    weakref.ReferenceType,
    GetSetDescriptorType,
    MemberDescriptorType,
    torch.device,
)
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
# Attributes of torch modules that decide no result of an evaluation: a network is used in evaluation mode.
MACHINERY = {
    "training",
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of code: *args, **kwargs, generator, coroutine, asynchronous generator; not what its file imports from __future__.
CODE_FLAGS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
LISTED, DEPTH = 400, 8  # labels that are kept to tell what has changed


@dataclass(frozen=True)
class Content:
    """What `content_of` found.

    Attributes:
        digest: 32 hexadecimal digits.
        unknown: Parts whose state cannot be read, as "label: type", so that two of them look the same.
        parts: Digests of the parts by label, such as "function.closure gain"; of a large thing the first ones.
    """

    digest: str
    unknown: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)


def content_of(thing: Any) -> Content:
    """Hash whatever decides the results of a thing: a function, a module, an operator, a prior, plain values."""
    hasher = _Hasher()
    digest = hasher.of(thing, "").hex()
    return Content(digest, tuple(dict.fromkeys(hasher.unknown)), hasher.parts)


def changed_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Labels that differ, the innermost that are known."""
    labels = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return [k for k in labels if not any(other.startswith((f"{k}.", f"{k}[")) for other in labels)]


class _Parts(NamedTuple):
    """What a thing consists of."""

    kind: str
    parts: dict[str, Any]  # by label, in an order that is the same in every process


class _Hasher:
    def __init__(self) -> None:
        self.known: dict[int, bytes] = {}
        self.alive: list[Any] = []  # so that no id is used twice
        self.depth = 0
        self.unknown: list[str] = []
        self.parts: dict[str, str] = {}

    def of(self, thing: Any, label: str) -> bytes:
        if isinstance(thing, PLAIN):
            digest = _hash(type(thing).__name__, repr(thing))
        elif id(thing) in self.known:
            digest = self.known[id(thing)]
        else:
            self.alive.append(thing)
            self.known[id(thing)] = f"cycle {self.depth}".encode()
            self.depth += 1
            digest = self.known[id(thing)] = self._of(thing, label)
            self.depth -= 1
        if label and self.depth <= DEPTH and len(self.parts) < LISTED:
            self.parts[label] = digest.hex()[:16]
        return digest

    def _of(self, thing: Any, label: str) -> bytes:
        found = _values_of(thing) or self._parts_of(thing, label)
        if isinstance(found, bytes):
            return found
        digests = (
            _hash(name, self.of(part, _joined(label, name))) for name, part in found.parts.items()
        )
        return _hash(found.kind, *digests)

    def _parts_of(self, thing: Any, label: str) -> bytes | _Parts:
        if isinstance(thing, STATELESS):
            return _hash("stateless", type(thing).__name__)
        if hasattr(type(thing), "identity_parts"):
            own = thing.identity_parts()
            return _Parts(
                "own", {"type": type(thing), **(own if isinstance(own, dict) else {"": own})}
            )
        if isinstance(thing, tuple | list):
            return _Parts(type(thing).__name__, {f"[{i}]": v for i, v in enumerate(thing)})
        if isinstance(thing, set | frozenset):
            return _hash("set", *sorted(self.of(item, "") for item in thing))
        if isinstance(thing, Mapping) and type(thing).__module__ in ("builtins", "collections"):
            return self._mapping(thing)
        if isinstance(thing, FunctionType | CodeType | type | ModuleType | BuiltinFunctionType):
            return _named(thing)
        unwrapped = _unwrapped(thing)
        if unwrapped is not None:
            return _Parts(type(thing).__name__, unwrapped)
        return self._object(thing, label)

    def _mapping(self, thing: Mapping[Any, Any]) -> _Parts:
        parts: dict[str, Any] = {}
        for i, (key, value) in enumerate(thing.items()):
            plain = isinstance(key, str | int)
            parts[f"[{key!r}]" if plain else f"[{i}]"] = value if plain else (key, value)
        return _Parts("mapping", parts)

    def _object(self, thing: Any, label: str) -> bytes | _Parts:
        """By what it would be pickled from."""
        try:
            reducer = copyreg.dispatch_table.get(type(thing))
            reduced: Any = thing.__reduce_ex__(4) if reducer is None else reducer(thing)
        except Exception as error:  # picklers raise whatever the object raises
            name = type(thing).__name__
            self.unknown.append(f"{label}: {name}" if label else f"{name} ({error})")
            return _Parts("unreadable", {"type": type(thing)})
        if isinstance(reduced, str):
            return _hash("global", reduced)
        maker, arguments, state, *more = (*reduced, None, None, None)[:5]
        parts = {"type": type(thing)}
        if (
            maker is not copyreg.__newobj__
            or arguments[0] is not type(thing)
            or len(arguments) > 1
        ):
            parts["made by"] = (maker, arguments)
        for name, value in _state(thing, state):
            parts[name] = value
        parts.update(
            {f"item{i}": list(rest) for i, rest in enumerate(more) if hasattr(rest, "__next__")}
        )
        return _Parts("object", parts)


def _state(thing: Any, state: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of the attributes, in alphabetical order; of a module, those that decide results."""
    slots = state[1] if isinstance(state, tuple) and len(state) == 2 else None
    if isinstance(slots, dict):
        state = {**(state[0] or {}), **slots}
    if not isinstance(state, dict):
        if state is not None:
            yield "state", state
        return
    module = isinstance(thing, nn.Module)
    for name, value in sorted(state.items(), key=lambda item: str(item[0])):
        if module and name in MACHINERY:
            continue
        if module and name in HOOKS:
            value = list(value.values())  # the keys count the hooks of the whole process
            if not value:
                continue
        elif module and name in ("_parameters", "_buffers", "_modules"):
            yield from ((str(child), part) for child, part in value.items())
            if name != "_modules" or not value:
                continue
            value = " ".join(value)  # in the order of a Sequential
        yield str(name), value


def _values_of(thing: Any) -> bytes | None:
    """Of arrays and tensors, every value; None for everything else."""
    if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
        raw = np.ascontiguousarray(thing).reshape(-1).view(np.uint8)
        return _hash("array", thing.dtype.str, repr(thing.shape), memoryview(raw))
    if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and not thing.is_meta:
        if thing.is_quantized:
            thing = thing.dequantize()
        values = thing.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = values.reshape(-1)
        if len(flat) == 1:  # which may have any stride
            flat = flat.new_empty(1).copy_(flat)
        raw = flat.view(torch.uint8).numpy()
        return _hash("tensor", str(thing.dtype), repr(tuple(thing.shape)), memoryview(raw))
    if isinstance(thing, torch.jit.ScriptFunction):
        return _hash("script", thing.code)
    return None


def _unwrapped(thing: Any) -> dict[str, Any] | None:
    """What wrappers of functions and values hold; None for what is no wrapper."""
    if isinstance(thing, np.ndarray):
        return {"shape": thing.shape, "items": thing.tolist()}
    if isinstance(thing, torch.Tensor):
        if thing.is_meta:
            return {"meta": str(thing.dtype), "shape": tuple(thing.shape)}
        return {"dense": thing.detach().to_dense(), "layout": str(thing.layout)}
    if isinstance(thing, torch.jit.ScriptModule):
        codes = [str(getattr(part, "code", "")) for part in thing.modules()]
        return {"code": codes, "state": dict(thing.state_dict(keep_vars=True))}
    if type(thing).__module__.startswith("torch._dynamo") and hasattr(thing, "_orig_mod"):
        return {"compiled": thing._orig_mod}
    if isinstance(thing, MethodType):
        return {"object": thing.__self__, "method": thing.__func__}
    if isinstance(thing, functools.partial):
        return {"": thing.func, "arguments": thing.args, "keywords": thing.keywords}
    if isinstance(thing, staticmethod | classmethod):
        return {"": thing.__func__}
    if isinstance(thing, property):
        return {"get": thing.fget}
    if isinstance(thing, functools.cached_property):
        return {"get": thing.func}
    wrapped = getattr(thing, "__wrapped__", None)
    if wrapped is not None and isinstance(thing, functools._lru_cache_wrapper):
        return {"": wrapped}
    return None


# ---- functions, classes and modules


def _named(thing: Any) -> bytes | _Parts:
    if isinstance(thing, CodeType):
        return _code(thing)
    if isinstance(thing, ModuleType):
        return _hash("module", thing.__name__)
    if isinstance(thing, BuiltinFunctionType):
        owner = thing.__self__
        if owner is not None and not isinstance(owner, ModuleType | type):
            return _Parts(f"method {thing.__name__}", {"object": owner})
    home = getattr(thing, "__module__", None) or ""
    name = f"{home}.{thing.__qualname__}"
    if isinstance(thing, FunctionType):
        return _function(thing, name, installed(home))
    if installed(home):
        return _hash("name", name)
    if isinstance(thing, type):
        kept = {k: v for k, v in sorted(vars(thing).items()) if not _is_bookkeeping(k, v)}
        return _Parts(f"class {thing.__name__}", {"bases": thing.__bases__, **kept})
    file = getattr(sys.modules.get(home), "__file__", None)  # of compiled code
    return _hash("compiled", name, Path(file).read_bytes() if file else b"")


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Members of a class that Python itself adds, and that decide no result."""
    callable_ = isinstance(value, FunctionType | staticmethod | classmethod | property)
    hidden = name.startswith("__") and name.endswith("__")
    return (hidden and (not callable_ or "annotat" in name)) or name == "_abc_impl"


def _function(thing: FunctionType, name: str, by_name: bool) -> bytes | _Parts:
    cells = {f"closure {key}": value for key, value in _cells(thing)}
    if by_name:
        # One that an installed package has made inside of another holds what it was made with.
        made = "<locals>" in thing.__qualname__
        held = {"defaults": thing.__defaults__, **cells} if made else cells
        return _Parts(f"name {name}", held)
    used = _globals_of(thing)
    own = {k: v for k, v in vars(thing).items() if k not in ("__signature__", "__type_params__")}
    parts = {"code": thing.__code__, "defaults": thing.__defaults__}
    parts |= {"keyword defaults": thing.__kwdefaults__, "attributes": own, **cells, **used}
    return _Parts("function", parts)


def _code(code: CodeType) -> _Parts:
    kind = code.co_flags & CODE_FLAGS
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, kind)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    handlers = getattr(code, "co_exceptiontable", b"")  # of Python 3.11 and later
    text = _hash(code.co_code, handlers, repr(counts), repr(names))
    return _Parts("code", {"": text, "constants": code.co_consts})


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            yield name, None


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names; of a module of the user's, the members that it names too."""
    names = sorted(_names(function.__code__))
    seen: set[str] = set()

    def resolved(value: Any) -> Any:
        if not isinstance(value, ModuleType) or installed(value.__name__):
            return value
        if value.__name__ in seen:
            return None
        seen.add(value.__name__)
        return {name: resolved(vars(value)[name]) for name in names if name in vars(value)}

    space = function.__globals__
    return {f"global {name}": resolved(space[name]) for name in names if name in space}


def _names(code: CodeType) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = {paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")}
    found |= {*getattr(site, "getsitepackages", list)(), site.getusersitepackages()}
    return tuple(sorted(os.path.realpath(path) + os.sep for path in found))


def installed(name: str) -> bool:
    """Whether a module belongs to Python, to this package or to another installed one, so that its name says enough."""
    root = name.partition(".")[0]
    if root == __package__ or root in sys.stdlib_module_names:
        return True
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or root == "__main__":
        return False
    if file is None:
        return name in sys.builtin_module_names or root in ("torch", "numpy")
    file = os.path.realpath(file)
    return "site-packages" in file or file.startswith(_library_folders())


def _hash(*parts: str | bytes | memoryview) -> bytes:
    digest, head = hashlib.sha256(), bytearray()
    for part in parts:
        if isinstance(part, memoryview):  # values, which are not to be copied
            digest.update(head + part.nbytes.to_bytes(8, "little"))
            digest.update(part)
            head.clear()
        else:
            raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            head += len(raw).to_bytes(8, "little") + raw
    digest.update(head)
    return digest.digest()[:16]


def _joined(label: str, name: str) -> str:
    return f"{label}{name}" if not label or not name or name[0] == "[" else f"{label}.{name}"
