"""The commands of `invguide bench`: tables of quality and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invguide.cli.pages import measurement
from invguide.cli.terminal import Device, Seed, pairs

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


@measurement("restore", bench, "Restoration")
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
) -> Any:
    """Restore photos with every solver, and with total variation at its best weight.

    Whether a prior is worth its network calls: quality in PSNR and SSIM, and whether the answers explain the data.
    """
    from invguide.bench import restore as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings["precision"] = precision
    settings |= _given(solvers=solver, tasks=task)
    return run(data, **settings, samples=samples, tv=tv, out=out, seed=seed, device=device)


@measurement("denoise", bench, "Denoising")
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
) -> Any:
    """Remove noise of known level with one network call, and with CBM3D and total variation.

    Where the measurement is the signal itself, the network's own denoiser is the posterior mean, in one call.
    """
    from invguide.bench import denoise as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "prior": prior}
    settings |= {"precision": precision, "tv": tv, "out": out}
    settings |= _given(levels=level, solvers=solver)
    return run(data, **settings, seed=seed, device=device)


@measurement("photons", bench, "Photon counts")
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
) -> Any:
    """Denoise photos of few photons on black, also with CBM3D after the Anscombe transform.

    The noise of counts grows with the signal; the transform makes it even, so that one network call will do.
    """
    from invguide.bench import photons as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "prior": prior}
    settings |= {"precision": precision, "samples": samples, "out": out}
    settings |= _given(counts=count, solvers=solver)
    return run(data, **settings, seed=seed, device=device)


@measurement("calibration", bench, "Calibration")
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
) -> Any:
    """Compare the error of the mean of the samples with the one that their spread predicts.

    Samples of the right posterior are as far from each other as the truth is from them: the ratio is then 1.
    """
    from invguide.bench import calibration as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings["precision"] = precision
    settings |= _given(solver=solver, tasks=task)
    return run(data, **settings, samples=samples, out=out, seed=seed, device=device)


@measurement("steps", bench, "Numbers of steps")
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
) -> Any:
    """Restore photos by HQS with several numbers of network calls, beside the number that auto takes.

    More calls cost time and need not give better pictures.
    """
    from invguide.bench import steps as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    settings |= {"precision": precision, "out": out, **_given(tasks=task, numbers=steps)}
    return run(data, **settings, seed=seed, device=device)


@measurement("tasks", bench, "Cost of a command")
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
) -> Any:
    """Time the command `restore` task by task, with the environment of a user, and beside other work.

    What a user waits for is the whole command, its start included.
    """
    from invguide.bench import tasks as run

    return run(data, size=size, photos=photos, against=against, **_given(tasks=task, busy=busy))


@measurement("jpeg", bench, "JPEG files")
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
) -> Any:
    """Save photos as JPEG, restore the files, and compare with them.

    A JPEG file stores each coefficient to half a quantisation step, which a restoration has to respect.
    """
    from invguide.bench import jpeg as run

    settings = _given(qualities=quality, settings=pairs(set_, "--set", "lam=0.5"))
    settings |= {"size": size, "photos": photos, "prior": prior, "precision": precision}
    return run(data, **settings, solver=solver, seed=seed, device=device)


@measurement("noise", bench, "Estimates of the noise level")
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
) -> Any:
    """Estimate the noise of photos, as --sigma-y auto does, against the noise put in and other estimators.

    A wrong noise level is the most common cause of a poor restoration.
    """
    from invguide.bench import noise as run

    chosen = _given(levels=level, kinds=kind)
    return run(data, size=size, photos=photos, folder=folder, **chosen, seed=seed)


@measurement("bad-calls", bench, "Wrong calls", failed=lambda tally: bool(tally.faults))
def bench_bad_calls(
    count: Annotated[int, typer.Option(help="Of calls.")] = 2000,
    show: Annotated[bool, typer.Option(help="Print each call before it is made.")] = False,
    seed: Seed = 0,
) -> Any:
    """Call the whole public interface wrongly: every call has to be refused in words, or make sense.

    A mistake should be told by a sentence that names the value, not by an error deep inside or a wrong result.
    """
    from invguide.bench import bad_calls as run
    from invguide.bench.bad_calls import targets
    from invguide.bench.bad_methods import method_targets

    return run(count, seed, print if show else None, [*targets(), *method_targets()])


@measurement("checks", bench, "Cost of the checks of arguments")
def bench_checks(
    calls: Annotated[int, typer.Option(help="Of a method, in one measurement.")] = 300,
    repeats: Annotated[int, typer.Option(help="Measurements of each kind.")] = 15,
) -> Any:
    """Time the checks of public methods, from outside and as a run pays for them.

    A wrong argument has to be refused at the door, and a run, which is checked once, must not pay for it.
    """
    from invguide.bench import entry_checks as run

    return run(calls=calls, repeats=repeats)


@measurement("driver", bench, "Cost of the driver")
def bench_driver(
    prior: PriorName = "natural",
    steps: Annotated[int, typer.Option(help="Of a run.")] = 50,
    repeats: Annotated[int, typer.Option(help="Runs of each kind.")] = 9,
    seed: Seed = 0,
    device: Device = "auto",
) -> Any:
    """Time DPS under the driver, and the same calls in a bare loop.

    The driver draws random numbers, counts calls and checks every state; that must cost little beside the network.
    """
    from invguide.bench import driver as run

    return run(prior=prior, steps=steps, repeats=repeats, seed=seed, device=device)


@measurement("priors", bench, "Time and memory of a network")
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
) -> Any:
    """Time a network and its gradient, plain and in half precision, compiled, and with low memory.

    Nearly all the time and memory of a run are those of the network.
    """
    from invguide.bench import priors as run

    settings: dict[str, Any] = {"size": size, "compile": compile, "repeats": repeats}
    settings |= _given(batches=batch)
    return run(prior=prior, **settings, seed=seed, device=device)


@measurement("blackbox", bench, "Calls of a black box")
def bench_blackbox(
    workers: Annotated[int, typer.Option(help="Processes, to compare with one.")] = 4,
    milliseconds: Annotated[float, typer.Option(help="That a call sleeps.")] = 50.0,
    calls: Annotated[int, typer.Option(help="In a batch.")] = 80,
    repeats: Annotated[int, typer.Option(help="Batches of each kind.")] = 3,
) -> Any:
    """Count calls of a sleeping simulator on workers, and time what a call costs beyond its own.

    Workers should be busy all the time, and the cost of a call that of the simulator.
    """
    from invguide.bench import blackbox as run

    return run(workers=workers, milliseconds=milliseconds, calls=calls, repeats=repeats)


@measurement("mixtures", bench, "Black-box posteriors with many modes")
def bench_mixtures(
    problems: Annotated[int, typer.Option(help="Of each size.")] = 20,
    ensemble: Annotated[int, typer.Option(help="Members of every ensemble.")] = 400,
    seed: Seed = 0,
) -> Any:
    """Average distances to black-box posteriors with 25 modes, in 8 and 80 dimensions.

    Methods without gradients have to find far modes, and weigh them; one problem is one throw of the dice.
    """
    from invguide.bench import mixtures as run

    return run(problems=problems, ensemble=ensemble, seed=seed)


@measurement("adjoint", bench, "Cost of a gradient through a roll-out")
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
) -> Any:
    """Measure memory, time and error of gradients through roll-outs, against the usual ways to get them.

    A gradient through n network calls should be exact, and take the memory of one.
    """
    from invguide.bench import adjoint as run

    settings = _given(prior=prior, methods=method, steps=steps)
    return run(**settings, size=size, width=width, repeats=repeats, seed=seed, device=device)


@measurement("guidance", bench, "Guidance through several steps")
def bench_guidance(
    instances: Annotated[int, typer.Option(help="Random mixtures of each kind.")] = 10,
    points: Annotated[int, typer.Option(help="Of each, for the mean angles.")] = 100,
    samples: Annotated[int, typer.Option(help="Of each, for the distances.")] = 500,
    seed: Seed = 0,
) -> Any:
    """Compare guidance through 1 to 16 inner steps with the exact one, on mixtures.

    Whether a gradient through more steps is worth its network calls, where the exact gradient is known.
    """
    from invguide.bench import guidance as run

    return run(instances=instances, points=points, samples=samples, seed=seed)


@measurement("peers", bench, "DPS against deepinv")
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
) -> Any:
    """Run DPS of this package and of deepinv on the same measurements.

    One algorithm, two packages, the same prior: quality should agree, and time should not be worse.
    """
    from invguide.bench import peers as run

    settings: dict[str, Any] = {"size": size, "photos": photos, "noise": noise, "prior": prior}
    return run(data, **settings, task=task, steps=steps, repeats=repeats, seed=seed, device=device)


@measurement("physics", bench, "The physics of deepinv")
def bench_physics(
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="As in deepinv.physics; may be given several times [all]."),
    ] = None,
    solver: Annotated[str, typer.Option(help="As for `restore`.")] = "auto",
    seed: Seed = 0,
) -> Any:
    """Send every physics of deepinv through `solve`, and compare the answers with dense algebra.

    A forward model of another package has to work as it is, or be refused in words.
    """
    from invguide.bench import physics as run

    return run(**_given(classes=class_), solver=solver, seed=seed)
