"""The priors that ship in the package: weights as safetensors, each with a model card beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from invguide.errors import CheckpointError, InputError, suggest
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.unet import UNet

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Embedded:
    """What `invguide priors` prints of one shipped prior."""

    name: str
    description: str
    sigma_min: float
    sigma_max: float


EMBEDDED = {
    e.name: e
    for e in (
        Embedded("natural", "colour photographs, any size from 32 x 32 up", 0.01, 40.0),
        Embedded("natural-tiny", "the same, smaller and faster, for tests", 0.01, 40.0),
    )
}


def weights_path(name: str) -> Path:
    """Return the weights file of a shipped prior, or the path that this is.

    Raises:
        InputError: Neither (the nearest name is suggested).
    """
    if name in EMBEDDED:
        return WEIGHTS / f"{name}.safetensors"
    if Path(name).is_file() or Path(name).suffix == ".safetensors":
        return Path(name)
    raise InputError(f"unknown prior {name!r}; {suggest(name, EMBEDDED)}")


def load_embedded(name: str) -> NetworkPrior:
    """Return a shipped prior by name, or one of `python -m invguide.training` by the path of its weights.

    Images (C, H, W), data range [0, 1].
    """
    network, sigma_data = read_unet(weights_path(name))
    entry = EMBEDDED.get(name, EMBEDDED["natural"])
    prior = from_network(
        network,
        predicts="edm",
        schedule="edm",
        shape=(network.config["image_channels"], None, None),
        multiple=network.multiple,
        sigma_data=sigma_data,
        sigma_min=entry.sigma_min,
        sigma_max=entry.sigma_max,
    )
    prior.symmetric = (
        True  # nearly so: pictures have an up and a down, their edges and textures hardly
    )
    prior.min_size = 32  # the size of the smallest crops in training
    prior.knows_objects = name not in EMBEDDED  # grey photographs get colours of 15 dB from these
    return prior


def read_unet(path: Path) -> tuple[UNet, float]:
    """Rebuild the network from a weights file of our trainer: architecture in the header, every key required.

    Raises:
        CheckpointError: The file is missing, truncated, of another architecture, or holds non-finite weights.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        config = json.loads(metadata["network"])
        network = UNet(**{**config, "channels": tuple(config["channels"])})
        network.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"weights file {path} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "it is missing, truncated or not written by invguide.training: reinstall, or train it again"
        ) from error
    if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
        raise CheckpointError(
            f"weights file {path} holds non-finite numbers; reinstall, or train it again"
        )
    return network, float(metadata["sigma_data"])
