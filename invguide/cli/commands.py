"""The command line: a thin skin over `restoration`, `api`, `verify` and `bench`, which are imported when needed.

Exit codes: 0; 1 where a run failed; 2 for bad input, with one line on standard error that begins with "error:".
"""

from __future__ import annotations

import ast
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invguide.cli.bench import bench
from invguide.cli.terminal import RUN_FAILED, Device, Group, Seed, command, pairs, print_error
from invguide.system.threads import be_passive

if TYPE_CHECKING:
    from invguide.restoration.tasks import Options

app = typer.Typer(
    cls=Group,
    help="Restore pictures with a diffusion prior, and show how sure the result is.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the command `invguide`; nothing before it may import torch, which reads the wait policy once."""
    be_passive()
    try:
        app(prog_name="invguide")
    except BrokenPipeError:  # `invguide solvers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(RUN_FAILED)


def _say(line: str) -> None:
    print(line, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"invguide {version('invguide')}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


# ---- options that several commands share

TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help="denoise, deblur, motion-deblur, inpaint, super-resolution, jpeg or hdr; colorize, with a --prior that "
        "knows objects.",
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="inpaint: picture of the same size, white (or opaque, if alpha varies) = known."
    ),
]
InvertMask = Annotated[
    bool, typer.Option("--invert-mask", help="inpaint: black (or transparent) = known.")
]
Kernel = Annotated[
    Path | None,
    typer.Option(
        help="deblur: kernel of odd size as picture, .npy, .txt or .csv; scaled to sum 1."
    ),
]
BlurSigma = Annotated[
    float | None, typer.Option(help="deblur: standard deviation of a Gaussian in pixels [1.5].")
]
Length = Annotated[float | None, typer.Option(help="motion-deblur: pixels [9].")]
Angle = Annotated[
    float | None,
    typer.Option(help="motion-deblur: degrees, counter-clockwise from the right [0]."),
]
Factor = Annotated[int | None, typer.Option(help="super-resolution: how much larger [4].")]
Filter = Annotated[
    str | None, typer.Option(help="super-resolution: bicubic, box or gaussian [bicubic].")
]
Quality = Annotated[float | None, typer.Option(help="jpeg: 1 to 100 [what the file tells].")]
Gain = Annotated[float | None, typer.Option(help="hdr: over-exposure, 2 is one stop [2].")]
PriorName = Annotated[
    str,
    typer.Option(
        "--prior",
        help="`invguide priors` lists them: an embedded one, a weights file, a folder of diffusers, a hub id.",
    ),
]
PriorSet = Annotated[
    list[str] | None,
    typer.Option(
        "--prior-set", metavar="NAME=VALUE", help="Any argument of load_prior, such as preset=..."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of the network: fp32, bf16, fp16, or auto: bf16 where a short trial here finds it faster and as good."
    ),
]
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

SigmaY = Annotated[
    str,
    typer.Option("--sigma-y", help="Noise standard deviation, white = 1, or auto: estimated."),
]
KeepKnown = Annotated[
    bool | None,
    typer.Option(
        "--keep-known/--no-keep-known",
        help="inpaint: return known pixels exactly, or denoised [exactly, unless --sigma-y gives a noise level].",
    ),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Of solvers that have one [their default].")
]
SolverSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the solver."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the results [IN-restored]; or a picture file, such as new.jpg, for the result alone."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on where an interrupted run stopped (a folder always does)."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="A folder: do again what was done with other settings."),
]
Arrays = Annotated[
    bool,
    typer.Option("--arrays", help="Also write samples.npy, mean.npy, std.npy and chi2.npy."),
]
Workers = Annotated[
    int | None,
    typer.Option(help="A folder: processes, each with its own prior, and GPU if there are."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Errors only.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A folder: address of a dask scheduler, for many machines.")
]


def _options(
    mask: Path | None,
    invert_mask: bool,
    kernel: Path | None,
    blur_sigma: float | None,
    length: float | None,
    angle: float | None,
    factor: int | None,
    filter: str | None,
    quality: float | None,
    gain: float | None,
) -> Options:
    from invguide.restoration.tasks import Options

    return Options(
        mask, invert_mask or None, kernel, blur_sigma, length, angle, factor, filter, quality, gain
    )


def _sigma(text: str) -> float | None:
    """A number, or None for auto."""
    from invguide.errors import InputError

    if text.lower() == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sigma-y is {text!r}; expected a number (white = 1) or auto") from None


def _prior_settings(items: Iterable[str] | None, option: str = "--prior-set") -> dict[str, Any]:
    """Arguments of load_prior: numbers, tuples and booleans of Python, or else text."""
    return {n: _literal(v) for n, v in pairs(items, option, "data_range=(0,1)").items()}


def _prior(
    name: str,
    settings: Iterable[str] | None,
    condition: Iterable[str] | None,
    prompt: str | None,
) -> dict[str, Any]:
    """Fields of Settings that say which prior it is, and what it is told."""
    return {
        "prior": name,
        "prior_settings": _prior_settings(settings),
        "condition": pairs(condition, "--condition", "label=207"),
        "prompt": prompt,
    }


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


# ---- restore, degrade, demo


@command("restore", app)
def restore(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")
    ],
    task: TaskName,
    mask: Mask = None,
    invert_mask: InvertMask = False,
    kernel: Kernel = None,
    blur_sigma: BlurSigma = None,
    length: Length = None,
    angle: Angle = None,
    factor: Factor = None,
    filter: Filter = None,
    quality: Quality = None,
    gain: Gain = None,
    sigma_y: SigmaY = "auto",
    keep_known: KeepKnown = None,
    solver: Annotated[
        str,
        typer.Option(
            help="`invguide solvers` lists them; auto: a point estimate for one sample, a sampler for several."
        ),
    ] = "auto",
    prior: PriorName = "natural",
    prior_set: PriorSet = None,
    condition: Condition = None,
    prompt: Prompt = None,
    samples: Annotated[
        int, typer.Option(help="Restorations to draw; two or more give mean and uncertainty.")
    ] = 1,
    steps: Annotated[int | None, typer.Option(help="Of the solver [its default].")] = None,
    guidance_scale: GuidanceScale = None,
    set_: SolverSet = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Pixels per side of overlapping tiles, for large pictures; 0: none [as needed]."
        ),
    ] = None,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    arrays: Arrays = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Restore a picture, or every picture of a folder.

    Writes restored.png (or restored-1.png ..., mean.png and std.png), panel.png and manifest.json, with the channels,
    alpha and bits of the input. A folder gets one sub-folder per picture; what is done is skipped.
    """
    from invguide.errors import InputError

    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    farmed = workers is not None or scheduler is not None
    if farmed and not source.is_dir():
        raise InputError(f"--workers and --scheduler are for a folder, and {source} is a file")
    if workers is not None and scheduler is not None:
        raise InputError("both --workers and --scheduler are given; give one")
    options = _options(
        mask, invert_mask, kernel, blur_sigma, length, angle, factor, filter, quality, gain
    )
    from invguide.images.export import picture_name
    from invguide.restoration.folder import restore_folder
    from invguide.restoration.restore import restore_picture
    from invguide.restoration.settings import Job, Settings
    from invguide.restoration.single import restore_file

    settings = Settings(
        task,
        options,
        sigma_y=_sigma(sigma_y),
        solver=solver,
        solver_settings=_solver_settings(set_, steps, guidance_scale),
        **_prior(prior, prior_set, condition, prompt),
        samples=samples,
        seed=seed,
        device=device,
        tile=tile,
        precision=precision,
        keep_known=keep_known,
    )
    say = (lambda line: None) if quiet else _say
    single = out is not None and picture_name(out)
    if single:
        _check_single(source, out, samples, arrays)
    job = Job.prepare(settings, say, not quiet, arrays)
    job.confirm = typer.confirm if sys.stdin.isatty() and not (quiet or farmed) else None
    if single and out is not None:
        restore_file(job, source, out, resume=resume)
        say(f"  written to {out}")
        return
    out = out or Path(f"{source.resolve().name if source.is_dir() else source.stem}-restored")
    if not source.is_dir():
        if restore_picture(job, source, out, resume=resume) is not None:
            say(f"  written to {out}")
        return
    if farmed:
        from invguide.restoration.workers import restore_on_workers

        rows = restore_on_workers(
            job, source, out, workers=workers, scheduler=scheduler, overwrite=overwrite
        )
    else:
        rows = restore_folder(job, source, out, overwrite=overwrite)
    say("")
    _print_table(
        ("picture", "outcome", "chi2", "seconds", ""),
        [
            (
                r.name,
                "FAILED" if r.failed else r.outcome,
                "" if r.chi2 is None else f"{r.chi2:.2f}",
                "" if r.seconds is None else f"{r.seconds:.1f}",
                r.outcome if r.failed else "",
            )
            for r in rows
        ],
        say,
    )
    failed = sum(r.failed for r in rows)
    if failed:
        print_error(
            f"{failed} of {len(rows)} pictures failed (see above); the others are in {out}"
        )
        raise typer.Exit(RUN_FAILED)
    say(f"written to {out}")


def _check_single(source: Path, out: Path | None, samples: int, arrays: bool) -> None:
    from invguide.errors import InputError

    for wrong, why in (
        (source.is_dir(), f"{source} is a folder"),
        (samples > 1, f"--samples is {samples}"),
        (arrays, "--arrays are files too"),
    ):
        if wrong:
            raise InputError(f"--out {out} is one picture file, and {why}: give a folder")
    if out is not None and out.exists() and out.samefile(source):
        raise InputError(f"--out {out} is the input itself; give another name")


@command("plan", app)
def plan(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture.")],
    task: TaskName,
    mask: Mask = None,
    invert_mask: InvertMask = False,
    kernel: Kernel = None,
    blur_sigma: BlurSigma = None,
    length: Length = None,
    angle: Angle = None,
    factor: Factor = None,
    filter: Filter = None,
    quality: Quality = None,
    gain: Gain = None,
    sigma_y: SigmaY = "auto",
    keep_known: KeepKnown = None,
    solver: Annotated[str, typer.Option(help="As for `restore`.")] = "auto",
    prior: PriorName = "natural",
    prior_set: PriorSet = None,
    condition: Condition = None,
    prompt: Prompt = None,
    samples: Annotated[int, typer.Option(help="Restorations to draw.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Of the solver [its default].")] = None,
    guidance_scale: GuidanceScale = None,
    set_: SolverSet = None,
    tile: Annotated[int | None, typer.Option(help="As for `restore`.")] = None,
    precision: Annotated[str, typer.Option(help="As for `restore`.")] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    arrays: Arrays = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    quiet: Quiet = False,
) -> None:
    """Tell what `restore` with the same options will cost: memory, network calls and time.

    Runs four steps of the solver, and writes nothing. Of a folder, the largest file is taken. Exit code 1 if memory
    does not suffice.
    """
    from invguide.errors import InputError
    from invguide.restoration.restore import plan_picture
    from invguide.restoration.settings import Job, Settings

    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    if source.is_dir():
        from invguide.restoration.folder import list_pictures

        pictures = list_pictures(source)
        source = max(pictures, key=lambda path: path.stat().st_size)
        print(f"one of {len(pictures)} pictures, {source}:")
    options = _options(
        mask, invert_mask, kernel, blur_sigma, length, angle, factor, filter, quality, gain
    )
    settings = Settings(
        task,
        options,
        sigma_y=_sigma(sigma_y),
        keep_known=keep_known,
        solver=solver,
        solver_settings=_solver_settings(set_, steps, guidance_scale),
        **_prior(prior, prior_set, condition, prompt),
        samples=samples,
        seed=seed,
        device=device,
        tile=tile,
        precision=precision,
    )
    found = plan_picture(Job.prepare(settings, _say), source)
    print(found)
    if not found.fits:
        raise typer.Exit(RUN_FAILED)


@command("degrade", app)
def degrade(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A clean picture.")],
    task: TaskName,
    mask: Mask = None,
    invert_mask: InvertMask = False,
    missing: Annotated[
        float | None,
        typer.Option(help="inpaint without --mask: drop this fraction of the pixels at random."),
    ] = None,
    kernel: Kernel = None,
    blur_sigma: BlurSigma = None,
    length: Length = None,
    angle: Angle = None,
    factor: Factor = None,
    filter: Filter = None,
    quality: Quality = None,
    gain: Gain = None,
    sigma_y: Annotated[
        float | None,
        typer.Option("--sigma-y", help="Noise standard deviation, white = 1 [0.05; jpeg 0]."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="File to write [IN-degraded.png].")] = None,
) -> None:
    """Make a measurement from a clean picture, to try `restore` on.

    Noise is added and the result cut off to black and white and rounded, as a camera does. With --task inpaint the
    mask is written next to the picture.
    """
    from invguide.restoration.degradation import degrade_picture

    options = _options(
        mask, invert_mask, kernel, blur_sigma, length, angle, factor, filter, quality, gain
    )
    written, advice = degrade_picture(source, task, options, missing, sigma_y, seed, out)
    for path in written:
        print(f"written: {path}")
    print(f"restore with: invguide restore {advice}")


@command("demo", app)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("invguide-demo"),
    prior: Annotated[str, typer.Option(help="An embedded prior.")] = "natural",
    seed: Seed = 0,
    device: Device = "auto",
    steps: Annotated[int | None, typer.Option(help="Fewer are quicker.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Errors only.")] = False,
) -> None:
    """Restore a photograph that ships with the package.

    It is blurred and made noisy first; the panel shows four restorations and how sure they are.
    """
    from invguide.restoration.demo import run_demo

    run_demo(out, prior, seed, device, steps, (lambda line: None) if quiet else _say, not quiet)


@command("doctor", app)
def doctor(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A weights file, a folder of diffusers, a hub id, or the name of an embedded prior.",
        ),
    ],
    picture: Annotated[
        list[Path] | None,
        typer.Option(help="Known clean picture; may be given several times [a photograph]."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any argument of load_prior."),
    ] = None,
    condition: Condition = None,
    prompt: Prompt = None,
    device: Device = "auto",
) -> None:
    """Examine a checkpoint: does it denoise known pictures, and is it read as it was trained?

    Prints the error under every convention that could apply, and which one is right. Exit code 1 if that is
    another one than declared, or none.
    """
    import torch

    from invguide.api import load_prior
    from invguide.images.reading import read_picture
    from invguide.priors.known_images import known_images
    from invguide.priors.wrappers.latent import LatentPrior
    from invguide.restoration.conditions import all_conditions
    from invguide.system.devices import resolve_device

    told = all_conditions(pairs(condition, "--condition", "label=207"), prompt, checkpoint)
    settings = _prior_settings(set_, "--set")
    where = resolve_device(device)
    prior = load_prior(checkpoint, check=False, **settings).to(where)
    images = [
        known_images(prior.sample_shape, read_picture(path).values, min_size=prior.min_size)
        for path in picture or ()
    ]
    known = torch.cat(images) if images else None
    report: Any = prior.check(known, **{name: row.to(where) for name, row in told.items()})
    print(report)
    if isinstance(prior, LatentPrior):
        floor = float(prior.floor(known).square().mean().sqrt())
        print(f"floor: the autoencoder alone has an error of {floor:.3g} (white = 1)")
    if not report.fits:
        raise typer.Exit(RUN_FAILED)


# ---- lists


@command("solvers", app)
def solvers() -> None:
    """List the solvers, what each needs, and how it errs."""
    import invguide.solvers  # noqa: F401  fills the registry
    from invguide.solver import Solver

    for name, kind in sorted(Solver.registry.items()):
        summary, bias = _docstring(kind)
        defaults = f"{kind.num_steps} steps" if isinstance(kind.num_steps, int) else ""
        _print_entry(
            name, [_needs(kind.requires), defaults], [summary, f"Bias: {bias}" if bias else ""]
        )


def _docstring(thing: Any) -> tuple[str, str]:
    """The first sentence of a docstring, and its Bias section on one line."""
    text = textwrap.dedent("    " + (thing.__doc__ or "")).strip()
    summary = " ".join(text.split("\n\n")[0].split())
    _, found, rest = text.partition("Bias:")
    lines = []
    for line in rest.splitlines()[1:] if found else ():
        if line.strip() and not line.startswith((" ", "\t")):
            break
        lines.append(line)
    return summary, " ".join(" ".join(lines).split())


def _needs(requires: Any) -> str:
    """What a solver needs, in words."""
    target = {
        "likelihood": "a measurement",
        "reward": "a reward",
        "either": "a measurement or a reward",
        "none": "nothing but the prior",
    }[requires.target]
    if requires.target == "none":
        return f"needs {target}"
    parts = [target]
    if requires.linear:
        parts.append("a linear operator")
    elif requires.gradient:
        parts.append("a differentiable operator")
    if requires.prior_vjp:
        parts.append("gradients of the prior")
    text = "needs " + ", ".join(parts)
    if not requires.gradient and not requires.linear:
        text += "; black boxes are fine"
    return text + ("; the samples are one ensemble" if requires.ensemble else "")


@command("operators", app)
def operators() -> None:
    """List the forward operators and the tasks of `restore`."""
    import inspect

    import invguide.operators as package
    from invguide.forward_operator import LinearOperator
    from invguide.restoration.tasks import TASKS

    for name in package.__all__:
        kind = getattr(package, name)
        linear = "linear" if issubclass(kind, LinearOperator) else "nonlinear"
        if name == "Composition":
            linear = "linear if its parts are"
        own = "__init__" in {
            m for k in kind.__mro__ if k.__module__.startswith("invguide") for m in vars(k)
        }
        arguments = list(inspect.signature(kind.__init__).parameters.values())[1:] if own else []
        call = (
            f"{name}({', '.join(str(a).split(':')[0].split('=')[0].strip() for a in arguments)})"
        )
        _print_entry(call, [linear], [_docstring(kind)[0]])
    print("Tasks of `invguide restore`:")
    for task in TASKS.values():
        takes = " ".join("--" + o.replace("_", "-") for o in task.options)
        print(f"  {task.name:<17} {task.summary}{': ' if takes else ''}{takes}")


@command("priors", app)
def priors() -> None:
    """List the priors that ship with the package, the kinds that can be loaded, and public checkpoints."""
    from invguide.priors.checkpoints.catalogue import PUBLIC, RECOGNISED
    from invguide.priors.checkpoints.embedded import EMBEDDED, weights_path

    for entry in EMBEDDED.values():
        path = weights_path(entry.name)
        card = path.with_suffix(".md")
        size = f"{path.stat().st_size / 1e6:.1f} MB" if path.exists() else "weights missing"
        details = [size, f"noise levels {entry.sigma_min:g} to {entry.sigma_max:g}"]
        lines = [entry.description[0].upper() + entry.description[1:]]
        lines.append(f"Card: {card}" if card.exists() else "No model card")
        _print_entry(entry.name, details, lines)
    print("Whatever else holds a pretrained network (no code of a file is run):\n")
    for known in RECOGNISED:
        _print_entry(known.name, [known.line], [known.description])
    print("Public checkpoints:\n")
    for known in PUBLIC:
        _print_entry(known.name, [known.line], [known.description])


def _print_entry(name: str, details: Iterable[str], lines: Iterable[str]) -> None:
    width = min(110, max(60, shutil.get_terminal_size((100, 24)).columns)) - 4
    print(f"{name}  [{', '.join(filter(None, details))}]")
    for line in filter(None, lines):
        print(textwrap.indent(textwrap.fill(line, width), "    "))
    print()


def _print_table(
    head: tuple[str, ...], rows: list[tuple[str, ...]], say: Callable[[str], None]
) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            c.rjust(w) if i in (2, 3) else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())


# ---- verify


@command("verify", app)
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SOLVER]...", help="Which solvers [all].")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Which targets; may be given several times [all].")
    ] = None,
    samples: Annotated[int, typer.Option(help="Per solver and posterior.")] = 2000,
    ensemble: Annotated[
        int, typer.Option(help="Per solver and black-box target: the size of every ensemble.")
    ] = 1000,
    steps: Annotated[int | None, typer.Option(help="Of every solver [their defaults].")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Print the distance of each solver to exact posteriors, and of black-box methods to exact laws."""
    import invguide.solvers  # noqa: F401  fills the registry
    from invguide.api import make_solver
    from invguide.solver import Solver
    from invguide.verify import conformance

    changed = {} if steps is None else {"num_steps": steps}
    # Solvers of one kind of reward have no posterior to be compared with here.
    all_of_them = sorted(
        n for n, kind in Solver.registry.items() if kind.requires.target != "reward"
    )
    chosen = [make_solver(name, **changed) for name in names or all_of_them]
    tables = conformance(chosen, target or (), samples, ensemble, seed, device=device)
    print("\n\n".join(map(str, tables)))


if __name__ == "__main__":
    main()
