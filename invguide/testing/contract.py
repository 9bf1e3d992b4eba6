"""Promises in turn, and the one error that tells which is broken."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from invguide.errors import ContractError, InputError, suggest


class Broken(Exception):
    """What is wrong, in words; `keep` adds whose promise that is."""


def expect(kept: bool, otherwise: str) -> None:
    """Raise Broken unless a promise is kept."""
    if not kept:
        raise Broken(otherwise)


def keep(
    subject: str, promises: Mapping[str, Callable[[], None]], exceptions: Mapping[str, str]
) -> None:
    """Look at each promise.

    Args:
        subject: Whose promises they are, for messages.
        promises: {name: check}, which raises Broken, or anything else, where the promise is broken.
        exceptions: {name: why it cannot be kept}; those must be broken indeed.

    Raises:
        ContractError: A promise is broken, or kept although an exception is declared for it.
        InputError: An exception for a promise that does not exist, or without a reason.
    """
    for name, reason in exceptions.items():
        if name not in promises:
            raise InputError(f"exceptions: no promise {name!r}; {suggest(name, promises)}")
        if not reason.strip():
            raise InputError(f"exceptions: {name!r} has no reason; tell why it cannot be kept")
    for name, look in promises.items():
        with _left_alone():
            fault, cause = _fault(look)
        if name in exceptions:
            if fault is None:
                raise ContractError(
                    f"{subject} keeps the promise {name!r}, for which an exception is declared "
                    f"({exceptions[name]}): take it out",
                    name,
                )
        elif fault is not None:
            raise ContractError(f"{subject} breaks the promise {name!r}: {fault}", name) from cause


def _fault(look: Callable[[], None]) -> tuple[str | None, Exception | None]:
    try:
        look()
    except Broken as broken:
        return str(broken), None
    except Exception as error:
        return f"{type(error).__name__}: {error}", error
    return None, None


@contextmanager
def _left_alone() -> Generator[None]:
    """Warnings of runs that are made to look at something are nobody's; global generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors; infinite where shapes or values that are not finite differ."""
    if a.shape != b.shape or bool((a.isfinite() != b.isfinite()).any()):
        return float("inf")
    return float((a - b).abs().nan_to_num(0.0).max()) if a.numel() else 0.0


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())


def sample_moments(subject: str, draws: Tensor, clean: Tensor, slack: float) -> None:
    """Raise Broken unless draws (N, *shape) have mean and spread of clean signals (M, *shape).

    Along every coordinate, if there are at most eight, and along eight random directions: the difference of means is
    within five standard errors (a chance of 1e-6) and `slack` spreads, that of spreads likewise. The standard error of
    a spread is sqrt((kurtosis - 1) / 4 N), with the larger of both kurtoses and of that of a normal.
    """
    a, b = draws.flatten(1).double(), clean.flatten(1).double()
    d = a.shape[1]
    source = torch.Generator().manual_seed(0)
    turned = torch.randn(d, 8, generator=source, dtype=torch.float64) / d**0.5
    directions = torch.cat([torch.eye(d).double(), turned], 1) if d <= 8 else turned
    for direction in directions.mT:
        u, v = a @ direction, b @ direction
        spread = float(v.std())
        heavy = max(3.0, *(float(((w - w.mean()) ** 4).mean() / w.var() ** 2) for w in (u, v)))
        count = 1 / len(u) + 1 / len(v)
        shift, allowed = abs(float(u.mean() - v.mean())), (5 * count**0.5 + slack) * spread
        expect(
            shift <= allowed,
            f"{subject} have a mean {shift:.3g} off that of the prior along one direction, where its spread is "
            f"{spread:.3g}; expected at most {allowed:.3g} for {len(u)} draws",
        )
        ratio, margin = float(u.std()) / spread, 5 * (count * (heavy - 1) / 4) ** 0.5 + slack
        expect(
            abs(ratio - 1) <= margin,
            f"{subject} have {ratio:.3f} times the spread of the prior along one direction; expected 1 within "
            f"{margin:.3f} for {len(u)} draws",
        )
