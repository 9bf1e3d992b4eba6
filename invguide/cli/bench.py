"""The commands of `invguide bench`: tables of quality and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invguide.cli.terminal import RUN_FAILED, Device, Seed, command, pairs

bench = typer.Typer(
    help="Print quality, calibration and speed.", no_args_is_help=True, rich_markup_mode=None
)
Data = Annotated[
    Path, typer.Option(help=".npz file with uint8 photos img_SIZE (N, SIZE, SIZE, 3).")
]
Size = Annotated[int, typer.Option(help="Pixels per side.")]
Photos = Annotated[int, typer.Option(help="The first so many of them.")]
Noise = Annotated[float, typer.Option(help="Standard deviation, white = 1.")]
PriorName = Annotated[str, typer.Option("--prior", help="As for `restore`.")]
Precision = Annotated[
    str,
    typer.Option(help="Of the prior's network: fp32, bf16 or fp16; half is about twice as fast."),
]
BenchTasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="deblur, 'SR x2', 'SR x4' or 'inpaint 70 %' [all]; denoise, 'motion deblur', HDR.",
    ),
]
Samples = Annotated[int, typer.Option(help="Per photo.")]
TV = Annotated[bool, typer.Option(help="Total variation too, its best weight searched.")]
Kept = Annotated[
    Path | None, typer.Option("--out", help="Folder that keeps the figures of each photo.")
]


def _given(**values: Any) -> dict[str, Any]:
    """Only what was given, so that the defaults stand in one place."""
    return {name: value for name, value in values.items() if value}


@command("restore", bench)
def bench_restore(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    noise: Noise = 0.025,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    solver: Annotated[
        list[str] | None,
        typer.Option(help="NAME, or NAME=K for K samples; may be given several times."),
    ] = None,
    task: BenchTasks = None,
    samples: Samples = 8,
    tv: TV = True,
    out: Kept = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Restore photos with every solver, and with total variation at its best weight."""
    from invguide.bench import restore as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings["precision"] = precision
    settings |= _given(solvers=solver, tasks=task)
    print(run(data, **settings, samples=samples, tv=tv, out=out, seed=seed, device=device))


@command("denoise", bench)
def bench_denoise(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    level: Annotated[
        list[float] | None,
        typer.Option(help="Of the noise, white = 255; may be given several times [15, 25, 50]."),
    ] = None,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    solver: Annotated[
        list[str] | None,
        typer.Option(help="Further rows, such as HQS; may be given several times."),
    ] = None,
    tv: TV = True,
    out: Kept = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Remove noise of known level with one network call, and with CBM3D and total variation."""
    from invguide.bench import denoise as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "prior": prior}
    settings |= {"precision": precision, "tv": tv, "out": out}
    settings |= _given(levels=level, solvers=solver)
    print(run(data, **settings, seed=seed, device=device))


@command("photons", bench)
def bench_photons(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    count: Annotated[
        list[float] | None,
        typer.Option(help="Mean photons of bright parts; may be given several times [5, 20]."),
    ] = None,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    solver: Annotated[
        list[str] | None,
        typer.Option(help="Further rows, such as DPS; may be given several times [HQS]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Per photo, of samplers: their mean.")] = 4,
    out: Kept = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Denoise photos of few photons on black, also with CBM3D after the Anscombe transform."""
    from invguide.bench import photons as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "prior": prior}
    settings |= {"precision": precision, "samples": samples, "out": out}
    settings |= _given(counts=count, solvers=solver)
    print(run(data, **settings, seed=seed, device=device))


@command("calibration", bench)
def bench_calibration(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    noise: Noise = 0.025,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    solver: Annotated[str, typer.Option(help="Of which the samples are.")] = "DPS",
    task: BenchTasks = None,
    samples: Samples = 8,
    out: Kept = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Compare the error of the mean of the samples with the one that their spread predicts."""
    from invguide.bench import calibration as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings["precision"] = precision
    settings |= _given(solver=solver, tasks=task)
    print(run(data, **settings, samples=samples, out=out, seed=seed, device=device))


@command("steps", bench)
def bench_steps(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    noise: Noise = 0.025,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    task: BenchTasks = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="May be given several times [4, 8, 15, 20, 30]."),
    ] = None,
    out: Kept = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Restore photos by HQS with several numbers of network calls, beside the number that auto takes."""
    from invguide.bench import steps as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings |= {"precision": precision, "out": out, **_given(tasks=task, numbers=steps)}
    print(run(data, **settings, seed=seed, device=device))


@command("tasks", bench)
def bench_tasks(
    data: Data,
    size: Size = 128,
    photos: Photos = 3,
    task: Annotated[
        list[str] | None,
        typer.Option(help="As for `restore`; may be given several times [all but colorize]."),
    ] = None,
    busy: Annotated[
        list[int] | None,
        typer.Option(help="Busy processes beside it; may be given several times [0]."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another checkout, to compare with.")
    ] = None,
) -> None:
    """Time the command `restore` task by task, with the environment of a user, and beside other work."""
    from invguide.bench import tasks as run

    print(run(data, size=size, photos=photos, against=against, **_given(tasks=task, busy=busy)))


@command("jpeg", bench)
def bench_jpeg(
    data: Data,
    size: Size = 128,
    photos: Photos = 28,
    prior: PriorName = "natural",
    precision: Precision = "fp32",
    quality: Annotated[
        list[int] | None,
        typer.Option(help="Of the files; may be given several times [10, 20, 50, 80]."),
    ] = None,
    solver: Annotated[str, typer.Option(help="As for `restore`.")] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the solver."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Save photos as JPEG, restore the files, and compare with them."""
    from invguide.bench import jpeg as run

    settings = _given(qualities=quality, settings=pairs(set_, "--set", "lam=0.5"))
    settings |= {"size": size, "photos": photos, "prior": prior, "precision": precision}
    print(run(data, **settings, solver=solver, seed=seed, device=device))


@command("noise", bench)
def bench_noise(
    data: Data,
    size: Size = 256,
    photos: Photos = 12,
    folder: Annotated[
        Path | None, typer.Option(help="Of larger pictures, whose middles are taken too.")
    ] = None,
    level: Annotated[
        list[float] | None,
        typer.Option(help="Of the noise; may be given several times [.01, .025, .05, .1, .2]."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="PNG, 'JPEG 90 4:2:0', letterboxed, clipped, ... [all]."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Estimate the noise of photos, as --sigma-y auto does, against the noise put in and other estimators."""
    from invguide.bench import noise as run

    chosen = _given(levels=level, kinds=kind)
    print(run(data, size=size, photos=photos, folder=folder, **chosen, seed=seed))


@command("bad-calls", bench)
def bench_bad_calls(
    count: Annotated[int, typer.Option(help="Of calls.")] = 2000,
    show: Annotated[bool, typer.Option(help="Print each call before it is made.")] = False,
    seed: Seed = 0,
) -> None:
    """Call the whole public interface wrongly: every call has to be refused in words, or make sense."""
    from invguide.bench import bad_calls as run
    from invguide.bench.bad_calls import targets
    from invguide.bench.bad_methods import method_targets

    tally = run(count, seed, print if show else None, [*targets(), *method_targets()])
    print(tally)
    if tally.faults:
        raise typer.Exit(RUN_FAILED)


@command("checks", bench)
def bench_checks(
    calls: Annotated[int, typer.Option(help="Of a method, in one measurement.")] = 300,
    repeats: Annotated[int, typer.Option(help="Measurements of each kind.")] = 15,
) -> None:
    """Time the checks of public methods, from outside and as a run pays for them."""
    from invguide.bench import entry_checks as run

    print(run(calls=calls, repeats=repeats))


@command("driver", bench)
def bench_driver(
    prior: PriorName = "natural",
    steps: Annotated[int, typer.Option(help="Of a run.")] = 50,
    repeats: Annotated[int, typer.Option(help="Runs of each kind.")] = 9,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Time DPS under the driver, and the same calls in a bare loop."""
    from invguide.bench import driver as run

    print(run(prior=prior, steps=steps, repeats=repeats, seed=seed, device=device))


@command("priors", bench)
def bench_priors(
    prior: Annotated[
        str,
        typer.Option(help="As for `restore`; or adm-256: a large network with random weights."),
    ] = "natural",
    size: Annotated[int, typer.Option(help="Pixels per side, where the prior takes any.")] = 64,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Images at once; may be given several times [1, 4, 16]."),
    ] = None,
    compile: Annotated[
        bool | None, typer.Option(help="Compiled networks too [on a GPU only].")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Calls that are timed.")] = 5,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Time a network and its gradient, plain and in half precision, compiled, and with low memory."""
    from invguide.bench import priors as run

    settings: dict[str, Any] = {"size": size, "compile": compile, "repeats": repeats}
    settings |= _given(batches=batch)
    print(run(prior=prior, **settings, seed=seed, device=device))


@command("blackbox", bench)
def bench_blackbox(
    workers: Annotated[int, typer.Option(help="Processes, to compare with one.")] = 4,
    milliseconds: Annotated[float, typer.Option(help="That a call sleeps.")] = 50.0,
    calls: Annotated[int, typer.Option(help="In a batch.")] = 80,
    repeats: Annotated[int, typer.Option(help="Batches of each kind.")] = 3,
) -> None:
    """Count calls of a sleeping simulator on workers, and time what a call costs beyond its own."""
    from invguide.bench import blackbox as run

    print(run(workers=workers, milliseconds=milliseconds, calls=calls, repeats=repeats))


@command("mixtures", bench)
def bench_mixtures(
    problems: Annotated[int, typer.Option(help="Of each size.")] = 20,
    ensemble: Annotated[int, typer.Option(help="Members of every ensemble.")] = 400,
    seed: Seed = 0,
) -> None:
    """Average distances to black-box posteriors with 25 modes, in 8 and 80 dimensions."""
    from invguide.bench import mixtures as run

    print(run(problems=problems, ensemble=ensemble, seed=seed))


@command("adjoint", bench)
def bench_adjoint(
    prior: Annotated[
        str | None, typer.Option(help="As for `restore` [a U-Net with random weights].")
    ] = None,
    size: Annotated[int, typer.Option(help="Pixels per side.")] = 32,
    width: Annotated[int, typer.Option(help="Channels of that U-Net at its finest level.")] = 128,
    method: Annotated[
        list[str] | None, typer.Option(help="euler, heun, ...; may be given several times [all].")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="May be given several times [2, 8, 32].")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs that are timed.")] = 1,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Measure memory, time and error of gradients through roll-outs, against the usual ways to get them."""
    from invguide.bench import adjoint as run

    settings = _given(prior=prior, methods=method, steps=steps)
    print(run(**settings, size=size, width=width, repeats=repeats, seed=seed, device=device))


@command("guidance", bench)
def bench_guidance(
    instances: Annotated[int, typer.Option(help="Random mixtures of each kind.")] = 10,
    points: Annotated[int, typer.Option(help="Of each, for the mean angles.")] = 100,
    samples: Annotated[int, typer.Option(help="Of each, for the distances.")] = 500,
    seed: Seed = 0,
) -> None:
    """Compare guidance through 1 to 16 inner steps with the exact one, on mixtures."""
    from invguide.bench import guidance as run

    print(run(instances=instances, points=points, samples=samples, seed=seed))


@command("peers", bench)
def bench_peers(
    data: Data,
    size: Size = 64,
    photos: Photos = 2,
    noise: Noise = 0.025,
    prior: PriorName = "natural",
    task: Annotated[str, typer.Option(help="One task of `bench restore`.")] = "deblur",
    steps: Annotated[int, typer.Option(help="Network calls of every run.")] = 100,
    repeats: Annotated[int, typer.Option(help="Pairs of runs that are timed.")] = 5,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Run DPS of this package and of deepinv on the same measurements."""
    from invguide.bench import peers as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    print(run(data, **settings, task=task, steps=steps, repeats=repeats, seed=seed, device=device))


@command("physics", bench)
def bench_physics(
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="As in deepinv.physics; may be given several times [all]."),
    ] = None,
    solver: Annotated[str, typer.Option(help="As for `restore`.")] = "auto",
    seed: Seed = 0,
) -> None:
    """Send every physics of deepinv through `solve`, and compare the answers with dense algebra."""
    from invguide.bench import physics as run

    print(run(**_given(classes=class_), solver=solver, seed=seed))
