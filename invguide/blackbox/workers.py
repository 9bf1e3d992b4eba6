"""Where calls run: in this process, in local processes (loky), in threads, or wherever somebody's executor runs them.

All four have the same face, which `pool.evaluate` drives:

    capacity: calls at a time.    shared: whether the death of a worker can take other calls with it.
    submit(x) -> Future of a `work.Reply`.      ready(future): whether the clock of the call runs yet.
    give_up(future): end the call, or stop waiting for it.      close().
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from invguide.blackbox import work
from invguide.blackbox.strays import end_strays, mark
from invguide.errors import BlackBoxError, InputError

POLL = 0.01  # seconds, while threads end
UNKNOWN_CAPACITY = 64


class Pool(Protocol):
    shared: bool

    @property
    def capacity(self) -> int: ...

    def submit(self, x: np.ndarray) -> Future[work.Reply]: ...
    def ready(self, future: Future[work.Reply]) -> bool: ...
    def give_up(self, future: Future[work.Reply]) -> None: ...
    def close(self) -> None: ...


class Packed(NamedTuple):
    """A function and what it takes, pickled."""

    digest: str
    blob: bytes


def pack(function: Callable[[Any], Any], kind: list[str], name: str) -> Packed:
    """Pickle a function for workers.

    Raises:
        InputError: It cannot be pickled.
    """
    try:
        blob = by_value((function, kind))
    except Exception as error:  # picklers raise whatever the object raises
        raise InputError(
            f"{name} cannot be sent to workers ({type(error).__name__}: {error}); define it at module level without "
            f"open files, locks or connections (open them inside), or use workers=None, which calls it in this "
            f"process; vectorised=True then lets it compute many samples at once"
        ) from error
    return Packed(hashlib.blake2b(blob, digest_size=16).hexdigest(), blob)


def by_value(thing: Any) -> bytes:
    """cloudpickle, with the functions of `work` by value: they load without importing invguide."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(work)
    return cloudpickle.dumps(thing)


class ByValue:
    """A callable that every pickler sends by value."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.blob = call, by_value(call)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.blob,)


class Here:
    """One call after the other, in this process."""

    capacity, shared = 1, False

    def __init__(self, call: Callable[[np.ndarray], work.Reply]) -> None:
        self.call = call

    def submit(self, x: np.ndarray) -> Future[work.Reply]:
        future: Future[work.Reply] = Future()
        with torch.inference_mode(False), torch.enable_grad():  # as in a worker
            future.set_result(self.call(x))
        return future

    def ready(self, future: Future[work.Reply]) -> bool:
        return True

    def give_up(self, future: Future[work.Reply]) -> None:
        pass

    def close(self) -> None:
        pass


class Threads(Here):
    """Threads of this process, for commands: each call is a process of its own, and times itself out.

    One thread too: Ctrl-C comes to the main thread, and so never between the start of a process and its registration.
    """

    def __init__(self, count: int, command: Callable[..., Any]) -> None:
        self.capacity = count
        self.name = f"invguide-{id(self)}"
        self.executor = ThreadPoolExecutor(count, thread_name_prefix=self.name)
        self.stopped = threading.Event()
        super().__init__(partial(work.run, partial(command, stopped=self.stopped), ["array"]))

    def submit(self, x: np.ndarray) -> Future[work.Reply]:
        return self.executor.submit(self.call, x)

    def close(self) -> None:
        self.stopped.set()
        self.executor.shutdown(wait=True, cancel_futures=True)
        # An interrupt between the start of a thread and its registration leaves one that the executor does not know.
        while any(thread.name.startswith(f"{self.name}_") for thread in threading.enumerate()):
            time.sleep(POLL)


class _Worker(NamedTuple):
    executor: Any
    ready: Future[Any]
    environment: dict[str, str]
    marked: dict[str, str]  # of what its calls start

    def end(self) -> None:
        self.executor.shutdown(wait=True, kill_workers=True)
        end_strays(self.marked)


class Processes:
    """Local processes, each one a loky pool of its own.

    So it is known whose call a worker died of, it takes no other call with it, and a hung one can be killed alone.

    Args:
        count: How many.
        packed: What they run.
        environments: Variables set in a process from its start, such as its GPU; of several, each new process gets
            those that the fewest living ones have.
    """

    shared = False

    def __init__(
        self, count: int, packed: Packed, environments: Sequence[dict[str, str]] = ({},)
    ) -> None:
        self.capacity, self.environments = count, environments
        self.prepare = ByValue(partial(work.prepare, *packed, os.getpid()))
        self.entry = ByValue(
            partial(work.remote, packed.digest, b"")
        )  # the function came with `prepare`
        self.torch = ByValue(work.load_torch)
        self.idle: list[_Worker] = []
        self.busy: dict[Future[work.Reply], _Worker] = {}

    def submit(self, x: np.ndarray) -> Future[work.Reply]:
        while True:
            worker = self.idle.pop() if self.idle else self._start()
            try:
                future = worker.executor.submit(self.entry, x)
            except BrokenExecutor:  # it died while idle
                continue
            self.busy[future] = worker
            future.add_done_callback(self._release)
            return future

    def _start(self) -> _Worker:
        from loky.process_executor import ProcessPoolExecutor

        living = [worker.environment for worker in (*self.idle, *self.busy.values())]
        environment = min(self.environments, key=living.count)
        marked = mark()
        executor = ProcessPoolExecutor(1, initializer=self.prepare, env={**environment, **marked})
        return _Worker(executor, executor.submit(self.entry, None), environment, marked)

    def _release(self, future: Future[work.Reply]) -> None:
        worker = self.busy.pop(future, None)
        if worker is None:
            return  # given up
        if future.exception() is not None:  # dead; what it has started may live
            end_strays(worker.marked)
            return
        if future.result()[0] == "unready":
            worker = worker._replace(ready=worker.executor.submit(self.torch))
        self.idle.append(worker)

    def ready(self, future: Future[work.Reply]) -> bool:
        """A process takes a while to start and to load the function: that is not the call's time."""
        worker = self.busy.get(future)
        return worker is None or worker.ready.done()

    def give_up(self, future: Future[work.Reply]) -> None:
        worker = self.busy.pop(future, None)
        if worker is not None:
            worker.end()

    def close(self) -> None:
        for future in list(self.busy):
            self.give_up(future)
        while self.idle:
            self.idle.pop().end()


def is_threads(executor: Any) -> bool:
    """Whether calls stay in this process, so that nothing is pickled."""
    return isinstance(executor, ThreadPoolExecutor)


class Foreign:
    """Somebody's executor: anything with submit(function, *arguments) -> concurrent.futures.Future."""

    shared = True

    def __init__(
        self, executor: Any, call: Callable[[np.ndarray], work.Reply], options: dict[str, Any]
    ) -> None:
        self.executor, self.call, self.options = executor, call, options
        if hasattr(executor, "_client"):  # dask would take a repeated call for the first one
            self.options = {"pure": False, **options}
        self.hung: list[Future[work.Reply]] = []

    @property
    def capacity(self) -> int:
        self.hung = [future for future in self.hung if not future.done()]
        total = workers_of(self.executor) or UNKNOWN_CAPACITY
        if len(self.hung) >= total:
            raise BlackBoxError(
                f"all {total} workers of the executor hang in calls that timed out and cannot be stopped from here; "
                f"restart it, or use workers={total}, whose processes are killed and replaced"
            )
        return total - len(self.hung)

    def submit(self, x: np.ndarray) -> Future[work.Reply]:
        try:
            future = self.executor.submit(self.call, x, **self.options)
        except (BrokenExecutor, RuntimeError) as error:
            raise BlackBoxError(
                f"the executor takes no more calls ({type(error).__name__}: {error}); its pool is broken or shut "
                f"down: make a new one, or use workers=N, which replaces dead workers"
            ) from error
        if not all(hasattr(future, name) for name in ("add_done_callback", "exception", "cancel")):
            raise InputError(
                f"submit of the executor returned {type(future).__name__}; expected a concurrent.futures.Future"
            )
        return future

    def ready(self, future: Future[work.Reply]) -> bool:
        return True

    def give_up(self, future: Future[work.Reply]) -> None:
        if not future.cancel():
            self.hung.append(future)

    def close(self) -> None:
        pass  # it is not ours


def workers_of(executor: Any) -> int | None:
    """How many calls an executor runs at a time, where it tells."""
    client = getattr(executor, "_client", None)
    if client is not None:  # dask
        return max(1, sum(client.nthreads().values()))
    for name in (
        "num_workers",
        "_max_workers",
    ):  # mpi4py and wrappers; the standard library and loky
        count = getattr(executor, name, None)
        if isinstance(count, int):
            return max(1, count)
    return None
