"""Restore a picture file: read, build the operator, solve, write in kind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide import api
from invguide.engine.checkpoint import saved_identity
from invguide.errors import (
    CheckpointError,
    DivergenceError,
    InputError,
    InvguideError,
    RunError,
    suggest,
)
from invguide.forward_operator import Operator
from invguide.images.known_pixels import put_back, stay_by_default
from invguide.images.noise_level import NoiseLevel, estimate_noise
from invguide.images.panel import write_pictures
from invguide.images.picture_files import check_regular
from invguide.images.reading import Picture, read_picture
from invguide.images.transparency import visible, without_hidden_colours
from invguide.likelihood import Likelihood
from invguide.noise import NoiseModel, Quantised
from invguide.numerics.padding import round_up
from invguide.operators import Composition, Grayscale, Identity, Inpainting
from invguide.planning import Plan, plan
from invguide.policy import choose as choose_solver
from invguide.prior import Prior
from invguide.priors import Grey, LatentPrior, NetworkPrior, Padded, Tiled
from invguide.priors.network import PRECISIONS
from invguide.priors.precision import try_half
from invguide.problem.problem import Problem
from invguide.restoration.conditions import all_conditions, condition_files
from invguide.restoration.jpeg_measurement import Measurement
from invguide.restoration.likely_noise import LEAST, TEXTURE, likely_level
from invguide.restoration.tasks import Options, Task, find_task, to_grey
from invguide.result import Result, strict_json
from invguide.solver import Solver
from invguide.system.devices import out_of_memory, resolve_devices
from invguide.system.run_file import write_whole

WHOLE = 1024 * 1024  # pixels; larger pictures are cut into tiles
LARGE_TILE = 384
TRIAL_WORK = (
    240 * 64 * 64
)  # pixels that the network sees: a trial of its precision takes a twentieth of that time
HOUR = 3600  # seconds
LONG_WORK = 2**26  # pixels times steps times samples, below which no run here takes an hour
CHECKPOINT = "checkpoint.pt"
MANIFEST = "manifest.json"
ARRAYS = ("samples", "mean", "std", "chi2")


@dataclass(frozen=True)
class Settings:
    """Everything besides the picture that decides a restoration.

    Attributes:
        task: Name of a task.
        options: What the task needs.
        sigma_y: Noise standard deviation, white = 1; None: estimated from each picture.
        keep_known: Whether inpainting returns known pixels exactly; None: unless sigma_y says that they are noisy.
        solver: Name, or "auto": the best measured one for one sample, else a posterior sampler.
        solver_settings: Fields of the solver that differ from its defaults.
        prior: Name of an embedded prior, or whatever else of text `load_prior` takes: a file, a folder, a hub id.
        prior_settings: Arguments of `load_prior`, for what a file does not tell.
        condition: What a conditional prior is told, as text: a number, or a file of one array.
        prompt: What a text-conditional prior is told, in words.
        samples: Per picture.
        seed: Of the samples.
        tile: Height and width of the tiles that the prior sees; 0: the whole picture; None: tiles where the picture
            is large, or of another size than the prior takes.
        device: Does not enter the comparison of settings.
        precision: Of the network: "fp32", "bf16", "fp16", or "auto": what a trial finds (`precision_for`).
    """

    task: str
    options: Options = field(default_factory=Options)
    sigma_y: float | None = None
    solver: str = "auto"
    solver_settings: dict[str, Any] = field(default_factory=dict)
    prior: str = "natural"
    prior_settings: dict[str, Any] = field(default_factory=dict)
    condition: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    samples: int = 1
    seed: int = 0
    device: str = "auto"
    tile: int | None = None
    precision: str = "auto"
    keep_known: bool | None = None


@dataclass
class Job:
    """Settings that were checked, with their prior loaded and its files hashed: everything but a picture.

    Attributes:
        fastest: What precision "auto" stands for in long runs; None until a trial tells.
        pictures: How many the run has.
        confirm: Asks whether a run of more than an hour is meant; None: it is only said.
    """

    settings: Settings
    task: Task
    prior: Prior
    condition: dict[str, Tensor]
    weights: str
    say: Callable[[str], None]
    progress: bool = True
    arrays: bool = False
    fastest: str | None = None
    pictures: int = 1
    confirm: Callable[[str], bool] | None = None

    @classmethod
    def prepare(
        cls,
        settings: Settings,
        say: Callable[[str], None],
        progress: bool = True,
        arrays: bool = False,
        fastest: str | None = None,
    ) -> Job:
        """Check whatever can be checked without a picture.

        Raises:
            InputError: Unknown task, solver, prior, setting; a device that is not there; numbers out of range.
        """
        from invguide.priors.checkpoints.loading import weight_files
        from invguide.priors.text.embed import text_files

        task = find_task(settings.task, settings.options)
        _check_sigma(settings.sigma_y)
        if settings.keep_known is not None and "mask" not in task.options:
            raise InputError(
                f"--keep-known is for tasks with missing pixels (inpaint), not for {task.name}: leave it out"
            )
        if settings.samples < 1:
            raise InputError(f"--samples is {settings.samples}; expected at least 1")
        resolve_devices(settings.device)
        if settings.precision not in (*PRECISIONS, "auto"):
            near = suggest(settings.precision, [*PRECISIONS, "auto"])
            raise InputError(f"unknown --precision {settings.precision!r}; {near}")
        if settings.solver.lower() != "auto":
            configured(api.make_solver(settings.solver), settings.solver_settings)
        # Before the prior is loaded: the text encoders of some take more memory than their network.
        condition = all_conditions(settings.condition, settings.prompt, settings.prior)
        prior = api.load_prior(settings.prior, **settings.prior_settings)
        if task.objects and not prior.knows_objects:
            raise InputError(
                f"the task {task.name} needs a prior that knows objects, and {settings.prior} knows small crops only: "
                f"its colours would be guesses; give one of whole pictures like yours, such as --prior "
                f"google/ddpm-church-256 (`invguide priors` lists them)"
            )
        if settings.tile:
            in_tiles(prior, settings.tile, (settings.tile,) * 2)
        encoders = () if settings.prompt is None else text_files(settings.prior)
        weights = sha256(*weight_files(settings.prior), *encoders)
        return cls(settings, task, prior, condition, weights, say, progress, arrays, fastest)

    def identity(self, path: Path) -> dict[str, Any]:
        """What a finished or interrupted restoration of this picture must agree in, ready for JSON."""
        settings, options = self.settings, self.settings.options
        files = {"input": path, "mask": options.mask, "kernel": options.kernel}
        files |= {f"condition {n}": p for n, p in condition_files(settings.condition).items()}
        digests = {name: sha256(file) for name, file in files.items() if file is not None}
        return {
            "task": self.task.name,
            "options": {k: v for k, v in options.given.items() if not isinstance(v, Path)},
            "sigma_y": "auto" if settings.sigma_y is None else settings.sigma_y,
            "keep_known": "auto" if settings.keep_known is None else settings.keep_known,
            "solver": settings.solver.lower(),
            "solver_settings": {k: _plain(v) for k, v in settings.solver_settings.items()},
            "prior": settings.prior,
            "prior_settings": {k: _plain(v) for k, v in settings.prior_settings.items()},
            "condition": settings.condition,
            "prompt": settings.prompt,
            "samples": settings.samples,
            "seed": settings.seed,
            "tile": "auto" if settings.tile is None else settings.tile,
            "precision": settings.precision,
            "sha256": {**digests, "weights": self.weights},
        }


def _check_sigma(sigma: float | None) -> None:
    if sigma is None:
        return
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise InputError(
            f"sigma_y is {sigma:g}; expected a noise standard deviation >= 0, or auto"
        )
    if sigma > 1:
        raise InputError(
            f"sigma_y is {sigma:g}, and white is 1: larger noise leaves nothing to be seen. Levels of 0 to 255 "
            f"are divided by 255: --sigma-y {sigma / 255:.4g}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def sha256(*paths: Path) -> str:
    """Of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        check_regular(path)
        try:
            with path.open("rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "no such file" if missing else str(error.strerror).lower()
            raise InputError(f"{reason}: {path}") from error
    return digest.hexdigest()


def configured(solver: Solver[Any], settings: dict[str, Any]) -> Solver[Any]:
    """Return the solver with these fields replaced; text becomes the type of the field's default.

    Raises:
        InputError: No such field (the nearest is suggested), or a value of another type.
    """
    known = {f.name: f for f in dataclasses.fields(solver)}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise InputError(
                f"{type(solver).__name__} has no setting {name!r}; {suggest(name, known)}"
            )
        values[name] = (
            _parse(name, value, getattr(solver, name)) if isinstance(value, str) else value
        )
    if values.get("num_steps", 1) < 1:
        raise InputError(f"num_steps is {values['num_steps']}; expected at least 1")
    return dataclasses.replace(solver, **values)


def _parse(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float) or default is None:
            return float(text)
        if isinstance(default, tuple):
            return tuple(float(part) for part in text.split(","))
    except (ValueError, KeyError):
        expected = "a number" if default is None else f"such as {default!r}"
        raise InputError(f"setting {name}={text!r}; expected {expected}") from None
    return text


def check_writable(folder: Path) -> None:
    """Make the folder; raise InputError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".invguide-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written to: {error.strerror}; use another --out"
        ) from error


# ---- one picture


@dataclass
class Measured:
    """A picture as a measurement.

    Attributes:
        picture: As read.
        y: (1, C, H, W), what the operator gives.
        operator: From the prior's image to y.
        known: Where y has pixels, for the panel; None: everywhere.
        grey: The unknown is a colour picture, whose luma is measured: the result is made grey.
        keep_known: The known pixels of the result are those of the picture.
        sigma_y: Given or estimated; None where `noise` is another law.
        noise: Of y, where it is not Gaussian of sigma_y.
        note: What was read from the file or assumed of it.
        estimate: Of sigma_y; None where it was given, or is not needed.
    """

    picture: Picture
    y: Tensor
    operator: Operator
    known: Tensor | None
    grey: bool
    sigma_y: float | None
    noise: NoiseModel | None = None
    note: str = ""
    keep_known: bool = False
    estimate: NoiseLevel | None = None

    @property
    def law(self) -> NoiseModel | float:
        law = self.sigma_y if self.noise is None else self.noise
        assert law is not None
        return law


def measure(job: Job, picture: Picture, name: str) -> Measured:
    """Turn a picture into a measurement for the job's prior; colours that nobody sees do not count."""
    shown = visible(picture)
    picture = without_hidden_colours(picture)
    if job.task.measure is not None:
        return _measured_otherwise(job, job.task.measure, picture, name)
    inner = job.task.operator(job.settings.options, picture)
    if isinstance(inner, Inpainting) and shown is not None:
        inner = Inpainting(inner.mask & shown)
    if picture.holes is not None and isinstance(inner, Inpainting):
        _check_holes(picture.holes, inner, name)
    colours = job.prior.sample_shape[0]
    y, operator, grey = picture.values, inner, False
    if isinstance(inner, Grayscale):
        y = to_grey(y)
        if colours != 3:
            raise InputError(
                f"the prior {job.settings.prior} has {colours} channel; colours need one with 3"
            )
    elif picture.grey and colours == 3:
        if not job.prior.affine:  # its decoder gives colours
            operator, grey = Composition(Grayscale(), inner), True
    elif y.shape[1] != colours:
        raise _unfit(job, picture, name)
    known = inner.mask if isinstance(inner, Inpainting) else None
    if known is not None:
        y = y * known.to(y)
    sigma, estimate = job.settings.sigma_y, None
    if sigma is None:
        estimate = estimate_noise(y, shown if known is None else known, picture.bits)
        sigma = estimate.total
        if not estimate.trusted:
            warnings.warn(
                f"{name}: the noise level is a guess, {estimate.sigma:.3g}: {estimate.reason}"
            )
    keep = job.settings.keep_known
    if keep is None:
        keep = stay_by_default(job.settings.sigma_y, picture.bits)
    keep = keep and known is not None
    return Measured(picture, y, operator, known, grey, sigma, keep_known=keep, estimate=estimate)


def _check_holes(holes: np.ndarray, operator: Inpainting, name: str) -> None:
    """Raise InputError where the mask marks as known what the file does not tell."""
    wrong = torch.from_numpy(holes) & operator.mask.any(0)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{name} has {int(wrong.sum())} NaN or infinite values where the mask marks pixels as known (first at row "
            f"{row}, column {column}); paint the mask black there"
        )


def _measured_otherwise(
    job: Job, how: Callable[..., Measurement], picture: Picture, name: str
) -> Measured:
    """The measurement of a task that does not take the pixels for it."""
    colours, sigma = job.prior.sample_shape[0], job.settings.sigma_y
    if colours != 3 and not (picture.grey and colours == 1):
        raise _unfit(job, picture, name)
    found = how(job.settings.options, picture, colours, sigma)
    grey = picture.grey and colours == 3
    return Measured(picture, found.y, found.operator, None, grey, sigma, found.noise, found.note)


def _unfit(job: Job, picture: Picture, name: str) -> InputError:
    return InputError(
        f"{name} has {picture.values.shape[1]} channels and the prior {job.settings.prior} "
        f"{job.prior.sample_shape[0]}; use another prior"
    )


def prior_for(job: Job, measured: Measured) -> Prior:
    """Return the job's prior: grey for a grey unknown, in tiles where asked for or where the picture calls for them.

    A grey picture is its own unknown. Taken as the luma of an unknown colour picture it would not be a noisy signal of
    the prior, and denoising would take a solver for what is one network call and 0.3 dB better.
    """
    shape = _unknown_shape(measured)
    prior = _tiled(job, shape)
    grey = shape[0] == 1 and prior.sample_shape[0] == 3
    return Grey(prior) if grey else prior


def _tiled(job: Job, shape: tuple[int, ...]) -> Prior:
    prior, tile = job.prior, job.settings.tile
    if min(shape[1:]) < prior.min_size and prior.affine and None in prior.shape[1:]:
        return Padded(prior, round_up(prior.min_size, getattr(prior, "multiple", 1)))
    if tile is None and not isinstance(prior, LatentPrior):
        if any(
            own not in (None, size) for own, size in zip(prior.shape[1:], shape[1:], strict=True)
        ):
            return Tiled(prior)
        tile = LARGE_TILE if math.prod(shape[1:]) > WHOLE else 0
    return in_tiles(prior, tile, tuple(shape[1:]))


def _unknown_shape(measured: Measured) -> tuple[int, ...]:
    shape = measured.operator.input_shape(tuple(measured.y.shape[1:]))
    assert shape is not None  # of every task
    return shape


def in_tiles(prior: Prior, tile: int | None, size: tuple[int, ...]) -> Prior:
    """Return the prior in tiles of so many pixels, if any; a latent one for pictures of this size."""
    if isinstance(prior, LatentPrior):
        return prior.for_size(*size, tile=tile or None)
    return Tiled(prior, tile) if tile else prior


def checked(job: Job, measured: Measured, prior: Prior, name: str) -> Measured:
    """Return the measurement with a lower noise level where the estimated one would take texture for noise.

    Only where nothing but noise is to be removed, and brightness has far more of it than colours, as texture has. Noise
    that is not white, as after JPEG or a change of size, is no more likely under the prior than texture is.
    """
    estimate, sigma = measured.estimate, measured.sigma_y
    plain = isinstance(measured.operator, Identity) and measured.noise is None
    if estimate is None or sigma is None or estimate.compression or not (plain and prior.affine):
        return measured
    if not estimate.chroma < sigma / TEXTURE:
        return measured
    likely = likely_level(prior, measured.y, sigma, **job.condition)
    if likely == sigma:
        return measured
    found = "no noise that it could tell" if likely == LEAST else f"{likely:.3g} likely"
    reason = f"the estimate {sigma:.3g} would take texture for noise, and the prior finds {found}"
    warnings.warn(f"{name}: {reason}; pass --sigma-y NUMBER (white = 1) if you know better")
    told = estimate._replace(sigma=likely, trusted=False, reason=reason)
    return dataclasses.replace(measured, sigma_y=likely, estimate=told)


def choose(job: Job, measured: Measured, prior: Prior) -> tuple[Solver[Any], str]:
    """Return the solver with its settings; what "auto" means is said by the task, or else by `invguide.policy`."""
    settings, reason = job.settings, ""
    if settings.solver.lower() != "auto":
        solver = api.make_solver(settings.solver)
    elif settings.samples > 1 and job.task.sampler is not None:
        solver, reason = (
            api.make_solver(job.task.sampler),
            f"the sampler of the task {job.task.name}",
        )
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when it is solved
            likelihood = Likelihood(measured.operator, measured.y, measured.law)
        problem = Problem(prior, likelihood, condition=job.condition)
        solver, reason = choose_solver(problem, settings.samples)
    suited = job.task.solver_settings.get(type(solver).__name__, {})
    return configured(solver, {**suited, **settings.solver_settings}), reason


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
    picture = _read(job, path)
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
    measured = measure(job, picture, str(path))
    prior = prior_for(job, measured)
    measured = checked(job, measured, prior, str(path))
    solver, reason = choose(job, measured, prior)
    job.say(f"{path}: {picture.describe()}")
    job.say(f"  operator  {_describe(measured)}")
    if measured.note:
        job.say(f"  file      {measured.note}")
    if measured.sigma_y is not None:
        job.say(f"  sigma_y   {measured.sigma_y:.4g} ({_told(measured.estimate)})")
    count = _count(job.settings.samples, "sample")
    why = f" ({reason})" if reason else ""
    job.say(
        f"  solver    {type(solver).__name__}, {_count(solver.num_steps, 'step')}, {count}{why}"
    )
    for tiled in (part for part in prior.modules() if isinstance(part, Tiled)):
        job.say(f"  tiles     {' x '.join(map(str, tiled.tile))}, overlap {tiled.overlap}")
    for padded in (part for part in prior.modules() if isinstance(part, Padded)):
        job.say(f"  padded    mirrored to multiples of {padded.multiple} pixels for the prior")
    check_writable(out)
    checkpoint = out / CHECKPOINT
    if not resume:
        checkpoint.unlink(missing_ok=True)
    set_precision(job, prior, solver, _unknown_shape(measured), checkpoint)
    _announce(job, prior, solver, _unknown_shape(measured))
    _remove_old(out)
    result = _solve(job, measured, prior, solver, checkpoint)
    if reason:
        result.manifest["auto"] = reason
    agreement = _agreement(measured, result)
    _finish(job, path, out, measured, identity, result, agreement, title, truth)
    checkpoint.unlink(missing_ok=True)
    verdict = "; ".join(filter(None, (result.diagnosis, agreement)))
    job.say(f"  {verdict}; {result.nfe:.0f} network calls per sample, {result.seconds:.1f} s")
    return result


def _read(job: Job, path: Path) -> Picture:
    """Read a picture; where pixels may be missing, so may their values."""
    return read_picture(path, holes="mask" in job.task.options)


def plan_picture(job: Job, path: Path) -> Plan:
    """Return what `restore_picture` of this file will cost, from a few steps of its solver."""
    measured = measure(job, _read(job, path), str(path))
    prior = prior_for(job, measured)
    measured = checked(job, measured, prior, str(path))
    solver, _ = choose(job, measured, prior)
    set_precision(job, prior, solver, _unknown_shape(measured), None)
    return plan(
        measured.y,
        measured.operator,
        prior,
        **law_of(measured),
        solver=solver,
        num_samples=job.settings.samples,
        condition=job.condition,
        seed=job.settings.seed,
        device=job.settings.device,
    )


def _announce(job: Job, prior: Prior, solver: Solver[Any], shape: tuple[int, ...]) -> None:
    """Say, or ask, before a run of more than an hour; told from one call of the network on a small picture."""
    pixels = math.prod(shape[1:])
    work = pixels * solver.num_steps * job.settings.samples
    if work < LONG_WORK or isinstance(prior, LatentPrior):
        return
    device = resolve_devices(job.settings.device)[0]
    tile = prior.tile[0] if isinstance(prior, Tiled) else max(128, prior.min_size)
    sizes = [own or tile for own in prior.shape[1:]]
    x = torch.zeros(1, shape[0], *sizes, device=device)
    condition, seconds = {k: v.to(device) for k, v in job.condition.items()}, math.inf
    with torch.no_grad():
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            prior.to(device).denoise(x, 1.0, **condition)
            seconds = min(seconds, (time.perf_counter() - start) * work / math.prod(sizes))
    if seconds < HOUR:
        return
    text = (
        f"about {seconds / HOUR:.0f} h for {pixels / 1e6:.0f} million pixels ({shape[2]} x {shape[1]}), "
        f"{solver.num_steps} steps; `invguide plan` tells more"
    )
    if job.confirm is None:
        warnings.warn(f"this takes {text}")
    elif not job.confirm(f"This takes {text}. Go on?"):
        raise InputError(f"not begun: it takes {text}")


WAYS = "use the same settings, or another --out"  # to go on after a refusal


def finished_settings(out: Path) -> dict[str, Any] | None:
    """Return the settings of the finished run in a folder, or None."""
    try:
        return json.loads((out / MANIFEST).read_text("utf-8"))["restore"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare_settings(there: dict[str, Any], here: dict[str, Any], names: list[str]) -> str:
    """Return in words how two runs differ in the settings of these names."""

    def show(value: Any) -> str:
        return str(value)[:60]

    if "sha256" in names:
        old, new = there.get("sha256", {}), here["sha256"]
        files = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        names = [n for n in names if n != "sha256"]
        changed = [f"another {' and '.join(files)} file"]
    else:
        changed = []
    return ", ".join(
        [f"{n}: {show(there.get(n))} there, {show(here[n])} here" for n in names] + changed
    )


def _describe(measured: Measured) -> str:
    inner = measured.operator
    parts = getattr(inner, "parts", [inner])
    names = [f"{type(p).__name__}({p.extra_repr()})" for p in parts]
    if measured.grey:
        return f"{names[-1]} of the luma of a colour picture"
    text = " then ".join(names)
    if measured.known is None:
        return text
    return f"{text}; white is known" + (" and stays" if measured.keep_known else "")


def _told(noise: NoiseLevel | None) -> str:
    """Where the noise level is from."""
    if noise is None:
        return "given"
    rounding = (
        f": noise {noise.sigma:.3g}, rounding of the JPEG file {noise.compression:.3g}"
        if noise.compression
        else ""
    )
    return f"estimated{'' if noise.trusted else ', not to be trusted'}{rounding}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def law_of(measured: Measured) -> dict[str, Any]:
    """The law of y, as arguments of `solve`."""
    if measured.noise is None:
        return {"sigma_y": measured.sigma_y}
    return {"noise": measured.noise}


def _solve(
    job: Job, measured: Measured, prior: Prior, solver: Solver[Any], checkpoint: Path
) -> Result:
    try:
        result = api.solve(
            measured.y,
            measured.operator,
            prior,
            **law_of(measured),
            solver=solver,
            num_samples=job.settings.samples,
            condition=job.condition,
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
        height, width = measured.picture.size
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
    like = (
        measured.picture
        if not isinstance(measured.operator, Grayscale)
        else _in_colour(measured.picture)
    )
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
        "operator_description": _describe(measured),
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


def _in_colour(picture: Picture) -> Picture:
    """The kind of a colourised picture: TIFF of floats is grey only."""
    return dataclasses.replace(picture, bits=min(picture.bits, 16))


def _remove_old(out: Path) -> None:
    """Take away an earlier run: its marker first, then pictures that this one may not overwrite, as restored-4.png."""
    for pattern in (
        MANIFEST,
        "restored*.png",
        "restored*.tiff",
        "mean.*",
        "std.*",
        "panel.png",
        "*.npy",
    ):
        for file in out.glob(pattern):
            if not file.name.endswith(".npy") or file.stem in ARRAYS:
                file.unlink()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write strict JSON (no NaN) in one go."""
    write_whole(path, f"{strict_json(manifest)}\n".encode(), lasting=False)
