"""Models saved by diffusers: a network, its configuration and that of its scheduler, which says what it predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import CheckpointError, InputError, require
from invguide.prior import Prior
from invguide.priors.checkpoints.diffusers_models import KINDS, Kind
from invguide.priors.checkpoints.diffusers_weights import files_of, read_all, read_json, weights_in
from invguide.priors.checkpoints.file import load_strictly
from invguide.priors.checkpoints.hub import HUB_ID, fetch_weights, fetching
from invguide.priors.network import from_network
from invguide.priors.networks.clocks import cosine_betas, linear_betas, scaled_linear_betas
from invguide.priors.wrappers.latent import LatentPrior

PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Names of attention weights in files written before diffusers 0.14.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Classes of transformers that were one when DiT and PixArt were published, told apart by their norm_type.
OLD_TRANSFORMER = "Transformer2DModel"
TRANSFORMERS = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}
PARTS = ("unet", "transformer")  # folders of a pipeline that may hold its network
AUTOENCODERS = ("vae", "vqvae")  # likewise
AUTOENCODER = "AutoencoderKL"
MOST_STEPS = 100_000  # of a noise schedule; more than 1000 are rare


def download(repository: str) -> Path:
    """Fetch a model of the Hugging Face hub with their own client, small files first, and return its folder.

    Raises:
        InputError: There is no such model, or none of a kind that can be loaded.
    """
    with fetching(repository) as fetch:
        folder = fetch("*.json")
        place = network_folder(folder)
        _kind(place)  # a refusal comes before gigabytes
        for part in _parts(place):
            fetch_weights(fetch, folder, part)
        return folder


def load_diffusers(
    folder: Path, *, shape: tuple[int | None, ...] | None = None, **settings: Any
) -> Prior:
    """Return the prior of a folder of diffusers: of a whole pipeline, or of its network.

    The prior of a latent diffusion model is a `LatentPrior` where its autoencoder lies beside it in vae/ or vqvae/,
    and else one over the latents themselves.

    Args:
        folder: With config.json, unet/config.json or transformer/config.json, weights beside it, and
            scheduler_config.json in it, in scheduler/, or in ../scheduler/.
        shape: Of what the network takes; by default that of the configuration.
        settings: As for `from_network`, in place of what the scheduler says.

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit.
        InputError: A network or scheduler that is not known here.
        MissingPackageError: diffusers is not installed.
    """
    place, *autoencoder = _parts(network_folder(folder))
    kind, config = _kind(place), _config(place)  # a refusal comes before the weights
    told = {"predicts", "schedule"} <= settings.keys()
    return assemble(
        _model(place),
        kind,
        config,
        None if told else _scheduler_config(place),
        _model(autoencoder[0]) if autoencoder else None,
        scaling(read_json(autoencoder[0] / "config.json")) if autoencoder else None,
        shape=shape,
        **settings,
    )


def assemble(
    network: nn.Module,
    kind: Kind,
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    autoencoder: nn.Module | None,
    scaling_factor: float | None,
    *,
    shape: tuple[int | None, ...] | None = None,
    **settings: Any,
) -> Prior:
    """Return the prior of a network of diffusers, its configuration, that of its scheduler, and its autoencoder.

    Args:
        network, kind, config: A model of one of `KINDS`.
        scheduler: Not asked where predicts= and schedule= are among the settings.
        autoencoder: Of a latent diffusion model, or None.
        scaling_factor: As for `LatentPrior`.
        shape, settings: As for `load_diffusers`.
    """
    told = {"predicts", "schedule"} <= settings.keys()
    training = {} if told or scheduler is None else convention(scheduler)
    size = config.get("sample_size")
    size = size if isinstance(size, list | tuple) else (size, size)
    if (
        kind.latent or autoencoder is not None
    ):  # their autoencoder brings them to a deviation of one
        training |= {"data_range": (0.0, 1.0), "sigma_data": 1.0}
    prior = from_network(
        kind.wrap(network),
        **{"multiple": kind.multiple(config), **training, **settings},
        shape=shape or (kind.channels(config), *((None, None) if kind.any_size else size)),
    )
    if autoencoder is None:
        return prior
    return LatentPrior(prior, autoencoder, scaling_factor=scaling_factor)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return every file of weights that `load_diffusers` reads of a folder: its network's, its autoencoder's.

    Raises:
        CheckpointError: Weights or an index are missing or damaged.
        InputError: No folder of diffusers.
    """
    parts = _parts(network_folder(folder))
    return tuple(file for part in parts for file in files_of(weights_in(part)))


def load_autoencoder(where: str | Path) -> nn.Module:
    """Return an AutoencoderKL of diffusers by its folder or hub id, such as "stabilityai/sd-vae-ft-mse".

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit.
        InputError: It is another model, or cannot be had.
        MissingPackageError: diffusers is not installed.
    """
    folder = Path(where)
    if folder.is_dir() or not HUB_ID.fullmatch(str(where)):
        _check_autoencoder(folder)
    else:
        with fetching(str(where)) as fetch:
            folder = fetch("*.json")
            _check_autoencoder(folder)
            fetch_weights(fetch, folder, folder)
    return _model(folder)


def _check_autoencoder(folder: Path) -> None:
    file = folder / "config.json"
    name = read_json(file).get("_class_name") if file.is_file() else "no folder with a config.json"
    if name != AUTOENCODER:
        raise InputError(
            f"{folder} is {name}; expected the folder or hub id of an {AUTOENCODER}, such as vae/ of a pipeline"
        )


def _model(place: Path) -> nn.Module:
    """Rebuild a model of diffusers from its configuration, and fill it with all of its weights."""
    config = _config(place)
    weights = weights_in(place)
    diffusers = require("diffusers", "a folder of diffusers", install="'invguide[diffusers]'")
    try:
        build = getattr(diffusers, config["_class_name"]).from_config
        with torch.device("meta"):  # shapes are compared before memory is taken
            net = build(config)
        # What it computes when it is built, such as positions, is the same in one without layers.
        saved = net.state_dict()
        computed = [name for name, _ in net.named_buffers() if name not in saved]
        small = build({**config, "num_layers": 0}) if computed else net
    except Exception as error:  # whatever diffusers makes of wrong settings
        raise CheckpointError(
            f"{place}/config.json is refused by diffusers ({type(error).__name__}: {error}); download or save "
            "the folder again"
        ) from error
    places = [(net.get_submodule(name.rpartition(".")[0]), name) for name in computed]
    for owner, name in places:
        delattr(owner, name.rpartition(".")[2])
    load_strictly(net, _modern(read_all(weights)), weights)
    for owner, name in places:
        owner.register_buffer(name.rpartition(".")[2], small.get_buffer(name), persistent=False)
    return net


def convention(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of `from_network` off the configuration of a scheduler.

    Raises:
        InputError: A scheduler, noise schedule or prediction that is not known here.
    """
    name = scheduler.get("_class_name", "")
    if name == "ScoreSdeVeScheduler":  # score_sde: images in [0, 1], time is sigma
        levels = {key: float(scheduler[key]) for key in ("sigma_min", "sigma_max")}
        return {"predicts": "score", "schedule": "ve", "data_range": (0.0, 1.0), **levels}
    if name.startswith("FlowMatch"):
        steps = float(scheduler["num_train_timesteps"])
        return {"predicts": "flow", "schedule": "flow", "time_scale": steps}
    prediction = scheduler.get("prediction_type", "epsilon")  # older ones had no other
    clock = scheduler.get("timestep_type", "discrete")  # the other one is log sigma / 4, of v only
    known = prediction in PREDICTS and (clock, prediction) != ("continuous", "v_prediction")
    if "beta_schedule" not in scheduler or not known:
        raise InputError(
            f"the scheduler {name or 'without a name'} (prediction_type {prediction!r}, timestep_type {clock!r}) is "
            "not known here: pass predicts= and schedule=, as invguide.priors.from_network lists them"
        )
    return {"predicts": PREDICTS[prediction], "schedule": alphas_bar(scheduler)}


def alphas_bar(scheduler: Mapping[str, Any]) -> Tensor:
    """Return the cumulative products of 1 - beta, (T,), as float64."""
    steps, kind = int(scheduler.get("num_train_timesteps", 1000)), scheduler["beta_schedule"]
    if not 2 <= steps <= MOST_STEPS:
        raise InputError(f"num_train_timesteps is {steps}; expected 2 to {MOST_STEPS}")
    start, end = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    if scheduler.get("trained_betas") is not None:
        betas = torch.as_tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = linear_betas(start, end, steps)
    elif kind == "scaled_linear":
        betas = scaled_linear_betas(start, end, steps)
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(steps)
    else:
        raise InputError(
            f"beta_schedule {kind!r} is not known here: pass schedule=, its cumulative products of 1 - beta"
        )
    products = (1 - betas).cumprod(0)
    if scheduler.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1
        root = products.sqrt()
        products = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return products


def network_folder(folder: Path) -> Path:
    for place in (folder, *(folder / part for part in PARTS)):
        if (place / "config.json").is_file():
            return place
    raise InputError(
        f"{folder} has no config.json, nor {' nor '.join(f'{part}/config.json' for part in PARTS)}; expected a "
        "folder saved by diffusers, or the path of a weights file"
    )


def _parts(place: Path) -> tuple[Path, ...]:
    """The folder of a network, and that of its autoencoder where it has one."""
    pipeline = place.parent if place.name in PARTS else place
    found = [
        pipeline / name for name in AUTOENCODERS if (pipeline / name / "config.json").is_file()
    ]
    return (place, *found[:1])


def scaling(config: Mapping[str, Any]) -> float | None:
    """The scale of latents of an autoencoder where diffusers would not know it.

    It takes that of Stable Diffusion wherever none is written. Published quantising autoencoders (VQModel) are older
    than the setting, and their networks were trained without a scale.
    """
    return (
        1.0 if config.get("_class_name") == "VQModel" and "scaling_factor" not in config else None
    )


def _scheduler_config(place: Path) -> Mapping[str, Any]:
    for folder in (place, place / "scheduler", place.parent / "scheduler"):
        if (folder / "scheduler_config.json").is_file():
            return read_json(folder / "scheduler_config.json")
    raise InputError(
        f"{place} has no scheduler_config.json, which says what the network predicts: pass predicts= and "
        "schedule=, as invguide.priors.from_network lists them"
    )


def _config(place: Path) -> dict[str, Any]:
    """The configuration of a model, under the present name of its class."""
    return current(read_json(place / "config.json"))


def current(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration under the present name of its class."""
    if config.get("_class_name") != OLD_TRANSFORMER:
        return config
    name = TRANSFORMERS.get(config.get("norm_type", ""), OLD_TRANSFORMER)
    return {**config, "_class_name": name}


def _kind(place: Path) -> Kind:
    return kind_of(_config(place), place)


def kind_of(config: Mapping[str, Any], place: Path | str) -> Kind:
    """The kind of network that a configuration tells; `place` is what the message says holds it.

    Raises:
        InputError: It is not known here, or a setting of it is not.
    """
    name = config.get("_class_name", "network without a name")
    if name not in KINDS:
        raise InputError(
            f"{place} holds a {name}; of diffusers, only {', '.join(KINDS)} can be loaded from a folder. Wrap "
            "another network yourself: load_prior(net, predicts=..., schedule=...)"
        )
    KINDS[name].check(config)
    return KINDS[name]


def _modern(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give attention weights of old files their present names."""
    old = re.compile(rf"\.({'|'.join(RENAMED)})\.(weight|bias)$")
    return {old.sub(lambda m: f".{RENAMED[m[1]]}.{m[2]}", k): v for k, v in weights.items()}
