"""A pipeline object of diffusers as a prior: its network, its scheduler's convention and its autoencoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from invguide.errors import InputError
from invguide.prior import Prior
from invguide.priors.checkpoints.diffusers_folder import (
    AUTOENCODERS,
    PARTS,
    assemble,
    current,
    kind_of,
    scaling,
)


def is_pipeline(value: Any) -> bool:
    """Whether it is a DiffusionPipeline of diffusers, which need not be imported to tell."""
    return any(base.__name__ == "DiffusionPipeline" for base in type(value).__mro__)


def load_pipeline(
    pipeline: Any, *, shape: tuple[int | None, ...] | None = None, **settings: Any
) -> Prior:
    """Return the prior of a pipeline, which shares its weights; texts are told by `condition=`.

    Args:
        pipeline: A DiffusionPipeline with a unet or transformer, a scheduler and, for latents, a vae or vqvae.
        shape: As for `load_diffusers`.
        settings: As for `from_network`, in place of what the scheduler says.

    Raises:
        InputError: It has no network, or one or a scheduler that is not known here.
    """
    name = type(pipeline).__name__
    network = next((net for part in PARTS if (net := getattr(pipeline, part, None))), None)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{name} has no {' or '.join(PARTS)}; expected a diffusion pipeline, or pass its network: "
            "load_prior(net, predicts=..., schedule=...)"
        )
    config = current({**_config(network), "_class_name": type(network).__name__})
    found = [vae for part in AUTOENCODERS if (vae := getattr(pipeline, part, None)) is not None]
    autoencoder = found[0] if found else None
    return assemble(
        network,
        kind_of(config, name),
        config,
        {**_config(pipeline.scheduler), "_class_name": type(pipeline.scheduler).__name__},
        autoencoder,
        None
        if autoencoder is None
        else scaling({**_config(autoencoder), "_class_name": type(autoencoder).__name__}),
        shape=shape,
        **settings,
    )


def _config(part: Any) -> dict[str, Any]:
    return dict(getattr(part, "config", {}))
