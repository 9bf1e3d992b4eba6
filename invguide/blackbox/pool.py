"""The little driver of calls: bounded in flight, collected as they arrive, repeated, isolated, timed out."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from invguide.blackbox.ledger import Ledger
from invguide.blackbox.work import Reply
from invguide.blackbox.workers import Pool

POLL = 0.05  # seconds, while a worker starts


@dataclass(eq=False)
class _Job:
    index: int
    x: np.ndarray
    attempts: int = 0
    suspect: bool = False  # was lost together with others: runs alone next time
    deadline: float | None = None


def evaluate(
    pool: Pool,
    inputs: Sequence[np.ndarray],
    finished: Callable[[int, Reply, int], None],
    ledger: Ledger,
    *,
    retries: int = 0,
    timeout: float | None = None,
) -> None:
    """Call once for each input, in any order; `finished(index, reply, attempts)` gets each last reply as it arrives.

    A call that failed, timed out or was lost with its worker is repeated up to `retries` times. Where workers share a
    pool, nobody knows of whose call one died: all that were lost together are called again one by one, and only who
    is lost once more is charged. An exception (Ctrl-C, or one that `finished` raises) stops all calls.
    """
    run = _Run(pool, inputs, finished, ledger, retries, timeout)
    try:
        while run.unfinished:
            run.fill()
            run.collect()
    except BaseException:
        for future in list(run.running):
            pool.give_up(future)
        raise


class _Run:
    def __init__(
        self,
        pool: Pool,
        inputs: Sequence[np.ndarray],
        finished: Callable[[int, Reply, int], None],
        ledger: Ledger,
        retries: int,
        timeout: float | None,
    ) -> None:
        self.pool, self.finished, self.ledger = pool, finished, ledger
        self.retries, self.timeout = retries, timeout
        self.waiting = deque(_Job(i, x) for i, x in enumerate(inputs))
        self.suspects: deque[_Job] = deque()
        self.alone = False  # what runs is a suspect
        self.running: dict[Future[Reply], _Job] = {}
        self.arrived: queue.SimpleQueue[Future[Reply]] = queue.SimpleQueue()
        # Without a clock, a few more than there are workers keep those of a remote pool from idling.
        self.room = pool.capacity * (2 if pool.shared and timeout is None else 1)

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.suspects or self.running)

    def fill(self) -> None:
        while (job := self._next()) is not None:
            job.attempts += 1
            job.deadline = None
            try:
                future = self.pool.submit(job.x)
            except Exception:
                while not self.arrived.empty():
                    self.collect()  # what has finished is kept
                raise
            self.running[future] = job
            future.add_done_callback(self.arrived.put)

    def _next(self) -> _Job | None:
        if self.running and (self.suspects or self.alone):
            return None
        self.alone = bool(self.suspects)
        if self.suspects:
            return self.suspects.popleft()
        return self.waiting.popleft() if self.waiting and len(self.running) < self.room else None

    def collect(self) -> None:
        try:
            future = self.arrived.get(timeout=self._patience())
        except queue.Empty:
            self._expire()
            return
        job = self.running.pop(future, None)
        if job is None:
            return  # it was given up, and came after all
        if future.cancelled():
            self._lost(job, "cancelled by the executor")
        elif (error := future.exception()) is not None:  # the function's own errors are replies
            self._lost(job, _brief(error))
        elif future.result()[0] == "unready":
            job.attempts -= 1
            self.waiting.appendleft(job)
        else:
            self._settle(job, future.result())

    def _patience(self) -> float | None:
        """Seconds until somebody's time is over; None without a clock."""
        if self.timeout is None:
            return None
        now = time.monotonic()
        for future, job in self.running.items():
            if job.deadline is None and self.pool.ready(future):
                job.deadline = now + self.timeout
        left = [
            POLL if job.deadline is None else job.deadline - now for job in self.running.values()
        ]
        return max(0.0, min(left))

    def _expire(self) -> None:
        assert self.timeout is not None
        now = time.monotonic()
        late = [
            f
            for f, job in self.running.items()
            if job.deadline is not None and job.deadline <= now
        ]
        for future in late:
            if future.done():
                continue  # just in time: it is in the queue
            job = self.running.pop(future)
            self.pool.give_up(future)
            self.room = self.pool.capacity  # less, where the worker cannot be stopped
            reply = ("timed out", None, f"no answer after {self.timeout:g} s", self.timeout)
            self._settle(
                job, reply, final=self.pool.shared
            )  # to call again could hang another worker

    def _lost(self, job: _Job, text: str) -> None:
        if self.pool.shared and not job.suspect and self.pool.capacity > 1:
            job.suspect = True
            self.suspects.append(job)
            self.ledger.resubmitted += 1
        else:
            job.suspect = False
            self._settle(job, ("lost worker", None, text, 0.0))

    def _settle(self, job: _Job, reply: Reply, final: bool = False) -> None:
        self.ledger.busy_seconds += reply[3]
        if job.suspect:  # innocent: the first loss was another's
            job.suspect, job.attempts = False, job.attempts - 1
        final |= reply[0] in ("ok", "bad") or job.attempts > self.retries
        if not final:
            self.ledger.retries += 1
            self.waiting.append(job)
        else:
            self.finished(job.index, reply, job.attempts)


def _brief(error: BaseException) -> str:
    """The line with the exit codes where there is one, else the first."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {next((x for x in lines if 'exit code' in x), lines[0])}"
