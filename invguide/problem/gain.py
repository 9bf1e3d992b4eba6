"""Noise in units of signals: that of y over the gain of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invguide.noise import GaussianLaw
from invguide.numerics.linear import norm

if TYPE_CHECKING:
    from invguide.problem.problem import Problem


def noise_in_signals(problem: Problem) -> Tensor | None:
    """See `Problem.noise_level`."""
    if problem.likelihood is None or not problem.prior.affine:
        return None
    law, y = problem.likelihood.noise, problem.y
    sigma = law.sigma(y, y)
    if sigma is None or law.squares(y, y) is None:
        return None
    sigma = sigma.expand(y.shape).flatten(1).contiguous()  # median misreads expanded ones
    if isinstance(law, GaussianLaw):
        sigma = sigma.median(1).values
    else:
        scale = sigma.amax(1, keepdim=True)
        known = problem.likelihood.only_known(torch.ones_like(y.real)).flatten(1)
        square = known * (sigma / scale) ** 2
        sigma = scale[:, 0] * ((square**2).sum(1) / square.sum(1)).sqrt()
    return sigma / problem.gain() / problem.prior.scale


def gain_of(problem: Problem) -> Tensor:
    """By how much a change of a signal comes out larger in y, (B,): root mean square over that of the change.

    The larger of two changes: from dark to bright everywhere, and, for maps that are blind to that, a white one.
    """
    assert problem.likelihood is not None
    likelihood, y = problem.likelihood, problem.y
    dark = torch.full(
        (len(y), *problem.data_shape), problem.prior.shift, dtype=y.real.dtype, device=y.device
    )
    dark = dark - problem.prior.scale
    source = torch.Generator().manual_seed(0)
    white = torch.randn(dark.shape[1:], generator=source, dtype=dark.dtype).to(dark)
    found: list[Tensor] = []
    with torch.no_grad():
        start = likelihood.residual(dark)
        for change in (torch.ones_like(dark), white.expand_as(dark)):
            there = likelihood.residual(dark + 2 * problem.prior.scale * change)
            size = (likelihood.sizes / change[0].numel()).sqrt() * norm(change)
            found.append(norm(start - there) / (2 * problem.prior.scale * size))
    # A nonlinear operator may know nothing of white signals.
    gain = torch.stack(found).nan_to_num(0.0, posinf=0.0).amax(0)
    return torch.where(gain > 0, gain, 1.0)
