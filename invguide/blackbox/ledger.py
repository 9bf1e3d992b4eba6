"""What became of the calls: one record per member of the last batch, and totals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FAILURES = ("failed", "non-finite", "timed out", "lost worker")
WINDOW = 20  # the fewest calls of which a fraction of failures is taken, where there are so many


class Member(NamedTuple):
    """What became of one sample."""

    state: str  # "ok", one of FAILURES, or "stopped" where the batch was given up before
    detail: str = ""  # exception, or exit code and the end of stderr
    attempts: int = 1
    seconds: float = 0.0  # of the last attempt
    cached: bool = False

    @property
    def failed(self) -> bool:
        return self.state in FAILURES


@dataclass
class Ledger:
    """Totals over all batches.

    Attributes:
        calls: Samples for which the function was called; repetitions do not count.
        cached: Samples whose result was taken from the cache.
        states: Final states of both -> how many.
        retries: Calls repeated after a failure of their own.
        resubmitted: Calls repeated because they were lost together with another call's worker.
        busy_seconds: Inside the function, summed over workers.
        wall_seconds: Waiting for batches.
        offered_seconds: wall_seconds times workers.
        recent: Whether each of the last calls failed.
    """

    calls: int = 0
    cached: int = 0
    states: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    resubmitted: int = 0
    busy_seconds: float = 0.0
    wall_seconds: float = 0.0
    offered_seconds: float = 0.0
    recent: list[bool] = field(default_factory=list)

    @contextmanager
    def clock(self, workers: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.wall_seconds += spent
            self.offered_seconds += workers * spent

    def add(self, members: Sequence[Member]) -> None:
        done = [m for m in members if m.state != "stopped"]
        self.cached += sum(m.cached for m in done)
        self.calls += sum(not m.cached for m in done)
        self.states.update(m.state for m in done)
        window = max(len(members), WINDOW)
        self.recent = [*self.recent, *(m.failed for m in done)][-window:]

    @property
    def utilisation(self) -> float:
        """Share of the workers' time that was spent inside the function."""
        return self.busy_seconds / self.offered_seconds if self.offered_seconds else 0.0

    @property
    def failures(self) -> int:
        return sum(self.states[state] for state in FAILURES)

    def summary(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "calls": self.calls,
            "cached": self.cached,
            **{
                state.replace(" ", "_").replace("-", "_"): self.states[state]
                for state in ("ok", *FAILURES)
            },
            "retries": self.retries,
            "resubmitted": self.resubmitted,
            "busy_seconds": round(self.busy_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "utilisation": round(self.utilisation, 3),
        }

    def __str__(self) -> str:
        cached = f" ({self.cached} more cached)" if self.cached else ""
        return f"{self.calls} calls{cached}, {self.failures} failed"
