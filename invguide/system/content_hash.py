"""A hash of what anything computes, the same in every process: functions by their code, all else by its whole content.

Every value of every tensor and array, every attribute of modules and objects, code as `content_code` has it. Pickled
bytes would not do: they hold addresses of tensors, depend on the interning of strings, and name a function only.

An object whose attributes hold more than what decides its results, such as counters or workers, says what does in a
method `identity_parts() -> Any`; one that has a `__getstate__` is taken by that.
"""

from __future__ import annotations

import copyreg
import functools
import io
import random
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import nn

from invguide.system.content_code import Parts, hashed, parts_of_named

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
    np.random.RandomState,
    random.Random,
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
UNORDERED = (
    "_use_default_values"  # diffusers: which settings were left out, in an order that varies
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NEW: Any = getattr(copyreg, "__newobj__")  # noqa: B009  how most objects are made again
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


class _Hasher:
    def __init__(self) -> None:
        self.known: dict[int, bytes] = {}
        self.alive: list[Any] = []  # so that no id is used twice
        self.depth = 0
        self.unknown: list[str] = []
        self.parts: dict[str, str] = {}

    def of(self, thing: Any, label: str) -> bytes:
        if isinstance(thing, PLAIN):
            digest = hashed(type(thing).__name__, repr(thing))
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
            hashed(name, self.of(part, _joined(label, name))) for name, part in found.parts.items()
        )
        return hashed(found.kind, *digests)

    def _parts_of(self, thing: Any, label: str) -> bytes | Parts:
        if isinstance(thing, STATELESS):
            return hashed("stateless", str(type(thing).__name__))
        if hasattr(type(thing), "identity_parts"):
            own = thing.identity_parts()
            return Parts(
                "own", {"type": type(thing), **(own if isinstance(own, dict) else {"": own})}
            )
        if isinstance(thing, tuple | list):
            return Parts(type(thing).__name__, {f"[{i}]": v for i, v in enumerate(thing)})
        if isinstance(thing, set | frozenset):
            return hashed("set", *sorted(self.of(item, "") for item in thing))
        if isinstance(thing, Mapping) and type(thing).__module__ in ("builtins", "collections"):
            return self._mapping(thing)
        if isinstance(thing, FunctionType | CodeType | type | ModuleType | BuiltinFunctionType):
            return parts_of_named(thing)
        unwrapped = _unwrapped(thing)
        if unwrapped is not None:
            return Parts(type(thing).__name__, unwrapped)
        return self._object(thing, label)

    def _mapping(self, thing: Mapping[Any, Any]) -> Parts:
        parts: dict[str, Any] = {}
        for i, (key, value) in enumerate(thing.items()):
            if key == UNORDERED:
                continue
            plain = isinstance(key, str | int)
            parts[f"[{key!r}]" if plain else f"[{i}]"] = value if plain else (key, value)
        return Parts("mapping", parts)

    def _object(self, thing: Any, label: str) -> bytes | Parts:
        """A module by its attributes, other objects by what they would be pickled from."""
        if isinstance(thing, nn.Module):
            return Parts("object", {"type": type(thing), **dict(_state(thing, vars(thing)))})
        try:
            reducer = copyreg.dispatch_table.get(type(thing))
            reduced: Any = thing.__reduce_ex__(4) if reducer is None else reducer(thing)
        except Exception as error:  # picklers raise whatever the object raises
            name = type(thing).__name__
            self.unknown.append(f"{label}: {name}" if label else f"{name} ({error})")
            return Parts("unreadable", {"type": type(thing)})
        if isinstance(reduced, str):
            return hashed("global", reduced)
        whole: tuple[Any, ...] = (*reduced, None, None, None)
        maker, arguments, state, listed = whole[:4]
        parts = {"type": type(thing), **dict(_state(thing, state))}
        if maker is not NEW or arguments[0] is not type(thing) or len(arguments) > 1:
            parts["made by"] = (maker, arguments)
        if listed is not None:
            parts["items"] = list(listed)
        if isinstance(thing, dict):
            parts["values"] = dict(thing)
        return Parts("object", parts)


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
        if name == UNORDERED or (module and name in MACHINERY):
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
        return hashed("array", thing.dtype.str, repr(thing.shape), _bytes(raw))
    if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and not thing.is_meta:
        if thing.is_quantized:
            thing = thing.dequantize()
        values = thing.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = values.reshape(-1)
        if len(flat) == 1:  # which may have any stride
            flat = flat.new_empty(1).copy_(flat)
        raw = flat.view(torch.uint8).numpy()
        return hashed("tensor", str(thing.dtype), repr(tuple(thing.shape)), _bytes(raw))
    if isinstance(thing, torch.jit.ScriptFunction):
        return hashed("script", str(thing.code))
    return None


def _bytes(raw: Any) -> memoryview:
    return memoryview(raw)


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
    if isinstance(thing, torch.Generator):  # by its seed: its state changes with every use
        return {"seed": thing.initial_seed()}
    if isinstance(thing, np.random.Generator):
        seeds: Any = thing.bit_generator.seed_seq
        return {
            "seed": getattr(seeds, "entropy", None),
            "spawned": getattr(seeds, "spawn_key", ()),
        }
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


def _joined(label: str, name: str) -> str:
    return f"{label}{name}" if not label or not name or name[0] == "[" else f"{label}.{name}"
