"""Everything besides the picture that decides a restoration, checked before a picture is read."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from invguide import api
from invguide.errors import InputError, suggest
from invguide.images.picture_files import check_regular
from invguide.prior import Prior
from invguide.priors.network import PRECISIONS
from invguide.priors.wrappers.latent import LatentPrior
from invguide.priors.wrappers.tiled import Tiled
from invguide.restoration.conditions import all_conditions, condition_files
from invguide.restoration.tasks import Options, Task, find_task
from invguide.solver import Solver
from invguide.system.devices import resolve_devices


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


def in_tiles(prior: Prior, tile: int | None, size: tuple[int, ...]) -> Prior:
    """Return the prior in tiles of so many pixels, if any; a latent one for pictures of this size."""
    if isinstance(prior, LatentPrior):
        return prior.for_size(*size, tile=tile or None)
    return Tiled(prior, tile) if tile else prior
