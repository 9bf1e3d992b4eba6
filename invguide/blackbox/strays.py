"""Processes that a call has left behind: background children, and those that have begun a session of their own."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "INVGUIDE_CALL"  # children inherit it, however they detach themselves
ROUNDS, PAUSE = 100, 0.01  # a second for what starts others while it is being killed


def mark() -> dict[str, str]:
    """An environment variable for everything that a call starts."""
    return {VARIABLE: secrets.token_hex(16)}


def end_strays(
    marked: dict[str, str], session: int | None = None, folder: Path | None = None
) -> None:
    """Kill every process that carries the mark, belongs to the session, or works in the folder.

    Needs /proc, as Linux has it, or else psutil; without both, only the members of the process group end.
    """
    wanted = f"{VARIABLE}={marked[VARIABLE]}".encode()
    place = None if folder is None else os.path.realpath(folder)
    for _ in range(ROUNDS):
        found = [pid for pid in _processes() if _belongs(pid, wanted, session, place)]
        for pid in found:
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        if not found:
            return
        time.sleep(PAUSE)


def _processes() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        yield from _without_proc()
        return
    yield from (int(name) for name in names if name.isdigit() and int(name) != os.getpid())


def _belongs(pid: int, wanted: bytes, session: int | None, place: str | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, _, _, its_session = file.read().rpartition(b")")[2].split()[:4]
        if state in (b"Z", b"X"):  # dead, and not yet waited for
            return False
        if session is not None and int(its_session) == session:
            return True
        with open(f"/proc/{pid}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                return True
        where = "" if place is None else os.readlink(f"/proc/{pid}/cwd")
    except (OSError, ValueError):  # it has ended, or belongs to somebody else
        return _told_by_psutil(pid, wanted) if not os.path.isdir("/proc/self") else False
    return place is not None and (where == place or where.startswith(place + os.sep))


def _without_proc() -> Iterator[int]:
    with suppress(ImportError):
        import psutil

        yield from (pid for pid in psutil.pids() if pid != os.getpid())


def _told_by_psutil(pid: int, wanted: bytes) -> bool:
    try:
        import psutil

        return psutil.Process(pid).environ().get(VARIABLE) == wanted.decode().partition("=")[2]
    except Exception:  # not installed, gone, or not ours
        return False
