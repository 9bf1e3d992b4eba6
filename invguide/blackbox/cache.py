"""Finished results on disk, found again by what went in: the function and the bytes of its input."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from invguide.errors import InputError
from invguide.system.run_file import said, sweep_old, write_whole

OLD = 3600.0  # seconds after which what is half written belongs to nobody
CHECK = 16  # bytes of checksum behind the array


class Cache:
    """One .npy file per result. A reader sees no file or a whole one; a damaged one counts as none.

    Any number of processes may share a folder.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder, self.identity = Path(folder), identity
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache={str(folder)!r} cannot be made a folder: {error}") from error
        sweep_old(self.folder, OLD)

    def key(self, x: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=20)
        digest.update(f"{self.identity} {x.dtype.str} {x.shape} ".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"

    def get(self, key: str) -> np.ndarray | None:
        try:
            content = self.path(key).read_bytes()
            body, check = content[:-CHECK], content[-CHECK:]
            if _checksum(body) != check:
                return None
            return np.load(io.BytesIO(body), allow_pickle=False)
        except (OSError, ValueError):
            return None

    def put(self, key: str, value: np.ndarray) -> None:
        path = self.path(key)
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        content = buffer.getvalue() + _checksum(buffer.getvalue())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content, lasting=False)  # it has a checksum
        except OSError as error:
            raise said(error, path, "written", len(content), "the result of a call") from error


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECK).digest()
