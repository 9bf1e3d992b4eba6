"""A first look at a problem on blank signals, before the first network call."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.forward_operator import LinearOperator, Operator, check_batch
from invguide.numerics.trial import adjoint_defect, adjoint_limit
from invguide.problem.problem import Problem
from invguide.problem.shapes import GREY


def probe(problem: Problem) -> None:
    """Run a cheap operator once on blank signals, so that wrong shapes are found before any network call.

    So are gradients of no use: see `Likelihood.try_gradient`.
    """
    likelihood = problem.likelihood
    assert likelihood is not None
    y = likelihood.y
    blank = torch.full(
        (len(y), *problem.data_shape), problem.prior.shift, dtype=y.real.dtype, device=y.device
    )
    noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0)).to(blank)
    signal = blank + 0.25 * problem.prior.scale * noise
    if not likelihood.operator.differentiable:
        likelihood.try_gradient(signal)
        return
    with torch.no_grad():
        predicted = likelihood.operator.to(y.device)(blank)
    check_batch(likelihood.operator, blank, predicted)
    if predicted.shape != y.shape:
        hint = ""
        if predicted.shape[1:] == y.shape:
            hint = "; y lacks its batch axis: pass y[None]"
        elif y.ndim == predicted.ndim > 2 and y.shape[1] == 1 and predicted.shape[1] == 3:
            hint = f"; {GREY}"
        raise ShapeError(
            f"{type(likelihood.operator).__name__} maps x {tuple(problem.data_shape)} to {tuple(predicted.shape[1:])}, "
            f"but y has shape {tuple(y.shape)}; expected ({len(y)}, {', '.join(map(str, predicted.shape[1:]))}){hint}"
        )
    likelihood.try_gradient(signal)
    _try_adjoint(likelihood.operator, signal)


def _try_adjoint(operator: Operator, x: Tensor) -> None:
    """Refuse an operator of the user's own class whose adjoint is none; what adapters make has tried its own."""
    if not isinstance(operator, LinearOperator) or type(operator).__module__.startswith(
        "invguide."
    ):
        return
    defect, limit = adjoint_defect(operator, operator.adjoint, x), adjoint_limit(x.dtype)
    if defect > limit:
        raise InputError(
            f"{type(operator).__name__}.adjoint is not the adjoint of forward: |<A u, v> - <u, A* v>| / |A u||v| = "
            f"{defect:.1g} for random u and v, above {limit:g}; {type(operator).__name__}.check(shape=...) shows more"
        )
