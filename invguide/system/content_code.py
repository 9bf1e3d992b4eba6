"""What decides the results of code: of a function, a class or a module, without what Python itself adds.

Functions and classes of the user are followed to the end: defaults, closures, the globals they name, the members of
modules of the user that they name, and the files they import. Those of installed packages count by name.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

# Of code: *args, **kwargs, generator, coroutine, asynchronous generator; not what its file imports from __future__.
CODE_FLAGS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)


class Parts(NamedTuple):
    """What a thing consists of."""

    kind: str
    parts: dict[str, Any]  # by label, in an order that is the same in every process


def hashed(*parts: str | bytes | memoryview) -> bytes:
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


def parts_of_named(thing: Any) -> bytes | Parts:
    if isinstance(thing, CodeType):
        return _code(thing)
    if isinstance(thing, ModuleType):
        return hashed("module", thing.__name__)
    if isinstance(thing, BuiltinFunctionType):
        owner = thing.__self__
        if owner is not None and not isinstance(owner, ModuleType | type):
            return Parts(f"method {thing.__name__}", {"object": owner})
    home = getattr(thing, "__module__", None) or ""
    name = f"{home}.{thing.__qualname__}"
    if isinstance(thing, FunctionType):
        return _function(thing, name, installed(home))
    if installed(home):
        return hashed("name", name)
    if isinstance(thing, type):
        kept = {k: v for k, v in sorted(vars(thing).items()) if not _is_bookkeeping(k, v)}
        return Parts(f"class {thing.__name__}", {"bases": thing.__bases__, **kept})
    file = getattr(sys.modules.get(home), "__file__", None)  # of compiled code
    return hashed("compiled", name, Path(file).read_bytes() if file else b"")


def _is_bookkeeping(name: str, value: Any) -> bool:
    """Members of a class that Python itself adds, and that decide no result."""
    callable_ = isinstance(value, FunctionType | staticmethod | classmethod | property)
    hidden = name.startswith("__") and name.endswith("__")
    return (hidden and (not callable_ or "annotat" in name)) or name == "_abc_impl"


def _function(thing: FunctionType, name: str, by_name: bool) -> bytes | Parts:
    cells = {f"closure {key}": value for key, value in _cells(thing)}
    if by_name:
        # One that an installed package has made inside of another holds what it was made with.
        made = "<locals>" in thing.__qualname__
        held = {"defaults": thing.__defaults__, **cells} if made else cells
        return Parts(f"name {name}", held)
    used = {**_globals_of(thing), **_imports_of(thing.__code__)}
    own = {k: v for k, v in vars(thing).items() if k not in ("__signature__", "__type_params__")}
    parts = {"code": thing.__code__, "defaults": thing.__defaults__}
    parts |= {"keyword defaults": thing.__kwdefaults__, "attributes": own, **cells, **used}
    return Parts("function", parts)


def _code(code: CodeType) -> Parts:
    kind = code.co_flags & CODE_FLAGS
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, kind)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    handlers = getattr(code, "co_exceptiontable", b"")  # of Python 3.11 and later
    text = hashed(code.co_code, handlers, repr(counts), repr(names))
    return Parts("code", {"": text, "constants": code.co_consts})


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            yield name, None


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names; of a module of the user's, the members that it names too."""
    names = sorted(_names(function.__code__))
    loaded = sorted(_loaded(function.__code__))
    seen: set[str] = set()

    def resolved(value: Any) -> Any:
        if not isinstance(value, ModuleType) or installed(value.__name__):
            return value
        if value.__name__ in seen:
            return None
        seen.add(value.__name__)
        return {name: resolved(vars(value)[name]) for name in names if name in vars(value)}

    space = function.__globals__
    return {f"global {name}": resolved(space[name]) for name in loaded if name in space}


def _imports_of(code: CodeType) -> dict[str, bytes]:
    """The files of the user that a function imports when it runs, whether or not it has done so."""
    found: dict[str, bytes] = {}
    for instruction in dis.get_instructions(code):
        name = str(instruction.argval)
        root = name.partition(".")[0]
        if instruction.opname != "IMPORT_NAME" or root in {"invguide", *sys.stdlib_module_names}:
            continue
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            continue
        file = spec.origin if spec is not None and spec.has_location else None
        if file is not None and not _in_library(file):
            found[f"import {name}"] = Path(file).read_bytes()
    return found


def _loaded(code: CodeType) -> set[str]:
    """The globals among the names: attributes are among these too, and often called like some global."""
    own = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    nested = (_loaded(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return own.union(*nested)


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
    if root == "invguide" or root in sys.stdlib_module_names:
        return True
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or root == "__main__":
        return False
    if file is None:
        return name in sys.builtin_module_names or root in ("torch", "numpy")
    return _in_library(file)


def _in_library(file: str) -> bool:
    file = os.path.realpath(file)
    return "site-packages" in file or file.startswith(_library_folders())
