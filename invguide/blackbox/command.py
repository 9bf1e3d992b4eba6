"""Any program as a function: one working folder per call, no shell, nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np

from invguide.arguments.checks import Checked
from invguide.blackbox.strays import end_strays, mark
from invguide.blackbox.work import numbers
from invguide.errors import InputError, suggest

FORMATS = ("npy", "npz", "json", "txt")
TAIL = 2000  # characters of stderr that are kept
POLL = 0.25  # seconds until a call notices that all are stopped
LARGE = 2**26  # bytes of a file that is named by size and time, not by content


class CommandFailed(RuntimeError):
    """Exit code, or an output that cannot be read, with the end of stderr."""


@dataclass(frozen=True, repr=False)
class Command(metaclass=Checked):
    """A program that reads one sample from a file and writes its answer to another.

    Started without a shell, in a working folder of its own, which is removed whatever happens. Everything that it has
    started ends with it, also what runs in the background or in a session of its own; all of it is killed when its time
    is over or the run is stopped. Its standard output is discarded. The output must be a file, not a pipe.

    Args:
        template: Its words, quoted as for a shell, with {input} and {output} where the two file names belong. Words
            that name an existing file relative to the present folder are made absolute.
        format: Of the output: "npy", "npz" (one array, or the one named y), "json" (nested lists) or "txt" (rows).
        input_format: Of the input, the same by default; in an npz file it is named x, and txt holds at most two axes.
        env: Environment variables to set in addition.
        keep_failed: Leave the working folder of a failed call, and name it.

    Raises:
        InputError: No placeholder, or an unknown format.

    Example:
        >>> Command("simulate --in {input} --out {output}", format="npy")
        Command('simulate --in {input} --out {output}', format='npy')
    """

    template: str
    format: str = "npy"
    _: KW_ONLY
    input_format: str | None = None
    env: Mapping[str, str] | None = None
    keep_failed: bool = False
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.template)
        except ValueError as error:
            raise InputError(f"command {self.template!r} cannot be split: {error}") from error
        for name in ("{input}", "{output}"):
            if not any(name in word for word in words):
                raise InputError(
                    f"command {self.template!r} has no {name}; write {{input}} and {{output}} where the names of the "
                    f"two files belong, as in 'simulate --in {{input}} --out {{output}}'"
                )
        for name in (self.format, self.input_format or self.format):
            if name not in FORMATS:
                raise InputError(
                    f"unknown format {name!r} of a command; {suggest(str(name), FORMATS)}"
                )
        is_path = [i > 0 or os.sep in word for i, word in enumerate(words)]
        found = (
            os.path.abspath(word) if path and os.path.isfile(word) else word
            for word, path in zip(words, is_path, strict=True)
        )
        object.__setattr__(self, "words", tuple(found))

    def __repr__(self) -> str:
        read = f", input_format={self.input_format!r}" if self.input_format else ""
        env = f", env={sorted(self.env)}" if self.env else ""
        return f"Command({self.template!r}, format={self.format!r}{read}{env})"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **(self.env or {})}

    def identity_parts(self) -> Any:
        """Words, formats, variables, and the files among the words: an edited script is another command."""
        program = shutil.which(self.words[0], path=self.environment.get("PATH"))
        files = [
            _fingerprint(Path(w)) for w in (program, *self.words[1:]) if w and os.path.isfile(w)
        ]
        formats = (self.format, self.input_format or self.format)
        return self.words, formats, sorted((self.env or {}).items()), files

    def check(self) -> None:
        """Raise InputError unless the program can be started here."""
        if shutil.which(self.words[0], path=self.environment.get("PATH")) is None:
            raise self._missing("no such program, or not executable")

    def _missing(self, why: str) -> InputError:
        return InputError(
            f"the command {self.words[0]!r} cannot be started: {why}; expected a program on PATH, or the path of an "
            f"executable file (chmod +x)"
        )

    def line(self, source: Path, target: Path) -> list[str]:
        return [
            w.replace("{input}", str(source)).replace("{output}", str(target)) for w in self.words
        ]

    def __call__(
        self, x: np.ndarray, *, timeout: float | None = None, stopped: Event | None = None
    ) -> np.ndarray:
        """Run the program on one sample.

        Args:
            x: The sample.
            timeout: Seconds.
            stopped: The call ends soon after this is set.

        Raises:
            CommandFailed: Exit code other than zero, or no readable output.
            TimeoutError: It took longer than timeout.
            InputError: It cannot be started.
        """
        folder = Path(tempfile.mkdtemp(prefix="invguide-"))
        keep = False
        try:
            return self._run(x, folder, timeout, stopped)
        except (CommandFailed, TimeoutError) as error:
            keep = self.keep_failed
            if keep:
                error.args = (f"{error}; its folder is kept: {folder}",)
            raise
        finally:
            if not keep:
                _remove(folder)

    def _run(
        self, x: np.ndarray, folder: Path, timeout: float | None, stopped: Event | None
    ) -> np.ndarray:
        source = folder / f"input.{self.input_format or self.format}"
        target = folder / f"output.{self.format}"
        write(source, x)
        marked = mark()
        with open(
            folder / "stderr.txt", "w+b"
        ) as stderr:  # read by this handle: the name may become a pipe
            try:
                process = subprocess.Popen(
                    self.line(source, target),
                    cwd=folder,
                    env={**self.environment, **marked},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,  # a group of its own, to be killed as one
                )
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
                    raise self._missing(str(error.strerror)) from error
                raise
            try:
                code = _wait(process, timeout, stopped)
            finally:
                end_strays(marked, process.pid, folder)
            ended = _tail(stderr)
        if code:
            raise CommandFailed(f"{_exit(code)}{ended}")
        try:
            return read(target)
        except FileNotFoundError:
            raise CommandFailed(f"exit code 0, but it wrote no {target.name}{ended}") from None
        except Exception as error:  # a file of unknown content
            text = f"{type(error).__name__}: {error}"[:TAIL]
            raise CommandFailed(
                f"its output is no {self.format} file of numbers ({text}){ended}"
            ) from error


# ---- processes


def _wait(process: subprocess.Popen[bytes], timeout: float | None, stopped: Event | None) -> int:
    """Wait for the end, or kill the whole group."""
    end = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            slice_ = left if stopped is None else min(POLL, POLL if left is None else left)
            try:
                return process.wait(slice_)
            except subprocess.TimeoutExpired:
                if stopped is not None and stopped.is_set():
                    raise CommandFailed("stopped with the run") from None
                if left is not None and left <= POLL and time.monotonic() >= (end or 0):
                    raise TimeoutError(f"no answer after {timeout:g} s") from None
    except BaseException:
        _kill(process)
        raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()
    process.wait()


def _remove(folder: Path) -> None:
    """Remove a working folder, though killed processes may still be writing their last."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _exit(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    try:
        return f"ended by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def _tail(log: IO[bytes]) -> str:
    """What stderr ends with."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
    text = log.read(TAIL).decode(errors="replace").strip()
    return f"; stderr ends: {text}" if text else ""


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    if size > LARGE:
        return f"{size} {path.stat().st_mtime_ns}"
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


# ---- files


def write(path: Path, x: np.ndarray) -> None:
    """Write one sample in the format that the name ends in; numbers keep all their digits."""
    match path.suffix:
        case ".npy":
            np.save(path, x, allow_pickle=False)
        case ".npz":
            np.savez(path, x=x)
        case ".json":
            path.write_text(json.dumps(x.tolist()))
        case _:
            if x.ndim > 2:
                raise InputError(
                    f"a txt file holds at most 2 axes and the sample has shape {x.shape}; use input_format='npy'"
                )
            np.savetxt(path, np.atleast_1d(x), fmt="%.17g")


def _opened(path: Path) -> IO[bytes]:
    """Open a file that a program has left; to read a pipe would never end."""
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is a pipe, a device or a folder; expected a file")
    return os.fdopen(descriptor, "rb")


def read(path: Path) -> np.ndarray:
    """Read an array of numbers in the format that the name ends in; never unpickles."""
    with _opened(path) as file:
        array = _array(file, path.suffix)
    found, trouble = numbers(array)
    if found is None:
        raise ValueError(trouble.split(";")[0])
    return found


def _array(file: IO[bytes], suffix: str) -> Any:
    match suffix:
        case ".npy":
            return np.lib.format.read_array(file, allow_pickle=False)
        case ".npz":
            with np.load(file, allow_pickle=False) as archive:
                names = list(getattr(archive, "files", ()))
                if "y" not in names and len(names) != 1:
                    raise ValueError(f"it holds {names}; expected one array, or one named y")
                return archive["y" if "y" in names else names[0]]
        case ".json":
            return json.load(file)
        case _:
            lines = [line for line in file.read().decode().splitlines() if line.strip()]
            return np.loadtxt(lines) if lines else np.empty(0)
