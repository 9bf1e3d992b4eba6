"""What runs where the function runs: one call, its answer as plain numpy, its errors as text.

Sent to workers by value (see `workers.ByValue`), so that a worker needs neither invguide nor the seconds that torch
takes to load. Hence only the standard library and numpy here, no state of the module, and plain tuples as answers.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

# (state, value, text, seconds); states: "ok", "failed", "timed out", "bad" for a mistake of the caller, and "unready"
# where the function seems to want a tensor and torch is not loaded here yet, which is not to count as the call's time.
Reply = tuple[str, Any, str, float]

WRONG_KIND = (AttributeError, TypeError)  # what torch code raises on an array
TEXT = 2200  # characters of an error
KEPT = 8  # functions that a worker process remembers


def run(function: Callable[[Any], Any], kind: list[str], x: np.ndarray) -> Reply:
    """Call the function once; whatever it raises becomes text. `kind` remembers what it takes: arrays or tensors."""
    start = time.perf_counter()
    try:
        value, trouble = numbers(answer(function, kind, x))
        state = "bad" if trouble else "ok"
    except TimeoutError as error:
        state, value, trouble = "timed out", None, described(error)
    except (Exception, SystemExit) as error:
        state, value, trouble = "failed", None, described(error)
        if not kind and isinstance(error, WRONG_KIND) and "torch" not in sys.modules:
            state = "unready"
        elif any(
            base.__name__ == "InputError" for base in type(error).__mro__
        ):  # invguide's, not imported here
            state, trouble = "bad", str(error)
    return state, value, trouble, time.perf_counter() - start


def answer(function: Callable[[Any], Any], kind: list[str], x: np.ndarray) -> Any:
    """The function's own answer to a copy of x: as an array, or as a tensor where it cannot take arrays."""
    if kind == ["tensor"]:
        return function(tensor(x))
    try:
        value = function(np.array(x))
    except WRONG_KIND as error:
        if kind or "torch" not in sys.modules:
            raise
        try:
            value = function(tensor(x))
        except Exception as second:
            raise RuntimeError(
                f"with an array {type(error).__name__}: {error}; with a tensor {type(second).__name__}: {second}"
            ) from error
        kind[:] = ["tensor"]
        return value
    kind[:] = ["array"]
    return value


def tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(x))


def numbers(value: Any) -> tuple[np.ndarray | None, str]:
    """Return the answer as an array of numbers, a copy, or what is wrong with it."""
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.resolve_conj().resolve_neg().numpy()
    hint = "expected numbers; raise an exception, or return NaN, where a call has failed"
    try:
        array = np.array(value)
    except ValueError:
        return None, f"returned a {type(value).__name__} that is no array; {hint}"
    if array.dtype.kind not in "biufc":
        what = type(value).__name__ if array.dtype.kind == "O" else "text"
        what = f"an array of dtype {array.dtype}" if isinstance(value, np.ndarray) else what
        return None, f"returned {what}; {hint}"
    if not array.size:
        return None, f"returned an empty array of shape {array.shape}; {hint}"
    return array, ""


def described(error: BaseException) -> str:
    """Kind and message of an error, at most about 2000 characters, and where it was raised unless by this package."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")[:TEXT]
    frames = traceback.extract_tb(error.__traceback__)
    folder, name = os.path.split(frames[-1].filename if frames else "")
    return (
        text if os.path.basename(folder) == "blackbox" else f"{text} ({name}:{frames[-1].lineno})"
    )


# ---- in a worker process


def prepare(digest: str, blob: bytes, parent: int) -> None:
    """Make a local worker ready: it leaves Ctrl-C to its client and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Or loky would restart it, uncalled for, where loading torch or a mesh takes 300 MB.
    sys.modules["loky.process_executor"].__dict__["_USE_PSUTIL"] = False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    load(digest, blob)


def loaded() -> dict[str, tuple[Any, list[str], str]]:
    """The functions that this process has unpickled: a function sent by value has no module to keep them in."""
    module = sys.modules.setdefault("_invguide_functions", ModuleType("_invguide_functions"))
    return module.__dict__.setdefault("functions", {})


def load(digest: str, blob: bytes) -> None:
    """Unpickle the function once; an error is kept, and is the answer to every call."""
    known = loaded()
    try:
        function, kind = pickle.loads(blob)  # noqa: S301  the client's own function
        known[digest] = (function, kind, "")
        if kind == ["tensor"]:
            load_torch()
    except Exception as error:
        known[digest] = (None, [], described(error))
    for old in list(known)[:-KEPT]:
        known.pop(old, None)


def load_torch() -> None:
    import torch  # noqa: F401


def remote(digest: str, blob: bytes, x: np.ndarray | None) -> Reply:
    """`run` the function of this digest, unpickled from blob where it is new; x None only loads it.

    Without a blob the client can make this worker ready for tensors and call again; else it is done at once.
    """
    if digest not in loaded():
        load(digest, blob)
    function, kind, trouble = loaded()[digest]
    if trouble:
        advice = "; install its module there, or define the function in the script itself"
        return "bad", None, f"the worker cannot load the function: {trouble}{advice}", 0.0
    if x is None:
        return "ok", None, "", 0.0
    reply = run(function, kind, x)
    if reply[0] == "unready" and blob:
        load_torch()
        reply = run(function, kind, x)
    return reply
