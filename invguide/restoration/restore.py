"""Restore a picture file: read, build the operator, solve, write in kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from invguide import api
from invguide.errors import CheckpointError, DivergenceError, InvguideError, RunError
from invguide.images.known_pixels import put_back
from invguide.images.panel import write_pictures
from invguide.images.reading import Picture, read_picture
from invguide.noise import Quantised
from invguide.planning import Plan, plan_run
from invguide.prior import Prior
from invguide.priors.wrappers.padding import Padded
from invguide.priors.wrappers.tiled import Tiled
from invguide.problem.problem import Problem
from invguide.restoration.manifest import (
    ARRAYS,
    CHECKPOINT,
    MANIFEST,
    WAYS,
    check_writable,
    compare_settings,
    finished_settings,
    remove_old,
    write_manifest,
)
from invguide.restoration.measure import Measured, below_texture, measure, prior_for, told
from invguide.restoration.patience import announce
from invguide.restoration.precision import set_precision
from invguide.restoration.settings import Job, configured
from invguide.restoration.tasks import to_grey
from invguide.result import Result
from invguide.solver import Solver
from invguide.system.devices import out_of_memory


class Prepared(NamedTuple):
    """A picture with all that its restoration takes: prepared once, planned or run once."""

    measured: Measured
    solver: Solver[Any]
    problem: Problem
    reason: str  # why "auto" took this solver

    @property
    def prior(self) -> Prior:
        return self.problem.prior


def prepare(job: Job, path: Path) -> Prepared:
    """Read a picture, and choose its prior and solver; what "auto" means is said by the task, or `invguide.policy`."""
    # Where pixels may be missing, so may their values.
    picture = read_picture(path, holes="mask" in job.task.options)
    measured = measure(job, picture, str(path))
    prior = prior_for(job, measured)
    measured = below_texture(job, measured, prior, str(path))
    settings, named, reason = job.settings, job.settings.solver, ""
    if named.lower() == "auto" and settings.samples > 1 and job.task.sampler is not None:
        named, reason = job.task.sampler, f"the sampler of the task {job.task.name}"
    solver, problem, why = api.prepare(
        measured.y,
        measured.operator,
        prior,
        noise=measured.noise,
        sigma_y=measured.sigma_y if measured.noise is None else None,
        solver=named,
        num_samples=settings.samples,
        condition=job.condition,
    )
    suited = job.task.solver_settings.get(type(solver).__name__, {})
    solver = configured(solver, {**suited, **settings.solver_settings})
    return Prepared(measured, solver, problem, reason or why)


def restore_picture(
    job: Job,
    path: Path,
    out: Path,
    *,
    resume: bool,
    overwrite: bool = True,
    title: str | None = None,
    truth: Picture | None = None,
) -> Result | None:
    """Restore one file into a folder; the manifest is written last and marks it as done.

    Args:
        job: The checked settings.
        path: A picture.
        out: Made where it is missing.
        resume: Go on from the checkpoint of an interrupted run, and leave a finished one alone.
        overwrite: Replace a finished run with other settings, where `resume` is off.
        title: Of the panel; by default file and task.
        truth: The clean picture, for the panel.

    Returns:
        The result; None where it was there already.

    Raises:
        CheckpointError: To be resumed, but under other settings.
        RunError: Diverged, interrupted, or out of memory.
    """
    identity = job.identity(path)
    finished = finished_settings(out)
    if finished is not None and (resume or not overwrite):
        different = [k for k in identity if finished.get(k) != identity[k]]
        if not different:
            job.say(f"{path}: done already, in {out}")
            return None
        raise CheckpointError(
            f"{out} holds a run with other settings ({compare_settings(finished, identity, different)}); "
            f"{WAYS}, or leave out --resume to start over"
        )
    prepared = prepare(job, path)
    measured, solver = prepared.measured, prepared.solver
    _say_what_is_done(job, path, prepared)
    check_writable(out)
    checkpoint = out / CHECKPOINT
    if not resume:
        checkpoint.unlink(missing_ok=True)
    shape = measured.unknown_shape
    set_precision(job, prepared.prior, solver, shape, checkpoint)
    announce(job, prepared.prior, solver, shape)
    remove_old(out)
    result = _run(job, prepared, checkpoint)
    agreement = _agreement(measured, result)
    _finish(job, path, out, measured, identity, result, agreement, title, truth)
    checkpoint.unlink(missing_ok=True)
    verdict = "; ".join(filter(None, (result.diagnosis, agreement)))
    job.say(f"  {verdict}; {result.nfe:.0f} network calls per sample, {result.seconds:.1f} s")
    return result


def plan_picture(job: Job, path: Path) -> Plan:
    """Return what `restore_picture` of this file will cost, from a few steps of its solver."""
    measured, solver, problem, _ = prepare(job, path)
    set_precision(job, problem.prior, solver, measured.unknown_shape, None)
    settings = job.settings
    return plan_run(solver, problem, settings.samples, seed=settings.seed, device=settings.device)


def _say_what_is_done(job: Job, path: Path, prepared: Prepared) -> None:
    measured, solver, problem, reason = prepared
    job.say(f"{path}: {measured.picture.describe()}")
    job.say(f"  operator  {measured.describe()}")
    if measured.note:
        job.say(f"  file      {measured.note}")
    if measured.sigma_y is not None:
        job.say(f"  sigma_y   {measured.sigma_y:.4g} ({told(measured.estimate)})")
    count = _count(job.settings.samples, "sample")
    why = f" ({reason})" if reason else ""
    job.say(
        f"  solver    {type(solver).__name__}, {_count(solver.num_steps, 'step')}, {count}{why}"
    )
    for tiled in (part for part in problem.prior.modules() if isinstance(part, Tiled)):
        job.say(f"  tiles     {' x '.join(map(str, tiled.tile))}, overlap {tiled.overlap}")
    for padded in (part for part in problem.prior.modules() if isinstance(part, Padded)):
        job.say(f"  padded    mirrored to multiples of {padded.multiple} pixels for the prior")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _run(job: Job, prepared: Prepared, checkpoint: Path) -> Result:
    try:
        result = api.run_prepared(
            prepared.solver,
            prepared.problem,
            prepared.reason,
            job.settings.samples,
            seed=job.settings.seed,
            device=job.settings.device,
            progress=job.progress,
            checkpoint=checkpoint,
        )
    except DivergenceError:
        checkpoint.unlink(missing_ok=True)  # it would diverge again
        if not any(checkpoint.parent.iterdir()):
            checkpoint.parent.rmdir()
        raise
    except RuntimeError as error:
        if isinstance(error, InvguideError) or not out_of_memory(error):
            raise
        height, width = prepared.measured.picture.size
        raise RunError(
            f"out of memory at {width} x {height} pixels; use a smaller --tile, or a smaller --prior"
        ) from error
    if any("interrupted" in row for row in result.status):
        raise RunError("interrupted; the same command with --resume goes on from the checkpoint")
    return result


def _finish(
    job: Job,
    path: Path,
    out: Path,
    measured: Measured,
    identity: dict[str, Any],
    result: Result,
    agreement: str,
    title: str | None,
    truth: Picture | None,
) -> None:
    """Write everything, the manifest last."""
    if measured.grey:
        result.samples = to_grey(result.samples)
    if measured.keep_known:
        _put_known_back(result, measured)
    like = measured.picture
    settings, solver = job.settings, result.manifest["settings"]
    facts = [
        f"{solver['solver']}, {solver['num_steps']} steps",
        f"prior {Path(settings.prior).stem}",
        f"{result.nfe:.0f} network calls per sample",
        agreement or f"χ² {float(result.chi2[torch.isfinite(result.chi2)].mean()):.2f}",
        f"{result.seconds:.0f} s",
    ]
    shown = result if measured.noise is None else _with_pixels(result, measured.picture)
    files = write_pictures(
        shown,
        out,
        like=[like],
        truth=None if truth is None else truth.values,
        title=title or f"{path.name}: {job.task.name}",
        facts=facts,
        sigma_y=measured.sigma_y or None,
        known=measured.known,
    )
    if job.arrays:
        files += _save_arrays(result, out)
    manifest = {
        **result.manifest,
        "restore": identity,
        "input": str(path),
        "input_kind": measured.picture.describe(),
        "operator_description": measured.describe(),
        "sigma_y": measured.sigma_y,
        "precision": result.manifest["precision"],
        "sigma_y_from": "estimate" if settings.sigma_y is None else "user",
        "keep_known": measured.keep_known if measured.known is not None else None,
        "noise_estimate": None if measured.estimate is None else measured.estimate._asdict(),
        "diagnosis": result.diagnosis,
        "files": [str(f.relative_to(out)) for f in files],
    }
    write_manifest(out / MANIFEST, manifest)


def _put_known_back(result: Result, measured: Measured) -> None:
    """In every finished sample. chi2 stays that of the solver, whose fit it judges; a residual would be zero."""
    assert measured.known is not None
    done = result.finished
    result.samples[done] = put_back(result.samples[done], measured.picture.values, measured.known)
    result.residual = None


def _agreement(measured: Measured, result: Result) -> str:
    """How much of a rounded measurement the samples explain, in words; empty for other laws."""
    if not isinstance(measured.noise, Quantised):
        return ""
    samples = result.samples[0][result.finished[0]]
    law = measured.noise.bind(measured.y).rows(torch.zeros(len(samples), dtype=torch.long))
    inside = law.agreement(measured.operator(samples), measured.y.expand(len(samples), -1))
    return f"{float(inside.mean()):.1%} of the file's coefficients agree"


def _with_pixels(result: Result, picture: Picture) -> Result:
    """The result with the picture's pixels as its measurement, for the panel."""
    return dataclasses.replace(result, y=picture.values, residual=None)


def _save_arrays(result: Result, out: Path) -> list[Path]:
    files = [out / f"{name}.npy" for name in ARRAYS]
    for name, file in zip(ARRAYS, files, strict=True):
        np.save(file, getattr(result, name).numpy())
    return files
