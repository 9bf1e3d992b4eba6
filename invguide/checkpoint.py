"""Run checkpoints: atomic, free of pickled code, and bound to the settings of their run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from invguide.errors import CheckpointError


def save_checkpoint(path: Path, identity: dict[str, str], content: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": 1, "identity": identity, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def saved_identity(path: Path) -> dict[str, str]:
    """Return the identity of the run that a checkpoint belongs to; empty where there is none or it cannot be read."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True)["identity"])
    except (
        Exception
    ):  # torch raises many kinds for a damaged file; `load_checkpoint` says what is wrong
        return {}


def load_checkpoint(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    """Read a checkpoint of the run with this identity.

    Raises:
        CheckpointError: Damaged file, or a run with other settings (the differing ones are named).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content["identity"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); it is truncated or not a checkpoint of "
            f"invguide: delete it to start over"
        ) from error
    different = [k for k in {**saved, **identity} if saved.get(k) != identity.get(k)]
    if different:
        parts = ", ".join(
            f"{k}: {saved.get(k)} there, {identity.get(k)} here" for k in sorted(different)
        )
        raise CheckpointError(
            f"checkpoint {path} belongs to another run ({parts}); use the same settings to resume, or another "
            f"checkpoint path to start over"
        )
    return content
