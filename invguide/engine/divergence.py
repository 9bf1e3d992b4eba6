"""What counts as divergence, and what only looks odd: rules on numbers, nothing else.

A run diverges in one of two ways. On its way, something is no finite number any more, or a signal is RUNAWAY times
as large as the noise that it began with. At its end, a sample is both too large for a clean signal and a worse answer
than a blank one. One of the two alone is no divergence: a reward may ask for large signals, a measurement may lie far
out, the prior may tell its size wrongly, and a poor sample may be what there is. Those are kept, with a warning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from invguide.solver import Solver

# A signal this many times larger than the largest noise level is lost, though not yet infinite. Other parts of a state,
# such as moments of an optimiser, have units of their own and need only be finite.
RUNAWAY = 1e4
SIGNALS = ("x", "x0", "denoised")
TOO_LARGE = 2.0  # root mean squares of clean signals, for signals of many numbers
FAR_TOO_LARGE = 5.0  # the same, where no chi2 tells how bad the answer is
TOO_BAD = 2.0  # chi2 of a blank signal
NEGLIGIBLE = 1e-3  # share of an equal weight below which a member of an ensemble may be anywhere


class Broken(NamedTuple):
    """The first tensor of a state that is lost in one row."""

    row: int
    name: str
    peak: float


def broken_rows(state: Any, sigma_max: float) -> list[Broken]:
    """Return the rows of a state (a NamedTuple of tensors (B, ...)) that are not finite, or that ran away, in order."""
    found: dict[int, Broken] = {}
    for name, tensor in zip(state._fields, state, strict=True):
        if name.startswith("log_"):  # of something impossible
            tensor = tensor.masked_fill(tensor == -torch.inf, 0.0)
        peak = tensor.abs().reshape(len(tensor), -1).amax(1)
        limit = RUNAWAY * sigma_max if name in SIGNALS else float("inf")
        bad = ~(peak < limit)  # NaN compares false
        if bool(bad.any()):
            for i in bad.nonzero().flatten().tolist():
                found.setdefault(i, Broken(i, name, float(peak[i])))
    return [found[i] for i in sorted(found)]


class Outcome(NamedTuple):
    """How samples ended, and how a blank signal would have, (B,) each; NaN where that is unknown or does not apply."""

    rms: Tensor
    chi2: Tensor
    log_prob: Tensor
    blank_chi2: Tensor
    blank_log_prob: Tensor


class Verdict(NamedTuple):
    """Booleans (B,)."""

    lost: Tensor
    large: Tensor  # larger than clean signals are
    poor: Tensor  # a worse answer to y than a blank signal


def size_limit(size: float, numbers: int, factor: float = TOO_LARGE) -> float:
    """Root mean square above which a signal is too large for a clean one; signals of few numbers scatter more.

    The mean square of n normals has a standard deviation of sqrt(2 / n): what 40 / n adds is seven of them for n = 16,
    and more for less.
    """
    return size * (factor**2 + 40 / numbers) ** 0.5


def judge(
    outcome: Outcome, size: float, numbers: int, measured: int, must_be_finite: bool
) -> Verdict:
    """Tell which samples are lost, and which are odd.

    Args:
        outcome: Of each sample.
        size: Root mean square of clean signals.
        numbers: Of one signal.
        measured: Numbers of one measurement: chi2 scatters where they are few.
        must_be_finite: Whether the target is defined everywhere: a black box may fail on a good sample.
    """
    rms, chi2, log_prob, blank_chi2, blank_log_prob = outcome
    undefined = ~torch.isfinite(log_prob) & must_be_finite
    poor = chi2 > TOO_BAD * blank_chi2.clamp_min(5 + 200 / measured)
    worse = (log_prob < blank_log_prob) & (poor | blank_chi2.isnan())
    large = ~(rms < size_limit(size, numbers))
    far = torch.where(blank_chi2.isnan(), ~(rms < size_limit(size, numbers, FAR_TOO_LARGE)), large)
    return Verdict(~torch.isfinite(rms) | (far & (worse | undefined)), large, poor)


def describe(outcome: Outcome, verdict: Verdict, row: int, size: float) -> str:
    """Say what is odd about a sample; empty where nothing is."""
    rms, chi2, log_prob, blank_chi2, blank_log_prob = (values[row].item() for values in outcome)
    found: list[str] = []
    if verdict.large[row]:
        found.append(f"ends at rms {rms:.3g}, where clean signals have about {size:.3g}")
    if verdict.poor[row]:
        found.append(
            f"explains y less well than a blank signal: chi2 {chi2:.3g} against {blank_chi2:.3g}"
        )
    elif verdict.lost[row]:
        found.append(f"has a log target of {log_prob:.3g} (a blank signal: {blank_log_prob:.3g})")
    return " and ".join(found)


def matters(lost: Tensor, weights: Tensor) -> Tensor:
    """Which lost members of an ensemble, (J,), have a share of the weights, which sum to 1."""
    return lost & (weights > NEGLIGIBLE / len(weights))


def likely_cause(solver: Solver[Any]) -> str:
    """Why a signal grew without bound, as far as the settings tell."""
    others = "sigma_y far too small for y, or an operator that grows too fast outside its domain (clamp its input)"
    scale = solver.settings.get("guidance_scale")
    if not scale:
        return f"Likely causes: {others}."
    blame = (
        f"guidance_scale={scale:g} is too large for this operator and sigma_y; try {scale / 10:g}"
    )
    if scale > type(solver).__dataclass_fields__["guidance_scale"].default:
        return f"Likely cause: {blame}."
    return f"Likely cause: {blame}. Else: {others}."
