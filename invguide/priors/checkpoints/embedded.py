"""The priors that ship in the package: weights as safetensors, each with a model card beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invguide.errors import CheckpointError, InputError, suggest
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.networks.unet import UNet

WEIGHTS = Path(__file__).parents[1] / "weights"


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
            names = list(file.keys())
            config = _config(metadata["network"], len(names))
            _check_shapes(config, {name: file.get_slice(name).get_shape() for name in names})
            weights = {name: file.get_tensor(name).float() for name in names}
        network = UNet(**config)
        network.load_state_dict(weights, strict=True)
    except (
        OSError,
        SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"weights file {path} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "it is missing, truncated or not written by invguide.training: reinstall, or train it again"
        ) from error
    if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
        raise CheckpointError(
            f"weights file {path} holds non-finite numbers; reinstall, or train it again"
        )
    sigma_data = float(metadata.get("sigma_data", "nan"))
    if not 0 < sigma_data < math.inf:
        raise CheckpointError(
            f"weights file {path} says that sigma_data is {sigma_data}; expected a number above 0"
        )
    return network, sigma_data


def _config(text: str, tensors: int) -> dict[str, Any]:
    """The arguments of the network, as a file tells them, which holds so many tensors."""
    told = json.loads(text)
    config = {**told, "channels": tuple(told["channels"])}
    numbers = [value for key, value in config.items() if key != "channels"] + list(
        config["channels"]
    )
    if not all(type(value) is int and value > 0 for value in numbers):
        raise ValueError(f"its network is {text[:200]}; expected numbers above 0")
    if config.get("blocks", 1) * len(config["channels"]) > tensors:  # would take for ever to build
        raise ValueError(f"its network is {text[:200]}, which has more than its {tensors} tensors")
    return config


def _check_shapes(config: dict[str, Any], stored: dict[str, list[int]]) -> None:
    """Raise ValueError unless the file holds what the network needs, before memory is taken for either."""
    import torch

    with torch.device("meta"):
        needed = {name: list(t.shape) for name, t in UNet(**config).state_dict().items()}
    if wrong := sorted(n for n in {*needed, *stored} if needed.get(n) != stored.get(n)):
        name = wrong[0]
        raise ValueError(
            f"{name} has the shape {stored.get(name)} in the file, and {needed.get(name)} in the network that it names"
        )
