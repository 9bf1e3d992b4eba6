"""How many cores this process has, and threads that wait for each other without burning them.

Threads of OpenMP spin while they wait for the slowest of them. Where something else runs on a core, that is not a few
microseconds but a slice of the scheduler, at every layer of a network: on two cores beside other work, one call of a
denoiser may take tens of times as long. A passive policy costs nothing and takes this away, but it is read once, when
torch is loaded. Hence nothing here imports torch at the top.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

# GNU's and Intel's runtime each have a switch of their own beside the one of the standard.
POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ADVICE = "export OMP_WAIT_POLICY=PASSIVE"
SLOWER = 3.0  # times one thread: beyond what a small operation on several loses by itself
TRIAL_SECONDS = 0.1

_warned = False


def be_passive(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the wait policy, and the threads where a quota or an affinity leaves fewer cores than the machine has.

    What the user has set stays as it is; a policy by any of its names is a policy. To be called before torch is
    imported; processes that are started later inherit it.
    """
    if not any(name in environment for name in POLICY):
        environment.update(POLICY)
    cores = available_cores()
    if cores < (os.cpu_count() or 1) and "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(cores)


def available_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may keep busy: those of its affinity, at most its cgroup's quota; >= 1.

    Args:
        root: Of the file system, where `proc` and `sys` are.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    return max(1, math.floor(min(cores, _quota(root)) + 1e-6))


def _quota(root: Path) -> float:
    """Cores' worth of time that the control groups of this process allow, of version 1 or 2; infinity: no limit."""
    quota = math.inf
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if not controllers else "cpu")
        # In a container the path is that of the host, and what there is lies at the top.
        here = mount / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(mount):
                limit, period = _limit(folder)
                quota = min(quota, limit / period) if limit > 0 and period > 0 else quota
    return quota


def _limit(folder: Path) -> tuple[float, float]:
    """Microseconds of CPU in every period of so many; (0, 0) where there is no limit."""
    words = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us").strip(),
        _text(folder / "cpu.cfs_period_us").strip(),
    ]
    try:
        return float(words[0]), float(words[1])
    except (ValueError, IndexError):  # "max", or no such file
        return 0.0, 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def shared_among(processes: int, threads: int | None = None) -> dict[str, str]:
    """Return variables for each of several processes: a share of the cores, and passive waiting.

    Args:
        processes: How many will work at the same time.
        threads: What they share; by default the cores, or OMP_NUM_THREADS for each where that is less.
    """
    share = (available_cores() if threads is None else threads) // max(1, processes)
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if threads is None and asked.isdigit() and int(asked):
        share = min(share, int(asked))
    share = max(1, share)
    policy = {} if any(name in os.environ for name in POLICY) else POLICY
    return {**dict.fromkeys(THREADS, str(share)), **policy}


# ---- where torch was loaded before anybody could set a policy


def warn_if_spinning(trial: Callable[[], tuple[float, float]] | None = None) -> None:
    """Warn, once in a process, where threads of torch wait for each other at the cost of most of their time.

    Only where there are several, and no policy is set; then a trial of a tenth of a second at most tells.

    Args:
        trial: Returns seconds of a small operation with all threads and with one; by default measured.
    """
    global _warned
    if _warned or any(name in os.environ for name in POLICY):
        return
    _warned = True  # tried once, whatever comes out
    import torch

    if trial is None and (torch.get_num_threads() < 2 or not torch.backends.openmp.is_available()):
        return
    several, one = (trial or _trial)()
    if several > SLOWER * one:
        warnings.warn(
            f"other work runs on these cores, and {torch.get_num_threads()} threads wait for each other: a small "
            f"operation takes {several / one:.0f} times as long as on one thread. Set `{ADVICE}` before Python starts "
            f"(or os.environ before torch is imported), or call torch.set_num_threads(1)"
        )


def _trial() -> tuple[float, float]:
    """Seconds of an operation of about 0.1 ms with all threads and with one, the means of several."""
    import torch

    x: Any = torch.ones(2**18)
    threads = torch.get_num_threads()

    def mean() -> float:
        torch.sin(x)
        start, calls = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < TRIAL_SECONDS / 2 and calls < 20:
            torch.sin(x)
            calls += 1
        return spent / max(1, calls)

    several = mean()
    torch.set_num_threads(1)
    try:
        one = mean()
    finally:
        torch.set_num_threads(threads)
    return several, one
