"""Weights of the networks of EDM (Karras et al. 2022), such as those of InverseBench, and EDM's own pickles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invguide.errors import CheckpointError, InputError, require, suggest
from invguide.priors.checkpoint_file import load_strictly
from invguide.priors.labels import WithLabels
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.nvidia_pickle import read_nvidia_pickle

NARROWEST = 128  # below, EDM normalises over fewer groups than the networks of deepinv that are filled here
FINE = 20_000  # steps into which the continuous time of "vp" is divided


def vp_table(beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000) -> dict[str, Any]:
    """Return arguments of `from_network` for score_sde's continuous VP: the network's time is (steps - 1) t, t <= 1."""
    t = torch.linspace(0, 1, FINE + 1, dtype=torch.float64)
    products = torch.exp(-(0.5 * beta_d * t**2 + beta_min * t))
    return {"predicts": "eps", "schedule": products, "time_scale": (steps - 1) / FINE}


PRECONDITIONS: dict[str, dict[str, Any]] = {
    "edm": {"predicts": "edm", "schedule": "edm"},
    "vp": vp_table(),
}


def is_edm(weights: Mapping[str, Tensor]) -> bool:
    ends = ("out_conv.weight", "_aux_conv.weight")
    return {"map_layer0.weight", "map_layer1.weight"} <= weights.keys() and any(
        name.endswith(ends) for name in weights
    )


def is_dhariwal(weights: Mapping[str, Tensor]) -> bool:
    """Whether it is EDM's ADM network; the other one is SongUNet (DDPM++ and NCSN++)."""
    return "out_conv.weight" in weights


def infer_network(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Read the arguments of deepinv.models.ADMUNet, or NCSNpp, off the names and shapes.

    Raises:
        CheckpointError: They are not those of such a network.
    """
    try:
        blocks = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", k) for k in weights]
        found = {(int(m[1]), int(m[2])): weights[m[0]].shape[0] for m in blocks if m}
        sizes = sorted({size for size, _ in found}, reverse=True)
        first = weights[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"]
        last = next(
            v for k, v in weights.items() if k.endswith(("out_conv.weight", "aux_conv.weight"))
        )
        embedding, width = weights["map_layer0.weight"].shape
        other = {}
        if not is_dhariwal(weights):
            width = first.shape[0]
            other["model_type"] = "ncsn" if "map_noise.freqs" in weights else "ddpm"
        channels = [found[size, 0] for size in sizes]
        if min(channels) < NARROWEST or any(count % width for count in channels):
            raise ValueError(f"channels {channels}, expected multiples of {width}, {NARROWEST} up")
        for key, name in (
            ("label_dim", "map_label.weight"),
            ("augment_dim", "map_augment.weight"),
        ):
            other[key] = weights[name].shape[1] if name in weights else 0
        return {
            "img_resolution": sizes[0],
            "in_channels": first.shape[1],
            "out_channels": last.shape[0],
            "model_channels": width,
            "channel_mult": [count // width for count in channels],
            "channel_mult_emb": embedding // width,
            "num_blocks": len(found) // len(sizes),
            "attn_resolutions": [
                size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in weights
            ],
            **other,
        }
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise CheckpointError(
            f"{source} has the names of an EDM network but not its structure ({error}); build the network "
            "yourself and pass it: load_prior(net, weights=file, predicts='edm', schedule='edm')"
        ) from error


def load_edm(
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    precondition: str | None = None,
    shape: tuple[int | None, ...] | None = None,
    **settings: Any,
) -> NetworkPrior:
    """Return the prior of such a state dict.

    Args:
        weights, source: The state dict and the file that it is from.
        precondition: "edm", or "vp" for a network that predicts the noise at the continuous time of score_sde (such
            as blackhole-50k.pt of InverseBench). Not visible in the file: "edm" by default of EDM's ADM network, which
            is released in no other way, and to be told of the others.
        shape: Of one sample; by default the size that the names in the file tell.
        settings: As for `from_network`; sigma_data is 0.5 unless given, as in EDM and InverseBench.

    Raises:
        CheckpointError: The file does not fit.
        InputError: precondition is unknown, or has to be told.
    """
    arguments = infer_network(weights, source)
    if precondition is None and is_dhariwal(weights):
        precondition = "edm"
    if precondition is None and not {"predicts", "schedule"} <= settings.keys():
        raise InputError(
            f"{source} is a SongUNet (DDPM++ or NCSN++), and the file does not tell its preconditioning: pass "
            "precondition='edm' for networks of EDM, 'vp' for VP networks of score_sde and InverseBench, or "
            "predicts= and schedule="
        )
    if precondition not in (None, *PRECONDITIONS):
        raise InputError(
            f"unknown precondition {precondition!r}; {suggest(precondition, PRECONDITIONS)}"
        )
    models = require("deepinv.models", "a checkpoint of EDM")
    kind = models.ADMUNet if is_dhariwal(weights) else models.NCSNpp
    with torch.device("meta"):  # shapes are compared before memory is taken
        net = kind(**arguments, pretrained=None)
    if "map_augment.weight" not in weights:
        net.map_augment = None  # where deepinv makes one that is not used in sampling
    load_strictly(net, weights, source)
    size = arguments["img_resolution"]
    return from_network(
        WithLabels(net, arguments["label_dim"], one_hot=True, method="forward_unet"),
        **{**PRECONDITIONS.get(precondition or "", {}), **settings},
        shape=shape or (arguments["in_channels"], size, size),
    )


def load_edm_pickle(path: Path, **settings: Any) -> NetworkPrior:
    """Return the prior of a .pkl file of EDM, which tells its preconditioning; no code of it is run.

    Raises:
        CheckpointError: Damaged, unsafe, or of another network.
    """
    stored = read_nvidia_pickle(path)
    attributes = stored.attributes
    told: dict[str, Any]
    if stored.kind == "EDMPrecond":
        told = {"sigma_data": float(attributes["sigma_data"]), "precondition": "edm"}
    elif stored.kind == "VPPrecond":
        told = vp_table(*(attributes[k] for k in ("beta_d", "beta_min", "M")))
    else:
        raise CheckpointError(
            f"{path} holds a {stored.kind or 'network without a class'}; expected EDMPrecond or VPPrecond"
        )
    weights = {k.removeprefix("model."): v for k, v in stored.weights.items()}
    if not is_edm(weights):
        raise CheckpointError(f"{path} holds no DhariwalUNet or SongUNet, the networks of EDM")
    return load_edm(weights, path, **{**told, **settings})
