"""Weights of a model of diffusers: one file, or several and an index of which weight lies in which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from invguide.errors import CheckpointError
from invguide.priors.checkpoints.file import read_weights

# Names of files of weights by their suffix, in the order in which they are looked for: tensors before pickles.
STEMS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TEXT_STEMS = {"safetensors": "model", "bin": "pytorch_model"}  # of transformers


def weights_in(place: Path, stems: Mapping[str, str] = STEMS) -> Path:
    """Return the file of weights that lies beside config.json, or the index of several; whole before half precision."""
    for suffix, stem in stems.items():
        whole, half = f"{stem}.{suffix}", f"{stem}.fp16.{suffix}"
        for name in (f"{whole}.index.json", whole, f"{whole}.index.fp16.json", half):
            if (place / name).is_file():
                return place / name
    raise CheckpointError(
        f"{place} has no weights; expected {stems['safetensors']}.safetensors beside config.json"
    )


def files_of(weights: Path) -> tuple[Path, ...]:
    """Return the files that hold the tensors of what `weights_in` has found, whether they are there or not."""
    if weights.suffix != ".json":
        return (weights,)
    return tuple(weights.parent / name for name in sorted(set(_index(weights).values())))


def read_all(weights: Path) -> dict[str, Tensor]:
    """Read what `weights_in` has found; every tensor of an index, and none beside it.

    Raises:
        CheckpointError: A file is missing or damaged, or holds other tensors than the index says.
    """
    if weights.suffix != ".json":
        return read_weights(weights)
    where, files = _index(weights), files_of(weights)
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{weights.name} names {len(files)} files, and {len(missing)} of them (such as {missing[0]}) are not in "
            f"{weights.parent}: download or save the folder again"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_weights(file)
        wrong = found.keys() ^ {name for name, place in where.items() if place == file.name}
        if wrong:
            raise CheckpointError(
                f"{file} does not hold what {weights.name} says ({len(wrong)} names differ, such as {min(wrong)}); "
                "download or save the folder again"
            )
        tensors |= found
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); download or save the folder again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings; download or save the folder again")
    return content


def _index(path: Path) -> dict[str, str]:
    """Return the name of the file of each weight; only files that lie beside the index may be named."""
    where = read_json(path).get("weight_map")
    plain = isinstance(where, dict) and all(
        isinstance(name, str) and name == Path(name).name for name in where.values()
    )
    if not where or not plain:
        raise CheckpointError(
            f"{path} is no index of weights; expected weight_map, the name of a file beside it for each weight: "
            "download or save the folder again"
        )
    return where
