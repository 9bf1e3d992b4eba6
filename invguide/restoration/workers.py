"""A folder of pictures on many workers, each with a prior of its own; the death of a worker costs its picture only."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invguide.blackbox import work
from invguide.blackbox.ledger import Ledger
from invguide.blackbox.pool import evaluate
from invguide.blackbox.work import Reply
from invguide.blackbox.workers import ByValue, Foreign, Pool, Processes, pack
from invguide.errors import InputError, require
from invguide.restoration.folder import Outcome, plan_folder, restore_guarded
from invguide.restoration.precision import fastest_precision
from invguide.restoration.settings import Job, Settings
from invguide.system.progress import progress_bar
from invguide.system.threads import shared_among

_ONE_AT_A_TIME = threading.Lock()  # workers of dask may have several threads


class Restorer:
    """What a worker runs: [picture, folder] as text in an array -> row, printed lines and notes, as JSON in bytes.

    Args:
        settings: Of all pictures; the prior is loaded at the first one.
        arrays: Whether to write arrays too.
        overwrite: Whether to do again what was done with other settings.
        fastest: What precision "auto" stands for, the same on every worker; None: each tries.
        pictures: How many the run has.
    """

    def __init__(
        self,
        settings: Settings,
        arrays: bool,
        overwrite: bool,
        fastest: str | None = None,
        pictures: int = 1,
    ) -> None:
        self.settings, self.arrays, self.overwrite = settings, arrays, overwrite
        self.fastest, self.pictures = fastest, pictures
        self.base = os.getcwd()  # what paths are relative to
        self.job: Job | None = None

    def __call__(self, paths: np.ndarray) -> np.ndarray:
        from tqdm import tqdm

        lines: list[str] = []
        with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            self._go_there()
            if self.job is None:
                # Tqdm's own lock is a semaphore of the machine, left behind where a worker is killed.
                tqdm.set_lock(threading.RLock())
                self.job = Job.prepare(
                    self.settings, print, False, self.arrays, fastest=self.fastest
                )
                self.job.pictures = self.pictures
            self.job.say = lines.append
            path, place = (Path(text) for text in paths.tolist())
            row = restore_guarded(self.job, path, place, self.overwrite)
        said = [(str(note.message), note.filename, note.lineno) for note in notes]
        answer = {"row": dataclasses.asdict(row), "lines": lines, "notes": said}
        return np.frombuffer(json.dumps(answer).encode(), np.uint8)

    def _go_there(self) -> None:
        try:
            os.chdir(self.base)
        except OSError as error:
            raise InputError(
                f"a worker cannot enter {self.base} ({error.strerror}); workers of a scheduler need the files under "
                f"the same paths as here"
            ) from error


def restore_on_workers(
    job: Job,
    folder: Path,
    out: Path,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
) -> list[Outcome]:
    """Restore every picture of a folder as `restore_folder` does, on local processes or dask.

    Results are those of one process to rounding: sums over another number of threads are added in another order.
    A picture whose worker died is tried once more, alone. Interrupted runs go on where they stopped.

    Args:
        job: The checked settings.
        folder, out: Where pictures are, and where results go.
        workers: Local processes. Where there are several GPUs, they are dealt out; the processors are shared.
        scheduler: Address of a dask scheduler, in place of workers; its workers see this machine's files.
        overwrite: Do again what was done with other settings.

    Raises:
        InputError: workers below 1, or a scheduler that cannot be reached.
        CheckpointError: A picture was finished under other settings, and overwrite is off.
    """
    places = plan_folder(job, folder, out, overwrite)
    fastest = None
    if job.settings.precision == "auto":
        # Machines of a scheduler differ, and results must not: half precision is for those who ask for it.
        fastest = "fp32" if scheduler is not None else fastest_precision(job)
    restorer = Restorer(job.settings, job.arrays, overwrite, fastest, len(places))
    with _open(restorer, workers, scheduler, len(places)) as pool:
        return restore_all(pool, places, job.say, job.progress)


def restore_all(
    pool: Pool, places: dict[Path, Path], say: Callable[[str], None], progress: bool
) -> list[Outcome]:
    """Have the workers restore each picture; lines and notes are printed picture by picture, as they are done."""
    pictures = list(places)
    rows: dict[int, Outcome] = {}
    inputs = [np.array([str(path), str(place)]) for path, place in places.items()]
    with progress_bar(len(pictures), "pictures", progress) as bar:

        def finished(index: int, reply: Reply, attempts: int) -> None:
            bar.clear()  # lines would tear it
            rows[index] = _row(
                pictures[index], reply, f"[{len(rows) + 1} of {len(pictures)}]", say
            )
            bar.update(1)

        evaluate(pool, inputs, finished, Ledger(), retries=1)
    return [rows[index] for index in range(len(pictures))]


def _row(path: Path, reply: Reply, head: str, say: Callable[[str], None]) -> Outcome:
    """Print what a worker said about a picture, and return how it fared."""
    state, value, text, _ = reply
    if state == "bad":  # the settings do not fit the worker, whatever the picture
        raise InputError(text)
    say(head)
    if state == "ok":
        answer = json.loads(value.tobytes())
        for line in answer["lines"]:
            say(line)
        for message, filename, line in answer["notes"]:
            warnings.warn_explicit(message, UserWarning, filename, line)
        return Outcome(**answer["row"])
    if state == "lost worker":
        text = f"its worker died, twice: {text}"
    say(f"{path}: failed: {text}")
    return Outcome(path.name, text)


@contextmanager
def _open(
    restorer: Restorer, workers: int | None, scheduler: str | None, pictures: int
) -> Iterator[Pool]:
    packed = pack(restorer, ["array"], "the restoration")
    if scheduler is None:
        if workers is None or workers < 1:
            raise InputError(f"--workers is {workers}; expected at least 1")
        count = min(workers, pictures)
        pool: Pool = Processes(count, packed, environments(count, restorer.settings.device))
        try:
            yield pool
        finally:
            pool.close()
        return
    with _client(scheduler) as client:
        call = ByValue(partial(work.remote, *packed))
        yield Foreign(client.get_executor(), call, {})


def environments(count: int, device: str) -> list[dict[str, str]]:
    """Variables of local processes: a share of the processors each, and one of the GPUs where there are several."""
    shared = shared_among(count, torch.get_num_threads())
    if device not in ("auto", "cuda") or torch.cuda.device_count() < 2:
        return [shared]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    return [{**shared, "CUDA_VISIBLE_DEVICES": name.strip()} for name in names]


def _client(address: str) -> Any:
    distributed = require("distributed", "--scheduler", "'invguide[cluster]'")
    try:
        return distributed.Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--scheduler {address!r} cannot be reached ({error}); expected the address that `dask scheduler` prints, "
            f"such as tcp://192.168.0.2:8786"
        ) from error
