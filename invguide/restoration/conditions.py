"""What --condition and --prompt tell a prior: a class, a file of one array, or words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.priors.text.embed import NAMES, embed_text
from invguide.restoration.tasks import read_array

NUMBER = re.compile(r"-?\d+")


def condition_files(told: Mapping[str, str]) -> dict[str, Path]:
    """Return the files among the values."""
    return {name: Path(text) for name, text in told.items() if not NUMBER.fullmatch(text)}


def read_conditions(told: Mapping[str, str]) -> dict[str, Tensor]:
    """Return one row of each condition, (1, ...).

    Args:
        told: By name, a whole number, or the path of a .npy file.

    Raises:
        InputError: A value is neither, or the file cannot be read.
        ShapeError: An array has not one row.
    """
    files = condition_files(told)
    numbers = {name: torch.tensor([int(v)]) for name, v in told.items() if name not in files}
    return numbers | {name: _read(name, path) for name, path in files.items()}


def all_conditions(told: Mapping[str, str], prompt: str | None, prior: str) -> dict[str, Tensor]:
    """Return one row of each condition, those of a prompt among them.

    Args:
        told: As for `read_conditions`.
        prompt: For the text encoders of the prior.
        prior: Its folder or hub id.

    Raises:
        InputError: As `read_conditions` and `embed_text` do; or the prompt and a condition tell the same.
    """
    rows = read_conditions(told)
    if prompt is None:
        return rows
    if both := NAMES & told.keys():
        raise InputError(
            f"--prompt embeds the text, and --condition {min(both)}={told[min(both)]} tells it too; give one"
        )
    return rows | embed_text(prior, prompt)


def _read(name: str, path: Path) -> Tensor:
    if path.suffix != ".npy":
        raise InputError(
            f"the condition {name} is {str(path)!r}; expected a whole number, such as a class, or a .npy file"
        )
    array = read_array(path, "the condition")
    if array.dtype.kind not in "iuf":
        raise InputError(f"the condition {path} holds {array.dtype}; expected numbers")
    if array.ndim == 0 or len(array) != 1:
        raise ShapeError(
            f"the condition {path} has the shape {array.shape}; expected one row, (1, ...): array[None] adds the axis"
        )
    return torch.from_numpy(array)
