"""What fits together: the shape of a signal, rows of conditions, and where a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.arrays import Refused, as_tensor
from invguide.arguments.rules import shown
from invguide.errors import InputError, InvguideError, ShapeError
from invguide.likelihood import Likelihood
from invguide.prior import Prior

if TYPE_CHECKING:
    from invguide.problem.problem import Problem


GREY = (
    "y is grey and the prior one of colour pictures: take ig.priors.Grey(prior), or operators.Grayscale() for an x in "
    "colour"
)


def condition_rows(name: str, value: Any, rows: int | None) -> Tensor:
    """A condition in any plain form: 3, [3, 5], np.int64(3), an array, a tensor; one row per measurement, if any."""
    try:
        tensor = as_tensor(value)
    except Refused as refused:
        wanted = "" if isinstance(value, (str, bytes)) else str(refused)
        wanted = wanted or "expected numbers: a tensor, an array, a list or one number"
        raise InputError(f"condition {name!r} is {shown(value)}; {wanted}") from None
    tensor = tensor[None] if tensor.ndim == 0 else tensor
    if rows is None:
        return tensor
    if len(tensor) == 1 and rows > 1:
        tensor = tensor.expand(rows, *tensor.shape[1:])
    if len(tensor) != rows:
        raise ShapeError(
            f"condition {name!r} has {len(tensor)} rows; expected one per measurement ({rows}), or one for all"
        )
    return tensor


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...] | None) -> bool:
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(p in (None, n) for p, n in zip(wanted, shape, strict=True))
    )


def _how_to_fit(prior: Prior, likelihood: Likelihood) -> str:
    """Which arrangement of y would suit the prior, as arrays come from other programs."""
    shape = tuple(likelihood.y.shape)
    last_first = (*shape[:1], *shape[-1:], *shape[1:-1]), (*shape[-1:], *shape[:-1])
    for one, fix in (
        (shape, "y lacks its batch axis: pass y[None]"),
        (last_first[0][1:], "channels come first: pass np.moveaxis(y, -1, 1)"),
        (
            last_first[1],
            "channels come first, after the batch axis: pass np.moveaxis(y, -1, 0)[None]",
        ),
    ):
        try:
            told = likelihood.operator.input_shape(one)
            if told is not None and _fits(prior.sample_shape, tuple(told)):
                return fix
        except (InvguideError, ValueError, IndexError):  # no shape for this operator
            continue
    if len(shape) == len(prior.sample_shape) + 1 and shape[1] == 1 and prior.sample_shape[0] == 3:
        return GREY
    return "resize or tile y"


def resolve_shape(
    prior: Prior, likelihood: Likelihood | None, shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    known = prior.normalised_shape(tuple(shape)) if shape is not None else None
    if known is None and all(n is not None for n in prior.shape):
        known = tuple(int(n) for n in prior.shape if n is not None)
    if known is None and likelihood is not None:
        known = likelihood.operator.input_shape(tuple(likelihood.y.shape[1:]))
        known = None if known is None else prior.normalised_shape(tuple(known))
    if known is None:
        raise ShapeError(
            f"the shape of x is unknown: the prior takes {prior.shape} and the operator cannot tell; "
            f"pass shape=(...), one sample without the batch axis"
        )
    if not _fits(prior.shape, known):
        fix = "resize or tile y" if likelihood is None else _how_to_fit(prior, likelihood)
        raise ShapeError(
            f"x would have shape {known}, but the prior was trained on {prior.shape}; {fix}"
        )
    small = [
        n for n, p in zip(known, prior.shape, strict=True) if p is None and n < prior.min_size
    ]
    if small:
        raise ShapeError(
            f"x would have shape {known}, but this prior needs at least {prior.min_size} along each free axis; "
            f"wrap it as ig.priors.Padded(prior, {prior.min_size}), or enlarge the picture first"
        )
    return known


def starting_point(
    problem: Problem, init: Tensor | np.ndarray | None, init_noise: float | None
) -> tuple[Tensor | None, float]:
    """Where a run begins, normalised units, (B, *shape), and the highest level of its schedules."""
    prior, top = problem.prior, problem.prior.sigma_max
    if init is None and init_noise is None:
        return None, top
    if init is None or init_noise is None:
        raise InputError(
            "init and init_noise belong together: clean signals to start from, and the standard deviation of the "
            "noise added to them, data units (0.3 changes details of pictures in [0, 1], 1 nearly all)"
        )
    if not prior.affine:
        raise InputError(
            "init= with a prior of latents: it would have to be encoded; leave it out"
        )
    level = float(init_noise) / prior.scale
    if not prior.sigma_min < level <= top:
        raise InputError(
            f"init_noise is {float(init_noise):g}; expected a standard deviation above "
            f"{prior.sigma_min * prior.scale:g} and at most {top * prior.scale:g}, data units"
        )
    start = torch.as_tensor(init).to(problem.like)
    wanted = (problem.num_measurements, *problem.data_shape)
    if start.shape == wanted[1:]:
        start = start[None]
    if start.shape[1:] != wanted[1:] or len(start) not in (1, wanted[0]):
        raise ShapeError(
            f"init has shape {tuple(start.shape)}; expected clean signals {wanted}, one per measurement"
        )
    if not bool(start.isfinite().all()):
        raise InputError("init has NaN or infinite values; expected clean signals, data units")
    return prior.to_normalised(start).expand(wanted[0], *start.shape[1:]), level
