"""The commands of `invguide bench` that need no photos: on closed forms, networks, simulators and wrong calls."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from invguide.cli.pages import measurement
from invguide.cli.terminal import Device, Seed

bench = typer.Typer(
    help="Print quality, calibration and speed.", no_args_is_help=True, rich_markup_mode=None
)
PriorName = Annotated[str, typer.Option("--prior", help="As for `restore`.")]


def given(**values: Any) -> dict[str, Any]:
    """Only what was given, so that the defaults stand in one place."""
    return {name: value for name, value in values.items() if value}


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
    settings |= given(batches=batch)
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

    settings = given(prior=prior, methods=method, steps=steps)
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

    return run(**given(classes=class_), solver=solver, seed=seed)
