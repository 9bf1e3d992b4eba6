"""Commands that examine: doctor a checkpoint, verify the solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invguide.cli.options import Condition, Prompt, prior_settings
from invguide.cli.pages import measurement
from invguide.cli.terminal import RUN_FAILED, Device, Seed, app, command, pairs


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
    settings = prior_settings(set_, "--set")
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


@measurement("verify", app, "Distance to exact posteriors")
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
) -> str:
    """Measure the distance of each solver to exact posteriors, and of black-box methods to exact laws.

    On Gaussians and mixtures the posterior is known in closed form, so that the bias of a solver shows.
    """
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
    return "\n\n".join(map(str, tables))
