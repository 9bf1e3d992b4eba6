"""Options that several commands share, written once: a dataclass of them is one argument of a command."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from invguide.cli.terminal import Device, Seed, pairs

if TYPE_CHECKING:
    from invguide.restoration.settings import Settings
    from invguide.restoration.tasks import Options

Condition = Annotated[
    list[str] | None,
    typer.Option(
        "--condition",
        metavar="NAME=VALUE",
        help="What a conditional prior is told: label=207, or text=FILE.npy with one row.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What a text-conditional prior is told, in words; its text encoders embed it.",
    ),
]


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command have dataclasses for arguments: each field is an option, of the field's name, help and default."""
    hints = get_type_hints(function, include_extras=True)
    plain, grouped = [], {}
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            grouped[parameter.name] = kind
        else:
            plain.append(parameter.replace(annotation=kind))
    for kind in grouped.values():
        told = get_type_hints(kind, include_extras=True)
        plain += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=told[field.name],
            )
            for field in fields(kind)  # pyright: ignore[reportArgumentType]
        ]

    @functools.wraps(function)
    def expanded(**values: Any) -> None:
        for name, kind in grouped.items():
            own = {field.name: values.pop(field.name) for field in fields(kind)}
            values[name] = kind(**own)
        function(**values)

    expanded.__signature__ = inspect.Signature(plain)  # pyright: ignore[reportAttributeAccessIssue]
    expanded.__annotations__ = {p.name: p.annotation for p in plain}
    return expanded


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What was done to the picture."""

    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="denoise, deblur, motion-deblur, inpaint, super-resolution, jpeg or hdr; colorize, with a --prior "
            "that knows objects.",
        ),
    ]
    mask: Annotated[
        Path | None,
        typer.Option(
            help="inpaint: picture of the same size, white (or opaque, if alpha varies) = known."
        ),
    ] = None
    invert_mask: Annotated[
        bool, typer.Option("--invert-mask", help="inpaint: black (or transparent) = known.")
    ] = False
    kernel: Annotated[
        Path | None,
        typer.Option(
            help="deblur: kernel of odd size as picture, .npy, .txt or .csv; scaled to sum 1."
        ),
    ] = None
    blur_sigma: Annotated[
        float | None,
        typer.Option(help="deblur: standard deviation of a Gaussian in pixels [1.5]."),
    ] = None
    length: Annotated[float | None, typer.Option(help="motion-deblur: pixels [9].")] = None
    angle: Annotated[
        float | None,
        typer.Option(help="motion-deblur: degrees, counter-clockwise from the right [0]."),
    ] = None
    factor: Annotated[int | None, typer.Option(help="super-resolution: how much larger [4].")] = (
        None
    )
    filter: Annotated[
        str | None, typer.Option(help="super-resolution: bicubic, box or gaussian [bicubic].")
    ] = None
    quality: Annotated[
        float | None, typer.Option(help="jpeg: 1 to 100 [what the file tells].")
    ] = None
    gain: Annotated[float | None, typer.Option(help="hdr: over-exposure, 2 is one stop [2].")] = (
        None
    )

    def for_task(self) -> Options:
        from invguide.restoration.tasks import Options

        return Options(
            self.mask,
            self.invert_mask or None,
            self.kernel,
            self.blur_sigma,
            self.length,
            self.angle,
            self.factor,
            self.filter,
            self.quality,
            self.gain,
        )


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(TaskOptions):
    """How it is restored, and where the results go."""

    sigma_y: Annotated[
        str,
        typer.Option("--sigma-y", help="Noise standard deviation, white = 1, or auto: estimated."),
    ] = "auto"
    keep_known: Annotated[
        bool | None,
        typer.Option(
            "--keep-known/--no-keep-known",
            help="inpaint: return known pixels exactly, or denoised [exactly, unless --sigma-y gives a noise level].",
        ),
    ] = None
    solver: Annotated[
        str,
        typer.Option(
            help="`invguide solvers` lists them; auto: a point estimate for one sample, a sampler for several."
        ),
    ] = "auto"
    prior: Annotated[
        str,
        typer.Option(
            "--prior",
            help="`invguide priors` lists them: an embedded one, a weights file, a folder of diffusers, a hub id.",
        ),
    ] = "natural"
    prior_set: Annotated[
        list[str] | None,
        typer.Option(
            "--prior-set",
            metavar="NAME=VALUE",
            help="Any argument of load_prior, such as preset=...",
        ),
    ] = None
    condition: Condition = None
    prompt: Prompt = None
    samples: Annotated[
        int, typer.Option(help="Restorations to draw; two or more give mean and uncertainty.")
    ] = 1
    steps: Annotated[int | None, typer.Option(help="Of the solver [its default].")] = None
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of solvers that have one [their default].")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the solver."),
    ] = None
    tile: Annotated[
        int | None,
        typer.Option(
            help="Pixels per side of overlapping tiles, for large pictures; 0: none [as needed]."
        ),
    ] = None
    precision: Annotated[
        str,
        typer.Option(
            help="Of the network: fp32, bf16, fp16, or auto: bf16 where a short trial here finds it faster and as good."
        ),
    ] = "auto"
    seed: Seed = 0
    device: Device = "auto"
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results [IN-restored]; or a picture file, such as new.jpg, for the result alone."
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where an interrupted run stopped (a folder always does)."
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="A folder: do again what was done with other settings."),
    ] = False
    arrays: Annotated[
        bool,
        typer.Option("--arrays", help="Also write samples.npy, mean.npy, std.npy and chi2.npy."),
    ] = False
    workers: Annotated[
        int | None,
        typer.Option(help="A folder: processes, each with its own prior, and GPU if there are."),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(help="A folder: address of a dask scheduler, for many machines.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Errors only.")] = False

    def settings(self) -> Settings:
        from invguide.restoration.settings import Settings

        return Settings(
            self.task,
            self.for_task(),
            sigma_y=_sigma(self.sigma_y),
            keep_known=self.keep_known,
            solver=self.solver,
            solver_settings=_solver_settings(self.set_, self.steps, self.guidance_scale),
            prior=self.prior,
            prior_settings=prior_settings(self.prior_set),
            condition=pairs(self.condition, "--condition", "label=207"),
            prompt=self.prompt,
            samples=self.samples,
            seed=self.seed,
            device=self.device,
            tile=self.tile,
            precision=self.precision,
        )


# ---- text as values


def prior_settings(items: Iterable[str] | None, option: str = "--prior-set") -> dict[str, Any]:
    """Arguments of load_prior: numbers, tuples and booleans of Python, or else text."""
    return {n: _literal(v) for n, v in pairs(items, option, "data_range=(0,1)").items()}


def _sigma(text: str) -> float | None:
    """A number, or None for auto."""
    from invguide.errors import InputError

    if text.lower() == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sigma-y is {text!r}; expected a number (white = 1) or auto") from None


def _solver_settings(
    items: Iterable[str] | None, steps: int | None, guidance_scale: float | None
) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(pairs(items, "--set", "guidance_scale=0.5"))
    chosen |= {} if steps is None else {"num_steps": steps}
    return chosen | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
