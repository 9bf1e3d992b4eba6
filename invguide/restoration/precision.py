"""The precision of the network in a restoration: given, kept, or found by a trial."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from invguide.engine.checkpoint import saved_identity
from invguide.prior import Prior
from invguide.priors.network import PRECISIONS, NetworkPrior
from invguide.priors.precision import try_half
from invguide.restoration.settings import Job
from invguide.solver import Solver
from invguide.system.devices import resolve_devices

TRIAL_WORK = (
    240 * 64 * 64
)  # pixels that the network sees: a trial of its precision takes a twentieth of that time


def fastest_precision(job: Job) -> str:
    """Return what a trial on the job's device finds: bf16 where that is faster and as good, else fp32; said once."""
    if job.fastest is None:
        trial = None
        if isinstance(job.prior, NetworkPrior):
            prior = job.prior.to(resolve_devices(job.settings.device)[0])
            trial = try_half(prior, job.condition)
        job.fastest = "fp32" if trial is None else trial.dtype
        if trial is not None:
            job.say(f"  trial     {trial}")
    return job.fastest


def set_precision(
    job: Job, prior: Prior, solver: Solver[Any], size: tuple[int, ...], checkpoint: Path | None
) -> None:
    """Bring the network into the precision that was asked for.

    "auto" is what an interrupted run had, so that it goes on to the same result; fp32 where the run is shorter than
    the trial; else what the trial finds.
    """
    precision = job.settings.precision
    if precision == "auto":
        saved = {} if checkpoint is None else saved_identity(checkpoint)
        work = job.pictures * solver.num_steps * job.settings.samples * math.prod(size[1:])
        if saved.get("precision") in PRECISIONS:
            precision = saved["precision"]
        else:
            precision = "fp32" if work < TRIAL_WORK else fastest_precision(job)
    if precision != prior.precision:
        prior.optimise(precision, channels_last=precision != "fp32")
