"""Weights of the networks of EDM (Karras et al. 2022), such as those of InverseBench, and EDM's own pickles."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError, require, suggest
from invguide.numerics.linear import per_sample
from invguide.priors.checkpoints.file import load_strictly
from invguide.priors.checkpoints.nvidia_pickle import StoredNetwork
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.networks.clocks import LARGEST_USEFUL_SIGMA
from invguide.priors.networks.labels import WithLabels

NARROWEST = 128  # below, EDM normalises over fewer groups than the networks of deepinv that are filled here
FINE = 20_000  # steps into which the continuous time of "vp" is divided
LEVELS = "u"  # the name of the table of noise levels among the weights of an iDDPM network


def vp_table(beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000) -> dict[str, Any]:
    """Return arguments of `from_network` for score_sde's continuous VP: the network's time is (steps - 1) t, t <= 1."""
    t = torch.linspace(0, 1, FINE + 1, dtype=torch.float64)
    products = torch.exp(-(0.5 * beta_d * t**2 + beta_min * t))
    return {"predicts": "eps", "schedule": products, "time_scale": (steps - 1) / FINE}


def iddpm_levels(least: float = 0.001, offset: float = 0.008, steps: int = 1000) -> Tensor:
    """Return the noise levels of iDDPM as EDM has them, (steps + 1,), from the largest to 0.

    They follow the cosine schedule, with ratios of neighbouring cumulative products of at least `least`.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    bar = (math.pi / 2 * j / (steps * (1 + offset))).sin() ** 2
    ratios = (bar[:-1] / bar[1:]).clamp_min(least).flip(0)
    squares = ratios.reciprocal().cumprod(0) - 1
    return torch.cat([squares.new_zeros(1), squares]).flip(0).sqrt()


class VENoise(nn.Module):
    """The noise in x = x0 + sigma n by a VE network of EDM, whose time is ln(sigma / 2), whose output is -n."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        return -self.net(x, (sigma / 2).log(), **condition)


class IDDPMNoise(nn.Module):
    """The noise in x = x0 + sigma n by an iDDPM network, which knows whole steps only: that of the nearest level.

    Args:
        levels: Of its steps, the last one first, and 0.
    """

    def __init__(self, net: nn.Module, levels: Tensor) -> None:
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, x: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        nearest = (sigma[:, None] - self.levels.to(sigma)).abs().argmin(1)
        step = len(self.levels) - 2 - nearest
        factor = (1 + sigma**2).rsqrt().to(x.dtype)
        return self.net(per_sample(factor, x) * x, step.to(sigma.dtype), **condition)


Preconditioning = Callable[[nn.Module, Tensor], tuple[nn.Module, dict[str, Any]]]


def _iddpm(net: nn.Module, levels: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    largest = min(float(levels[0]), LARGEST_USEFUL_SIGMA)
    settings = {"sigma_min": float(levels[-2]), "sigma_max": largest}
    return IDDPMNoise(net, levels), {"predicts": "eps", "schedule": "ve", **settings}


# By name: the network that `from_network` is given, and its arguments.
PRECONDITIONS: dict[str, Preconditioning] = {
    "edm": lambda net, _: (net, {"predicts": "edm", "schedule": "edm"}),
    "vp": lambda net, _: (net, vp_table()),
    "ve": lambda net, _: (
        VENoise(net),
        {"predicts": "eps", "schedule": "ve", "sigma_min": 0.02, "sigma_max": 100.0},
    ),
    "iddpm": _iddpm,
}


def is_edm(weights: Mapping[str, Tensor]) -> bool:
    weights = of_network(weights)
    ends = ("out_conv.weight", "_aux_conv.weight")
    return {"map_layer0.weight", "map_layer1.weight"} <= weights.keys() and any(
        name.endswith(ends) for name in weights
    )


def of_network(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without the prefix that a preconditioned network puts before those of its network."""
    return {name.removeprefix("model."): value for name, value in weights.items()}


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
        precondition: A column of EDM's table 1: "edm"; "vp" for a network that predicts the noise at the continuous
            time of score_sde (such as blackhole-50k.pt of InverseBench); "ve" for one of score_sde whose time is
            ln(sigma / 2); "iddpm" for one at the steps of a cosine schedule. The file tells "iddpm" by its table of
            levels or its learned variance. Of EDM's ADM network, "edm" is the default; of others it has to be told.
        shape: Of one sample; by default the size that the names in the file tell.
        settings: As for `from_network`; sigma_data is 0.5 unless given, as in EDM and InverseBench.

    Raises:
        CheckpointError: The file does not fit.
        InputError: precondition is unknown, or has to be told.
    """
    weights = of_network(weights)
    levels = weights.pop(LEVELS, None)
    arguments = infer_network(weights, source)
    if precondition is None and not {"predicts", "schedule"} <= settings.keys():
        precondition = _visible(weights, levels, arguments, source)
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
    labelled: nn.Module = WithLabels(
        net, arguments["label_dim"], one_hot=True, method="forward_unet"
    )
    usual: dict[str, Any] = {}
    if precondition is not None:
        table = iddpm_levels() if levels is None else _checked(levels, source)
        labelled, usual = PRECONDITIONS[precondition](labelled, table)
    return from_network(
        labelled, **{**usual, **settings}, shape=shape or (arguments["in_channels"], size, size)
    )


def _checked(levels: Tensor, source: str | Path) -> Tensor:
    falls = levels.ndim == 1 and len(levels) > 2 and bool((levels.diff() < 0).all())
    if not (falls and bool(levels.isfinite().all()) and float(levels[-1]) == 0):
        raise CheckpointError(
            f"{source} holds a table of noise levels ({LEVELS}) that does not decrease to 0; download it again"
        )
    return levels


def _visible(
    weights: Mapping[str, Tensor],
    levels: Tensor | None,
    arguments: Mapping[str, Any],
    source: str | Path,
) -> str:
    """The precondition that the file tells, or an error that says what to tell."""
    twice = arguments["out_channels"] == 2 * arguments["in_channels"]
    if levels is not None or (twice and is_dhariwal(weights)):
        return "iddpm"
    if is_dhariwal(weights):
        return "edm"
    raise InputError(
        f"{source} is a SongUNet (DDPM++ or NCSN++), and the file does not tell its preconditioning: pass "
        "precondition='edm' for networks of EDM, 'vp' for VP networks of score_sde and InverseBench, 've' or "
        "'iddpm' as in EDM's table 1, or predicts= and schedule="
    )


# By the class of a pickle: what its attributes tell, as arguments of `load_edm`.
TOLD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "EDMPrecond": lambda a: {"precondition": "edm", "sigma_data": float(a["sigma_data"])},
    "VPPrecond": lambda a: vp_table(float(a["beta_d"]), float(a["beta_min"]), int(a["M"])),
    "VEPrecond": lambda a: {
        "precondition": "ve",
        "sigma_min": float(a["sigma_min"]),
        "sigma_max": float(a["sigma_max"]),
    },
    "iDDPMPrecond": lambda _: {"precondition": "iddpm"},  # its levels are among the weights
}


def load_edm_pickle(stored: StoredNetwork, path: Path, **settings: Any) -> NetworkPrior:
    """Return the prior of a .pkl file of EDM, which tells its preconditioning; no code of it is run.

    Raises:
        CheckpointError: Of another network, or it lacks what its class has.
    """
    if stored.kind not in TOLD:
        raise CheckpointError(
            f"{path} holds a {stored.kind or 'network without a class'}; expected one of {', '.join(TOLD)} of EDM, or "
            "Precond of EDM2"
        )
    if not is_edm(stored.weights):
        raise CheckpointError(f"{path} holds no DhariwalUNet or SongUNet, the networks of EDM")
    try:
        told = TOLD[stored.kind](stored.attributes)
        if stored.kind == "iDDPMPrecond" and LEVELS not in stored.weights:
            raise KeyError(LEVELS)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds a {stored.kind} that lacks what its class has ({error}); download it again"
        ) from error
    return load_edm(stored.weights, path, **{**told, **settings})
