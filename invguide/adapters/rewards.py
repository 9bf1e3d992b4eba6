"""FunctionReward: any callable as a reward, on torch tensors or numpy arrays, with or without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invguide.errors import InputError, RunError
from invguide.forward_operator import Operator
from invguide.numerics.trial import CUT, RAISES, evaluating, gradient_fault, modules_of
from invguide.reward import Reward, as_scores


@dataclass
class Failures:
    """What went wrong in a black-box reward so far.

    Attributes:
        count: Samples that raised on their own, and are NaN.
        batches: Calls with a batch that raised, after which the rows were asked one by one.
        first: The first exception's text.
    """

    count: int = 0
    batches: int = 0
    first: str = ""


# How a function may be called, in the order that the first call tries. A tensor that wants gradients comes first: numpy
# functions refuse it, instead of half understanding it.
GRADIENT, ARRAY, TENSOR = "a tensor with gradients", "an array", "a tensor"


class FunctionReward(Reward):
    """A callable (B, *shape) -> (B,) on torch tensors or numpy arrays, given a copy of x each time.

    The first call finds out which, and whether gradients reach x and are not zero wherever one looks; until then
    `differentiable` is True, unless it was declared, and afterwards `fault` says why it is not. Modules that the
    function holds run in evaluation mode, and are left as they were found. A black box that raises for a batch is asked
    row by row: rows that raise are NaN, and are counted in `failures`. The exceptions of a differentiable one pass.

    Args:
        function: (B, *shape) -> (B,), data units, higher is better.
        differentiable: Whether gradients may be taken. Default None: the first call finds out; False for one whose
            gradient is of no use, True to be told where there is none.

    Raises:
        InputError: Neither a tensor nor an array can be passed, something else than numbers is returned, or a gradient
            is wanted where there is none or where the function changes its input in place.
        ShapeError: Not one value per sample.
        RunError: A black box raised for every row of a batch.
    """

    def __init__(self, function: Callable[[Any], Any], differentiable: bool | None = None) -> None:
        self.function, self.declared = function, differentiable
        self.differentiable = differentiable is not False
        self.failures = Failures()
        self.fault: str | None = None
        self._way = GRADIENT if differentiable else None

    def __call__(self, x: Tensor) -> Tensor:
        way = self._way_for(x)
        if way == GRADIENT:
            return as_scores(self._open_call(x), x, repr(self))
        try:
            value = self._closed_call(x, way)
        except Exception as error:
            return self._row_by_row(x, way, error)
        return as_scores(value, x, repr(self))

    def _way_for(self, x: Tensor) -> str:
        """Find out, once, how the function wants to be called: by the first row, else the batch or any row."""
        if isinstance(self.function, nn.Module):
            self.function.to(x.device)
        if self._way is not None:
            return self._way
        errors: dict[str, Exception] = {}
        with torch.inference_mode(False), torch.enable_grad():
            probe = x.detach().clone().requires_grad_()
            for rows in (probe[:1], probe, *_single_rows(probe)[1:]):
                for way in (GRADIENT, ARRAY, TENSOR):
                    try:
                        value = self._call(_copy(rows, way))
                    except Exception as error:
                        errors.setdefault(way, error)
                        continue
                    if way == GRADIENT:
                        way = self._tensor_way(rows, value)
                    self._way, self.differentiable = way, way == GRADIENT
                    return way
        first, second = errors[GRADIENT], errors[ARRAY]
        raise InputError(
            f"{self!r} takes neither a tensor of shape {tuple(x.shape)} ({_text(first)}) nor an array "
            f"({_text(second)}), nor a single row; expected (N, *shape) -> (N,). What takes one sample at a time, "
            f"a Command too, can be given as BlackBox(...)"
        ) from first

    def _tensor_way(self, rows: Tensor, value: Any) -> str:
        if self.declared is False:
            return TENSOR
        reached = isinstance(value, Tensor) and value.grad_fn is not None
        fault = gradient_fault(self._call, rows, value) if reached else CUT
        if fault is None or fault.startswith(RAISES):  # which is told where a gradient is wanted
            return GRADIENT
        self.fault = f"its gradient {fault}"
        return TENSOR

    def _call(self, x: Any) -> Any:
        with evaluating(*modules_of(self.function), but=Operator):
            return self.function(x)

    def _open_call(self, x: Tensor) -> Any:
        """Call the function so that gradients may pass."""
        given = _copy(x, GRADIENT)
        try:
            value = self._call(given)
        except Exception as error:
            note = (
                f"raised by {self!r}, given {tuple(x.shape)}; to have samples that raise left out, declare it a black "
                f"box: as_reward(function, differentiable=False)"
            )
            getattr(error, "add_note", str)(note)  # Python 3.10 has no notes
            raise
        if given.requires_grad:
            # Left alone, this fails much later, in the backward pass, where nothing names the reward.
            if given._version > 0:
                raise InputError(
                    f"{self!r} changes its input in place, where gradients are taken; write x = x * 2, not x *= 2, "
                    f"and clamp, not clamp_"
                )
            if self.declared and not (isinstance(value, Tensor) and value.requires_grad):
                raise InputError(
                    f"{self!r} was declared differentiable, but its gradient does not reach x; use torch operations "
                    f"only, without detach, or declare differentiable=False"
                )
        return value

    def _closed_call(self, x: Tensor, way: str) -> Any:
        with torch.no_grad():
            return self._call(_copy(x, way))

    def _row_by_row(self, x: Tensor, way: str, error: Exception) -> Tensor:
        self.failures.batches += 1
        self.failures.first = self.failures.first or _text(error)
        scores: list[Tensor] = []
        failed = 0
        for row in _single_rows(x):
            try:
                value = self._closed_call(row, way)
            except Exception:
                failed += 1
                value = np.full(1, np.nan)
            scores.append(as_scores(value, row, repr(self)))
        self.failures.count += failed
        if failed == len(x):
            raise RunError(
                f"{self!r} raised for every one of {len(x)} samples: {_text(error)}"
            ) from error
        return torch.cat(scores)

    def changes_input(self, x: Tensor) -> bool:
        given = _copy(x, self._way_for(x))
        self._call(given)
        return not torch.equal(torch.as_tensor(given, device=x.device), x)

    def identity_parts(self) -> Any:
        """What decides the results, for checkpoints; not what the first call finds out, and no counts."""
        return {"function": self.function, "differentiable": self.declared}

    def __repr__(self) -> str:
        return f"as_reward({getattr(self.function, '__name__', type(self.function).__name__)})"


def _single_rows(x: Tensor) -> list[Tensor]:
    return [x[i : i + 1] for i in range(len(x))]


def _copy(x: Tensor, way: str) -> Any:
    """Return what the function is given: always a copy, so that ours cannot change."""
    if way == ARRAY:
        return np.array(x.detach().cpu().numpy())
    return x.clone() if way == GRADIENT else x.detach().clone()


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
