"""Run checkpoints: whole or refused, free of pickled code, and bound to everything that decides their run."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from invguide.engine.run_identity import FOLLOWED, Identity
from invguide.errors import CheckpointError
from invguide.system.run_file import said, try_to_write, write_whole

FORMAT = 2
MAGIC = b"invguide run checkpoint\n"
DIGEST = 32  # bytes
START_OVER = "delete it to start over, or give another checkpoint path"


def packed(identity: Identity, content: dict[str, Any]) -> bytes:
    """A checkpoint of tensors, numbers, strings, lists and dicts: MAGIC, a digest of the rest, what torch saves."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "identity": asdict(identity), **content}, buffer)
    body = buffer.getvalue()
    return MAGIC + hashlib.sha256(body).digest() + body


def save_checkpoint(
    path: Path, identity: Identity, content: dict[str, Any], *, trial: bool = False
) -> None:
    """Write a checkpoint; a reader sees the old file or the new one.

    Args:
        path: Of the file.
        identity: Of the run.
        content: What is to be kept.
        trial: Only see whether it could be written.

    Raises:
        CheckpointError: It cannot be written: the disk is full, read-only, ...; the last one is still there.
    """
    data = packed(identity, content)
    try:
        (try_to_write if trial else write_whole)(path, data)
    except OSError as error:
        raise said(error, path, "written", len(data)) from error


def saved_identity(path: Path) -> dict[str, str]:
    """Return the settings of the run that a checkpoint belongs to; empty where there is none or it cannot be read."""
    try:
        return _saved(_read(path), path).settings
    except CheckpointError:  # `load_checkpoint` says what is wrong
        return {}


def load_checkpoint(path: Path, identity: Identity, trust: Collection[str] = ()) -> dict[str, Any]:
    """Read a checkpoint of the run with this identity.

    Args:
        path: Of the file.
        identity: Of the run that wants to go on.
        trust: Parts that the user vouches for, of `FOLLOWED`.

    Raises:
        CheckpointError: Damaged file, or a run with other settings (the differing ones are named).
    """
    content = _read(path)
    conflicts = identity.conflicts(_saved(content, path), trust)
    if conflicts:
        names = [text.partition(":")[0] for text in conflicts]
        vouched = ", ".join(repr(name) for name in [*sorted(trust), *names])
        hint = (
            f". Where you know that what differs decides nothing, such as a counter, say so: trust=[{vouched}]"
            if all(name in FOLLOWED for name in names)
            else ""
        )
        raise CheckpointError(
            f"checkpoint {path} belongs to another run ({'; '.join(conflicts)}); use the same settings to resume, or "
            f"another checkpoint path to start over{hint}"
        )
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise said(error, path, "read") from error
    if data.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"checkpoint {path} cannot be read: it was written by an earlier version of invguide, which kept too "
            f"little to tell runs apart, or is no checkpoint of a run; {START_OVER}"
        )
    body = data[len(MAGIC) + DIGEST :]
    digest = data[len(MAGIC) : len(MAGIC) + DIGEST]
    if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
        raise damaged(path, "its digest does not agree with its content")
    try:
        content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        found = content["format"]
    except Exception as error:  # torch raises many kinds
        raise damaged(path, type(error).__name__) from error
    if found != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {found!r}, and this version of invguide reads {FORMAT}: {START_OVER}"
        )
    return content


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} cannot be read ({why}); it is damaged, truncated or not a checkpoint of invguide: "
        f"{START_OVER}"
    )


def _saved(content: dict[str, Any], path: Path) -> Identity:
    try:
        return Identity(**content["identity"])
    except (KeyError, TypeError) as error:
        raise damaged(path, "no identity of a run in it") from error
