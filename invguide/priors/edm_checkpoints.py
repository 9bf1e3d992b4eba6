"""Weights of EDM's ADM network (Karras et al. 2022, DhariwalUNet), such as those of InverseBench."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invguide.errors import CheckpointError, require
from invguide.priors.checkpoint_file import load_strictly
from invguide.priors.labels import WithLabels
from invguide.priors.network import NetworkPrior, from_network

NARROWEST = (
    128  # below, EDM normalises over fewer groups than the network of deepinv that is filled here
)


def is_edm(weights: Mapping[str, Tensor]) -> bool:
    wanted = {"map_layer0.weight", "map_layer1.weight", "out_norm.weight", "out_conv.weight"}
    return wanted <= weights.keys() and any(name.startswith("enc.") for name in weights)


def infer_network(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Read the arguments of deepinv.models.ADMUNet off the names and shapes.

    Raises:
        CheckpointError: They are not those of such a network.
    """
    try:
        blocks = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", k) for k in weights]
        found = {(int(m[1]), int(m[2])): weights[m[0]].shape[0] for m in blocks if m}
        sizes = sorted({size for size, _ in found}, reverse=True)
        embedding, width = weights["map_layer0.weight"].shape
        channels = [found[size, 0] for size in sizes]
        if min(channels) < NARROWEST or any(count % width for count in channels):
            raise ValueError(f"channels {channels}, expected multiples of {width}, {NARROWEST} up")
        extra = {
            key: weights[name].shape[1] if name in weights else 0
            for key, name in (
                ("label_dim", "map_label.weight"),
                ("augment_dim", "map_augment.weight"),
            )
        }
        return {
            "img_resolution": sizes[0],
            "in_channels": weights[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"].shape[1],
            "out_channels": weights["out_conv.weight"].shape[0],
            "model_channels": width,
            "channel_mult": [count // width for count in channels],
            "channel_mult_emb": embedding // width,
            "num_blocks": len(found) // len(sizes),
            "attn_resolutions": [
                size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in weights
            ],
            **extra,
        }
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{source} has the names of an EDM network but not its structure ({error}); build the network "
            "yourself and pass it: load_prior(net, weights=file, predicts='edm', schedule='edm')"
        ) from error


def load_edm(
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    shape: tuple[int | None, ...] | None = None,
    **settings: Any,
) -> NetworkPrior:
    """Return the prior of such a state dict, preconditioned as in EDM.

    Args:
        weights, source: The state dict and the file that it is from.
        shape: Of one sample; by default the size that the names in the file tell.
        settings: As for `from_network`; sigma_data is 0.5 unless given, as in EDM and InverseBench.

    Raises:
        CheckpointError: The file does not fit.
    """
    arguments = infer_network(weights, source)
    models = require("deepinv.models", "a checkpoint of EDM")
    with torch.device("meta"):  # shapes are compared before memory is taken
        net = models.ADMUNet(**arguments, pretrained=None)
    load_strictly(net, weights, source)
    size = arguments["img_resolution"]
    return from_network(
        WithLabels(net, arguments["label_dim"], one_hot=True, method="forward_unet"),
        **{"predicts": "edm", "schedule": "edm", **settings},
        shape=shape or (arguments["in_channels"], size, size),
    )
