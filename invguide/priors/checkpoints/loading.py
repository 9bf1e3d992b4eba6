"""Whatever holds a pretrained network becomes a prior here: a name, a file, a folder, or an object."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invguide.arguments.checks import shown
from invguide.errors import InputError, suggest
from invguide.prior import Prior
from invguide.priors.checkpoints.adm import is_adm, load_adm
from invguide.priors.checkpoints.deepinv import is_deepinv, load_deepinv
from invguide.priors.checkpoints.diffusers_folder import download, load_diffusers
from invguide.priors.checkpoints.diffusers_folder import weight_files as diffusers_files
from invguide.priors.checkpoints.diffusers_models import as_network
from invguide.priors.checkpoints.diffusers_pipeline import is_pipeline, load_pipeline
from invguide.priors.checkpoints.edm import is_edm, load_edm, load_edm_pickle
from invguide.priors.checkpoints.edm2 import PICKLED, is_edm2, load_edm2, load_edm2_pickle
from invguide.priors.checkpoints.embedded import EMBEDDED, load_embedded, weights_path
from invguide.priors.checkpoints.file import load_strictly, metadata, read_weights, versions
from invguide.priors.checkpoints.hub import HUB_ID
from invguide.priors.checkpoints.nvidia_pickle import read_nvidia_pickle
from invguide.priors.network import from_network

NOT_SETTINGS = ("net", "weights", "source", "folder", "pipeline")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class Family:
    """A kind of weights file that is recognised by the names in it.

    Attributes:
        load: Called with the state dict, the file it is from, and the settings of the caller.
    """

    name: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    load: Callable[..., Prior]


FAMILIES = (
    Family("guided-diffusion (ADM)", is_adm, load_adm),
    Family("EDM (DhariwalUNet, SongUNet)", is_edm, load_edm),
    Family("EDM2", is_edm2, load_edm2),
)


def load(
    where: str | Path | Prior | nn.Module,
    *,
    weights: str | Path | None = None,
    entry: str | None = None,
    **settings: Any,
) -> Prior:
    """Return a prior; `invguide.load_prior` documents the arguments."""
    if isinstance(where, nn.Module):
        return _from_module(where, weights, entry, settings)
    if not isinstance(where, (str, os.PathLike)) and not is_pipeline(where):
        raise InputError(
            f"load_prior: {shown(where)} is no prior; expected its name, a file, a folder, the id of one on the hub, a "
            "network or a Prior"
        )
    if weights is not None:
        raise InputError(
            "weights= fills a network that you pass: load_prior(net, weights=file, ...); a file alone is the "
            "first argument"
        )
    if is_pipeline(where):
        _check_settings(settings, load_pipeline, from_network)
        return load_pipeline(where, **settings)
    name = str(where)
    if _is_file(name):
        return _from_file(Path(name), entry, settings)
    if entry is not None:
        raise InputError(
            f"entry= picks a part of a weights file, and {name!r} is none: leave it out"
        )
    if _is_folder(name):
        _check_settings(settings, load_diffusers, from_network)
        return load_diffusers(_here(name), **settings)
    _check_settings(settings)
    return load_embedded(name)


def _is_file(name: str) -> bool:
    return name not in EMBEDDED and (Path(name).is_file() or name.endswith(SUFFIXES))


def _is_folder(name: str) -> bool:
    """Whether it is a folder of diffusers, here or on the hub."""
    if name in EMBEDDED or _is_file(name):
        return False
    return Path(name).is_dir() or HUB_ID.fullmatch(name) is not None


def _here(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else download(name)


def weight_files(where: str) -> tuple[Path, ...]:
    """Return the files of weights of what `load` takes as text: an embedded prior, a file, a folder, a hub id."""
    return diffusers_files(_here(where)) if _is_folder(where) else (weights_path(where),)


def _from_module(
    net: nn.Module, weights: str | Path | None, entry: str | None, settings: dict[str, Any]
) -> Prior:
    if isinstance(net, Prior):
        if weights or entry or settings:
            raise InputError("a Prior is taken as it is: leave the other arguments out")
        return net
    deepinv = is_deepinv(net) and "predicts" not in settings
    _check_settings(settings, from_network, *((load_deepinv,) if deepinv else ()))
    missing = [name for name in ("predicts", "schedule") if name not in settings]
    if missing and not deepinv:
        raise InputError(
            f"a network does not tell how it was trained: pass {' and '.join(f'{m}=' for m in missing)}, such as "
            "predicts='eps', schedule='linear-vp'; invguide.priors.from_network lists them"
        )
    if weights is not None:
        load_strictly(net, read_weights(weights, entry), weights)
    if deepinv:
        return load_deepinv(net, **settings)
    return from_network(as_network(net), **settings)


def _from_file(path: Path, entry: str | None, settings: dict[str, Any]) -> Prior:
    if path.suffix == ".safetensors" and (not path.exists() or "network" in metadata(path)):
        _check_settings(settings)
        return load_embedded(str(path))  # written by our own trainer
    if path.suffix == ".pkl":
        stored = read_nvidia_pickle(path)
        newer = stored.kind == PICKLED
        _check_settings(settings, load_edm2 if newer else load_edm, from_network)
        return (load_edm2_pickle if newer else load_edm_pickle)(stored, path, **settings)
    weights = read_weights(path, entry)
    for state in versions(weights):
        for family in FAMILIES:
            if family.recognises(state):
                _check_settings(settings, family.load, from_network)
                return family.load(state, path, **settings)
    names = list(weights)
    raise InputError(
        f"{path} holds {len(names)} tensors ({', '.join(names[:3])}, ...) of no network that is recognised "
        f"({', '.join(family.name for family in FAMILIES)}); build its network and pass it: "
        "load_prior(net, weights=file, predicts=..., schedule=...)"
    )


def _check_settings(settings: Mapping[str, Any], *loaders: Callable[..., Prior]) -> None:
    """Refuse settings that none of these loaders has, rather than ignore them."""
    known = {
        name
        for loader in loaders
        for name, parameter in inspect.signature(loader).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD and name not in NOT_SETTINGS
    }
    for name in settings:
        if name not in known:
            fix = suggest(name, known) if known else "an embedded prior has no settings"
            raise InputError(f"load_prior got {name}=, which means nothing here; {fix}")
