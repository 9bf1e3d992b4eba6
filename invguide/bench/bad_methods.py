"""Wrong calls of the public methods: the targets of `invguide.bench.bad_calls` that are methods of good instances.

What a method takes has to be what the plain form of the same argument gives: a number as a float, an array as a tensor.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

import invguide as ig
from invguide.arguments.entries import Entries
from invguide.bench.bad_calls import SHAPE, Call, Target, targets


def method_targets() -> list[Target]:
    """The methods that `entries` names of one instance of every public class, with good arguments."""
    found = []
    for name, thing in _instances():
        good = _good_arguments(thing)
        bound = thing.bind(good["y"]) if isinstance(thing, ig.noise.NoiseModel) else thing
        for method in type(thing).entries:
            call = getattr(thing if method == "bind" else bound, method, None)
            if call is None:
                continue
            wanted = inspect.signature(call).parameters
            arguments = {n: good[n] for n in wanted if n in good}
            if method == "check":
                arguments = {"x": good["x"], "quiet": True}
            if _works(call, arguments):
                found.append(Target(f"{name}.{method}", call, arguments, disagreement))
    done = _result()
    return [*found, Target("Result.save", done.save, {"folder": "folder"})]


def _instances() -> Iterator[tuple[str, Any]]:
    for target in targets():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            thing: Any = None
            if isinstance(target.call, type) and issubclass(target.call, Entries):
                thing = _made(target)
        if thing is not None and not isinstance(thing, ig.BlackBox):  # starts processes
            yield target.name, thing


def _made(target: Target) -> Any:
    if target.name == "operators.Composition":
        return target.call(ig.operators.GaussianBlur(1.0), ig.operators.SuperResolution(2))
    try:
        return target.call(**target.good)
    except ig.InvguideError:  # without the files, or the package, that it needs
        return None


def _good_arguments(thing: Any) -> dict[str, Any]:
    """Values for the arguments of methods, by name."""
    x = torch.linspace(0.2, 0.8, 192).reshape(1, *SHAPE)
    one, all_known = torch.tensor([0]), torch.ones(1, *SHAPE, dtype=torch.bool)
    good: dict[str, Any] = {"index": one, "known": all_known, "predicted": x, "residual": 0.1 * x}
    good |= {"x": x, "x0": x, "n": x, "u": x, "y": x + 0.01, "sigma": 0.5, "ridge": 0.1}
    good |= {"schedule": "karras", "num_steps": 5, "k": 1, "level": 1.0, "count": 2, "rows": 1}
    good |= {"reward": None, "mean": x, "variance": torch.tensor(0.1), "y_shape": SHAPE}
    if isinstance(thing, ig.Prior):
        good["x"] = torch.ones(1, *(n or 8 for n in thing.shape), dtype=thing.dtype)
    if isinstance(thing, ig.Operator):
        y = thing(x)
        good |= {"y": y, "rhs": y, "y_shape": tuple(y.shape[1:])}
        good |= {"sigma": torch.tensor(0.1)}
    return good


def _works(call: Any, arguments: dict[str, Any]) -> bool:
    """Whether a method answers, and is not one that this class has no answer for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(**arguments) is not None
    except (NotImplementedError, ig.InvguideError):
        return False


def _result() -> ig.Result:
    prior = ig.priors.GaussianField(SHAPE, scale=0.2, shift=0.5).float()
    y = torch.full((1, *SHAPE), 0.5)
    quick = {"sigma_y": 0.1, "solver": ig.solvers.DPS(num_steps=2), "progress": False}
    return ig.solve(y, ig.operators.Identity(), prior, **quick)


# ---- whether an answer is that of the plain form


def disagreement(call: Call, answer: Any) -> str:
    """What is wrong with the answer of a method: values that are not finite though all that it was given are, or others
    than for the same arguments in plain form; nothing otherwise.
    """
    given = {**call.target.good, **call.wrong}
    try:
        plain = {n: _plain(v, call.target.good.get(n)) for n, v in given.items()}
    except (TypeError, ValueError, RuntimeError):
        return ""  # no numbers
    parts = [v for v in plain.values() if isinstance(v, (Tensor, float))]
    if not all(bool(torch.as_tensor(v).isfinite().all()) for v in parts):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = call.target.call(**plain)
    for one, other in zip(_tensors(answer), _tensors(wanted)):
        if not bool(one.isfinite().all()):
            return "values that are not finite"
        if one.shape != other.shape or not torch.allclose(
            one, other.to(one), rtol=1e-3, atol=1e-5
        ):
            return "another answer than for the same numbers as a tensor"
    return ""


def _plain(value: Any, like: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to_dense() if value.layout != torch.strided else value
    if isinstance(like, Tensor) and isinstance(value, (list, tuple, np.ndarray)):
        array = np.asarray(value)
        kind = np.complex128 if array.dtype.kind == "c" else np.float64
        return (
            torch.from_numpy(np.array(array, kind))
            if array.dtype.kind in "fc"
            else torch.as_tensor(array)
        )
    if isinstance(value, Real) and isinstance(like, float) and not isinstance(value, bool):
        return float(value)
    return value


def _tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, tuple):
        return [t for t in answer if isinstance(t, Tensor)]
    return []
