"""Checkpoints of EDM2 (Karras et al. 2024): state dicts, and NVIDIA's own pickles, of pixels and of latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError
from invguide.prior import Prior
from invguide.priors.checkpoints.diffusers_folder import load_autoencoder
from invguide.priors.checkpoints.file import load_strictly
from invguide.priors.checkpoints.nvidia_pickle import StoredNetwork
from invguide.priors.network import from_network
from invguide.priors.networks.edm2 import EDM2, Architecture, Balance
from invguide.priors.networks.labels import WithLabels
from invguide.priors.wrappers.latent import LatentPrior

PICKLED = "Precond"  # the class of an EDM2 pickle
UNCERTAINTY = "logvar_"  # weights that only training uses
NEAREST = [1, 1]  # the only filter of resizing that any released network has


@dataclass(frozen=True)
class Standard:
    """How EDM2 standardises the latents z of an autoencoder, channel by channel: scale z + bias.

    The defaults are those of every released latent network, for stabilityai/sd-vae-ft-mse.
    """

    scale: tuple[float, ...] = (0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28)
    bias: tuple[float, ...] = (
        *(-5.81 * 0.5 / 4.17, -3.25 * 0.5 / 4.62, -0.12 * 0.5 / 3.71, 2.15 * 0.5 / 3.28),
    )


class Standardised(nn.Module):
    """The autoencoder of EDM2's latents for `LatentPrior`: pictures in [-1, 1] to standardised latents, and back.

    EDM2 shows its autoencoder pictures in [0, 1].
    """

    def __init__(self, autoencoder: nn.Module, standard: Standard) -> None:
        super().__init__()
        self.autoencoder, self.standard = autoencoder, standard

    def encode(self, x: Tensor) -> Tensor:
        output: Any = self.autoencoder.encode((x + 1) / 2)  # pyright: ignore[reportCallIssue]
        scale, bias = self._per_channel(x)
        return scale * output.latent_dist.mode() + bias

    def decode(self, z: Tensor) -> Tensor:
        scale, bias = self._per_channel(z)
        output: Any = self.autoencoder.decode((z - bias) / scale)  # pyright: ignore[reportCallIssue]
        return 2 * output.sample - 1

    def _per_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, bias = torch.tensor([self.standard.scale, self.standard.bias]).to(x)[
            ..., None, None
        ]
        return scale, bias


def is_edm2(weights: Mapping[str, Tensor]) -> bool:
    return {"emb_fourier.freqs", "emb_noise.weight", "out_gain"} <= of_network(weights).keys()


def of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the U-Net by the names that it gives them, out of those of a preconditioned network too."""
    return {
        name.removeprefix("unet."): value
        for name, value in weights.items()
        if not name.startswith(UNCERTAINTY)
    }


def infer_architecture(weights: Mapping[str, Tensor], source: str | Path) -> Architecture:
    """Read the architecture off the names and shapes.

    Raises:
        CheckpointError: They are not those of an EDM2 network.
    """
    try:
        blocks = [
            re.fullmatch(r"enc\.(\d{1,6})x\1_block(\d+)\.conv_res0\.weight", k) for k in weights
        ]
        found = {(int(m[1]), int(m[2])): weights[m[0]].shape[0] for m in blocks if m}
        sizes = sorted({size for size, _ in found}, reverse=True)
        first = weights[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"]
        embedding, noise = weights["emb_noise.weight"].shape
        labels = weights.get("emb_label.weight")
        return Architecture(
            size=sizes[0],
            image_channels=first.shape[1] - 1,
            channels=tuple(found[size, 0] for size in sizes),
            attention=tuple(
                f"enc.{size}x{size}_block0.attn_qkv.weight" in weights for size in sizes
            ),
            num_blocks=len(found) // len(sizes),
            noise_channels=noise,
            embedding_channels=embedding,
            num_classes=0 if labels is None else labels.shape[1],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{source} has the names of an EDM2 network but not its structure ({error}); build the network "
            "yourself and pass it: load_prior(net, weights=file, predicts='edm', schedule='edm')"
        ) from error


def load_edm2(
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    channels_per_head: int = 64,
    res_balance: float = 0.3,
    attn_balance: float = 0.3,
    label_balance: float = 0.5,
    concat_balance: float = 0.5,
    clip_act: float | None = 256.0,
    autoencoder: nn.Module | str | Path | None = None,
    standard: Standard | None = None,
    shape: tuple[int | None, ...] | None = None,
    **settings: Any,
) -> Prior:
    """Return the prior of such a state dict.

    Args:
        weights, source: The state dict and the file that it is from.
        channels_per_head, res_balance, attn_balance, label_balance, concat_balance, clip_act: What the weights do not
            tell; the defaults are those of every released network. See `invguide.priors.networks.edm2.Balance`.
        autoencoder: Of a network over latents: diffusers' AutoencoderKL, or its folder or hub id, as a rule
            "stabilityai/sd-vae-ft-mse". Operators and results are then pictures; without it, they are the standardised
            latents, of deviation 0.5.
        standard: How those are made from the autoencoder's; by default as for every released network.
        shape: Of one sample; by default the size that the names in the file tell.
        settings: As for `from_network`. A network of 1 or 3 channels is one of pixels in [-1, 1], others are of
            latents, unless data_range is given.

    Raises:
        CheckpointError: The file does not fit.
        InputError: An autoencoder for a network of pixels, or heads that do not divide the channels.
    """
    weights = of_network(weights)
    architecture = infer_architecture(weights, source)
    latent = architecture.image_channels not in (1, 3) or standard is not None
    if autoencoder is not None and not latent:
        raise InputError(f"{source} is a network of pixels: leave autoencoder= out")
    known = standard or Standard()
    if autoencoder is not None and {len(known.scale), len(known.bias)} != {
        architecture.image_channels
    }:
        raise InputError(
            f"{source} is a network of {architecture.image_channels} channels, and standard= has {len(known.scale)} "
            f"scales and {len(known.bias)} biases; pass one of each per channel"
        )
    balance = Balance(
        channels_per_head, res_balance, attn_balance, label_balance, concat_balance, clip_act
    )
    with torch.device("meta"):  # shapes are compared before memory is taken
        net = EDM2(architecture, balance)
    load_strictly(net, weights, source)
    usual = {"predicts": "edm", "schedule": "edm", "data_range": (0, 1) if latent else (-1, 1)}
    prior = from_network(
        WithLabels(net, architecture.num_classes, one_hot=True),
        **{**usual, **settings},
        shape=shape or (architecture.image_channels, architecture.size, architecture.size),
    )
    if autoencoder is None:
        return prior
    if not isinstance(autoencoder, nn.Module):
        autoencoder = load_autoencoder(autoencoder)
    blocks = dict(getattr(autoencoder, "config", {})).get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if blocks else 8
    return LatentPrior(prior, Standardised(autoencoder, known), scaling_factor=1.0, factor=factor)


def load_edm2_pickle(stored: StoredNetwork, path: Path, **settings: Any) -> Prior:
    """Return the prior of a .pkl file of EDM2, which tells all that a state dict does not; no code of it is run.

    Raises:
        CheckpointError: Of another network, or it lacks what its class has.
    """
    if not is_edm2(stored.weights):
        raise CheckpointError(f"{path} holds no U-Net of EDM2")
    try:
        told = _told(stored)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} holds a network of EDM2 that lacks what its class has ({error}); download it again"
        ) from error
    return load_edm2(stored.weights, path, **{**told, **settings})


def _told(stored: StoredNetwork) -> dict[str, Any]:
    """The arguments of `load_edm2` that are kept beside the weights of a pickle."""
    unet = stored.parts["unet"].attributes
    blocks = [part.attributes for part in stored.parts.values() if part.kind == "Block"]
    if any(list(block["resample_filter"]) != NEAREST for block in blocks):
        raise ValueError(f"a filter other than {NEAREST}")
    heads = next((b for b in blocks if b["num_heads"]), None)
    limit = blocks[0]["clip_act"]
    told = {
        "sigma_data": float(stored.attributes["sigma_data"]),
        "label_balance": float(unet["label_balance"]),
        "concat_balance": float(unet["concat_balance"]),
        "res_balance": float(blocks[0]["res_balance"]),
        "attn_balance": float(blocks[0]["attn_balance"]),
        "clip_act": None if limit is None else float(limit),
    }
    if heads is not None:
        told["channels_per_head"] = int(heads["out_channels"]) // int(heads["num_heads"])
    encoder = stored.encoder
    if encoder is not None and encoder.kind == "StabilityVAEEncoder":
        scale, bias = (encoder.attributes[name].values for name in ("scale", "bias"))
        told["standard"] = Standard(scale, bias)
    elif encoder is not None and encoder.kind != "StandardRGBEncoder":
        raise ValueError(f"an unknown encoder {encoder.kind}")
    return told
