"""The commands of `invguide bench` on photos of the user: quality, calibration, and what a command costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invguide.cli.bench import PriorName, bench, given
from invguide.cli.pages import measurement
from invguide.cli.terminal import Device, Seed, pairs

Data = Annotated[
    Path, typer.Option(help=".npz file with uint8 photos img_SIZE (N, SIZE, SIZE, 3).")
]
Size = Annotated[int, typer.Option(help="Pixels per side.")]
Photos = Annotated[int, typer.Option(help="The first so many of them.")]
Noise = Annotated[float, typer.Option(help="Standard deviation, white = 1.")]
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
    settings |= given(solvers=solver, tasks=task)
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
    settings |= given(levels=level, solvers=solver)
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
    settings |= given(counts=count, solvers=solver)
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
    settings |= given(solver=solver, tasks=task)
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
    settings |= {"precision": precision, "out": out, **given(tasks=task, numbers=steps)}
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

    return run(data, size=size, photos=photos, against=against, **given(tasks=task, busy=busy))


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

    settings = given(qualities=quality, settings=pairs(set_, "--set", "lam=0.5"))
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

    chosen = given(levels=level, kinds=kind)
    return run(data, size=size, photos=photos, folder=folder, **chosen, seed=seed)


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
