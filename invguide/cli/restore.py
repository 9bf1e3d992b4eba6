"""Commands that restore pictures: restore, plan, degrade, demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invguide.cli.options import RestoreOptions, TaskOptions, with_options
from invguide.cli.terminal import (
    RUN_FAILED,
    Device,
    Seed,
    app,
    command,
    print_error,
    print_table,
    say,
)

if TYPE_CHECKING:
    from invguide.restoration.folder import Outcome
    from invguide.restoration.settings import Job


@command("restore", app)
@with_options
def restore(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")
    ],
    options: RestoreOptions,
) -> None:
    """Restore a picture, or every picture of a folder.

    Writes restored.png (or restored-1.png ..., mean.png and std.png), panel.png and manifest.json, with the channels,
    alpha and bits of the input. A folder gets one sub-folder per picture; what is done is skipped.
    """
    _check_places(source, options)
    from invguide.images.export import picture_name
    from invguide.restoration.restore import restore_picture
    from invguide.restoration.settings import Job
    from invguide.restoration.single import restore_file

    out, quiet = options.out, options.quiet
    settings = options.settings()
    tell = (lambda line: None) if quiet else say
    single = out is not None and picture_name(out)
    if single:
        _check_single(source, options)
    job = Job.prepare(settings, tell, not quiet, options.arrays)
    farmed = options.workers is not None or options.scheduler is not None
    job.confirm = typer.confirm if sys.stdin.isatty() and not (quiet or farmed) else None
    if single and out is not None:
        restore_file(job, source, out, resume=options.resume)
        tell(f"  written to {out}")
        return
    out = out or Path(f"{source.resolve().name if source.is_dir() else source.stem}-restored")
    if source.is_dir():
        _restore_folder(job, source, out, options, tell)
    elif restore_picture(job, source, out, resume=options.resume) is not None:
        tell(f"  written to {out}")


def _check_places(source: Path, options: RestoreOptions) -> None:
    from invguide.errors import InputError

    workers, scheduler = options.workers, options.scheduler
    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    if (workers is not None or scheduler is not None) and not source.is_dir():
        raise InputError(f"--workers and --scheduler are for a folder, and {source} is a file")
    if workers is not None and scheduler is not None:
        raise InputError("both --workers and --scheduler are given; give one")


def _check_single(source: Path, options: RestoreOptions) -> None:
    from invguide.errors import InputError

    out = options.out
    for wrong, why in (
        (source.is_dir(), f"{source} is a folder"),
        (options.samples > 1, f"--samples is {options.samples}"),
        (options.arrays, "--arrays are files too"),
    ):
        if wrong:
            raise InputError(f"--out {out} is one picture file, and {why}: give a folder")
    if out is not None and out.exists() and out.samefile(source):
        raise InputError(f"--out {out} is the input itself; give another name")


def _restore_folder(
    job: Job, source: Path, out: Path, options: RestoreOptions, tell: Callable[[str], None]
) -> None:
    """Here, or on workers; the table of outcomes last, and exit code 1 where a picture failed."""
    from invguide.restoration.folder import restore_folder

    rows: list[Outcome]
    if options.workers is not None or options.scheduler is not None:
        from invguide.restoration.workers import restore_on_workers

        rows = restore_on_workers(
            job,
            source,
            out,
            workers=options.workers,
            scheduler=options.scheduler,
            overwrite=options.overwrite,
        )
    else:
        rows = restore_folder(job, source, out, overwrite=options.overwrite)
    tell("")
    print_table(
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
        tell,
    )
    failed = sum(r.failed for r in rows)
    if failed:
        print_error(
            f"{failed} of {len(rows)} pictures failed (see above); the others are in {out}"
        )
        raise typer.Exit(RUN_FAILED)
    tell(f"written to {out}")


@command("plan", app)
@with_options
def plan(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture.")],
    options: RestoreOptions,
) -> None:
    """Tell what `restore` with the same options will cost: memory, network calls and time.

    Runs four steps of the solver, and writes nothing. Of a folder, the largest file is taken. Exit code 1 if memory
    does not suffice.
    """
    from invguide.errors import InputError
    from invguide.restoration.restore import plan_picture
    from invguide.restoration.settings import Job

    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    if source.is_dir():
        from invguide.restoration.folder import list_pictures

        pictures = list_pictures(source)
        source = max(pictures, key=lambda path: path.stat().st_size)
        print(f"one of {len(pictures)} pictures, {source}:")
    found = plan_picture(Job.prepare(options.settings(), say), source)
    print(found)
    if not found.fits:
        raise typer.Exit(RUN_FAILED)


@command("degrade", app)
@with_options
def degrade(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A clean picture.")],
    options: TaskOptions,
    missing: Annotated[
        float | None,
        typer.Option(help="inpaint without --mask: drop this fraction of the pixels at random."),
    ] = None,
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

    written, advice = degrade_picture(
        source, options.task, options.for_task(), missing, sigma_y, seed, out
    )
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

    run_demo(out, prior, seed, device, steps, (lambda line: None) if quiet else say, not quiet)
