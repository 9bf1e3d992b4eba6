"""Files of a run: written whole or not at all, by one run at a time, with errors that say what happened."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from invguide.errors import CheckpointError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_IN_USE: set[tuple[int, str]] = (
    set()
)  # process and path: locks of the system are those of whole processes
_GUARD = threading.Lock()
OWN = re.compile(r"(.+?)(?:\.\d+-[0-9a-f]{12})+\.tmp")
BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def write_whole(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Replace a file in one go: a reader sees the old one or the new one, and nothing is left behind on an error.

    Args:
        path: Of the file.
        content: All of it.
        lasting: Wait until it is on the disk, for a machine that loses its power.

    Raises:
        OSError: It cannot be written.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def try_to_write(path: Path, content: bytes) -> None:
    """Write next to a file what is to replace it, and remove it again; raises as `write_whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    write_whole(_temporary(path), content)
    for left in _temporaries(path):
        left.unlink()


def sweep(path: Path) -> None:
    """Remove what killed runs left of a file that nobody else is writing now."""
    with suppress(OSError):
        for left in _temporaries(path):
            left.unlink()


def sweep_old(folder: Path, seconds: float) -> None:
    """Remove what killed runs left in the folders below one, unless it is younger than this: it may be in use."""
    end = time.time() - seconds
    for left in folder.glob("*/*.tmp"):
        with suppress(OSError):
            if OWN.fullmatch(left.name) and left.stat().st_mtime <= end:
                left.unlink()


def _temporary(path: Path) -> Path:
    """Unique to a thread, a process and a machine."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")


def _temporaries(path: Path) -> list[Path]:
    found = ((p, OWN.fullmatch(p.name)) for p in path.parent.iterdir())
    return [p for p, match in found if match and match[1] == path.name]


def said(
    error: OSError, path: Path, doing: str, size: int | None = None, kind: str = "checkpoint"
) -> CheckpointError:
    """An error of the file system as a sentence: what could not be done, why, and what helps."""
    needed = "" if size is None else f" of {size / 1e6:.1f} MB"
    where = path.parent if doing == "written" else path
    match error.errno:
        case errno.ENOSPC:
            with suppress(OSError):
                needed += f" ({shutil.disk_usage(_existing(where)).free / 1e6:.1f} MB are free)"
            why, fix = "the disk is full", "free some space, or give a path on another disk"
        case errno.EDQUOT | errno.EFBIG:
            why = "your quota is used up" if error.errno == errno.EDQUOT else "it is too large"
            fix = "free some of your space, or give a path elsewhere"
        case errno.EROFS:
            why, fix = "the file system is read-only", "give a path that can be written"
        case errno.EACCES | errno.EPERM:
            why = f"no permission ({where})"
            fix = "change the permissions, or give a path of your own"
        case errno.EISDIR:
            why, fix = "it is a folder", "give the path of a file"
        case errno.ENOTDIR | errno.EEXIST:
            why, fix = "a part of the path is a file", "give a path inside of a folder"
        case errno.ENAMETOOLONG:
            why, fix = "the name is too long", "give a shorter one"
        case _:
            why, fix = error.strerror or str(error), "see to that, or give another path"
    return CheckpointError(f"{kind} {path}{needed} cannot be {doing}: {why}; {fix}")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


# ---- one run at a time


@contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold a path for one run; of killed processes, the system lets go by itself.

    The lock is on a file beside it, `NAME.lock`, which is removed at the end.

    Raises:
        CheckpointError: Another run, of this process or another, holds it.
    """
    key = (os.getpid(), os.path.realpath(path))
    with _GUARD:
        if key in _IN_USE:
            raise _busy(path, "of this process")
        _IN_USE.add(key)
    try:
        lock = path.with_name(f"{path.name}.lock")
        file = _locked(lock, path)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is held: who has opened it meanwhile sees that it is gone
            file.close()
    finally:
        with _GUARD:
            _IN_USE.discard(key)


def _busy(path: Path, who: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is in use by another run {who}; wait until it has ended, or give another checkpoint path"
    )


def _locked(lock: Path, path: Path) -> Any:
    """Return the lock's file, open and locked."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+b")  # noqa: SIM115  closed by who holds it
        except OSError as error:
            raise said(error, path, "written") from error
        try:
            _take(file)
        except OSError as error:
            owner = _owner(file) if error.errno in BUSY else ""
            file.close()
            if error.errno in BUSY:
                raise _busy(path, owner) from error
            raise said(error, path, "locked") from error
        if _same(file, lock):
            break
        file.close()  # the one who had it has removed it
    file.truncate(0)
    file.write(f"of process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


def _take(file: Any) -> None:
    # Locks of whole processes (POSIX), and not of open files: these would live on in children of a killed run.
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(2**20)  # a byte that is not read
        getattr(msvcrt, "locking")(file.fileno(), getattr(msvcrt, "LK_NBLCK"), 1)  # noqa: B009


def _owner(file: Any) -> str:
    try:
        file.seek(0)
        return file.read(200).decode(errors="replace")
    except OSError:
        return ""


def _same(file: Any, lock: Path) -> bool:
    try:
        here, there = os.fstat(file.fileno()), os.stat(lock)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
