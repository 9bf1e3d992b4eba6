"""BlackBox: an operator, or a reward, that is a simulator: no gradient, and its calls may fail."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from invguide.blackbox import work
from invguide.blackbox.arguments import check_arguments, function_name, kind_of, travels
from invguide.blackbox.batch import Batch, Unit
from invguide.blackbox.cache import Cache
from invguide.blackbox.command import Command
from invguide.blackbox.failures import report
from invguide.blackbox.ledger import WINDOW, Ledger, Member
from invguide.blackbox.pool import evaluate
from invguide.blackbox.workers import (
    ByValue,
    Foreign,
    Here,
    Pool,
    Processes,
    Threads,
    pack,
    workers_of,
)
from invguide.errors import BlackBoxError, InputError, ShapeError
from invguide.forward_operator import Operator
from invguide.system.content_hash import content_of
from invguide.system.run_file import sweep_old
from invguide.system.threads import shared_among

CHUNK = 32  # samples in one vectorised call: fixed, so that results do not depend on the number of workers


class _Enough(Exception):
    """More failures than are allowed, whatever the rest of the batch does."""


class BlackBox(Operator):
    """A Python function or a program as an operator without gradient, or as a reward, over any number of workers.

    Maps samples (B, *shape), data units, to (B, *y_shape), or (B,) where one call returns one number, in the dtype and
    on the device of x. A sample whose call finally failed is a row of NaN. The answer does not depend on the number of
    workers or on the order in which they finish; nor does it depend on failures, as long as the function itself is
    deterministic.

    A call is repeated where it raised, ended with an exit code, took too long, or lost its worker. An answer with NaN
    or infinite numbers is final. Something else than numbers, or shapes that differ between samples, is an error.

    Args:
        function: Callable on one sample without batch axis, an array (or a tensor, where arrays raise TypeError or
            AttributeError, or the function is a torch module or annotated so), or a `Command`.
        workers: None calls one after the other in this process; a number starts as many processes, kept until
            `close` (threads for a Command, whose calls are processes anyway). They share the cores: OMP_NUM_THREADS of
            each is its part of them.
        timeout: Seconds for one call; a process that hangs is killed. Starting a worker does not count.
        retries: How often a failed call is repeated.
        vectorised: The function maps batches (b, *shape) to (b, *y_shape), b at most 32. Of a batch that failed, the
            samples are called one by one.
        on_failure: "drop" goes on with the others; "raise" stops at the first failure.
        max_failed: Stop where more than this fraction of the last calls failed: of those of the batch, or of the
            last 20 where the batch is smaller.
        cache: Folder that keeps every finished result; a call that is found there is not made again. The key is the
            input and the function: its code, helpers of the same module, and the values it holds.
        executor: In place of workers: an object whose submit(function, x) returns a concurrent.futures.Future, such
            as `client.get_executor()` of dask, or an MPIPoolExecutor. It is not shut down. With it, `timeout` gives a
            call up but cannot end it, counts from submission, and is not repeated.
        shape: Shape of one x, where known.
        submit_kwargs: Passed on to submit, as in {"resources": {"GPU": 1}} for dask.

    Attributes:
        last: What became of each sample of the last batch.
        ledger: Totals.

    Raises:
        InputError: Arguments that make no sense, a function that cannot be sent, a program that cannot be started.

    Example:
        >>> box = BlackBox(lambda x: x.max() - x.min())
        >>> box(torch.tensor([[0.0, 2.0, 5.0], [1.0, 1.0, 1.0]]))
        tensor([5., 0.])
    """

    differentiable = False

    def __init__(
        self,
        function: Callable[[Any], Any] | Command | Any,
        *,
        workers: int | None = None,
        timeout: float | None = None,
        retries: int = 1,
        vectorised: bool = False,
        on_failure: str = "drop",
        max_failed: float = 0.5,
        cache: str | Path | None = None,
        executor: Any = None,
        shape: tuple[int, ...] | None = None,
        submit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if hasattr(executor, "get_executor"):  # a dask Client
            executor = executor.get_executor()
        check_arguments(
            function,
            workers,
            timeout,
            retries,
            vectorised,
            on_failure,
            max_failed,
            executor,
            submit_kwargs,
        )
        self.workers, self.timeout, self.retries = workers, timeout, retries
        self.vectorised, self.on_failure, self.max_failed = vectorised, on_failure, max_failed
        self.executor, self.submit_kwargs = executor, dict(submit_kwargs or {})
        self.shape = None if shape is None else tuple(shape)
        self.y_shape: tuple[int, ...] | None = None
        self._complex: bool | None = None
        self.last: tuple[Member, ...] = ()
        self.ledger = Ledger()
        # In a tuple, so that a torch module is not taken for a part of this one, and moved.
        self._function = (function,)
        self._kind = kind_of(function)
        self._packed = None
        if travels(function, workers, executor):
            self._packed = pack(self._called, self._kind, self.name)
        self._pool: Pool | None = None
        self._cache: Cache | None = None
        if cache is not None:
            self._cache = Cache(cache, self._identity())

    # ---- what the driver asks for

    @property
    def function(self) -> Any:
        return self._function[0]

    @property
    def name(self) -> str:
        return function_name(self.function)

    def keep(self, folder: str | Path) -> None:
        """Keep results in this folder, unless there is a cache; warn where the function cannot be told from others."""
        if self._cache is None:
            try:
                self._cache = Cache(folder, self._identity())
                sweep_old(Path(folder), 0)  # it belongs to the run that keeps it
            except InputError as error:
                warnings.warn(
                    f"finished calls are not kept, and are made again on resuming: {error}"
                )

    def _identity(self) -> str:
        content = content_of(self)
        if content.unknown:
            raise InputError(
                f"nobody can tell {self.name} from other functions, because what it holds cannot be read "
                f"({', '.join(content.unknown)}); make that inside the function, or use no cache"
            )
        return content.digest

    def identity_parts(self) -> Any:
        """What decides the results, for caches and checkpoints; not who computes them, or how often it is tried."""
        return {"function": self.function, "vectorised": self.vectorised}

    def summary(self) -> dict[str, Any]:
        """Calls, failures, seconds and utilisation so far, ready for JSON."""
        workers = self.workers or (workers_of(self.executor) if self.executor is not None else 1)
        return {"function": self.name, "workers": workers, **self.ledger.summary()}

    def progress_text(self) -> str:
        return str(self.ledger)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self.shape

    def extra_repr(self) -> str:
        """Name and what changes results, the same in every process."""
        function = repr(self.function) if isinstance(self.function, Command) else self.name
        return f"{function}, vectorised=True" if self.vectorised else function

    def close(self) -> None:
        """End the workers; the next batch starts new ones."""
        if self._pool is not None:
            self._finalizer()
            self._pool = None

    # ---- evaluation

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape), data units -> (B, *y_shape), NaN where a call failed.

        Raises:
            BlackBoxError: Too many calls failed; the message has a table of them and the line that replays one.
            InputError: The function returned something else than numbers.
            ShapeError: x, or answers of different shapes.
        """
        if not len(x):
            raise InputError(f"{self.name} was given an empty batch of shape {tuple(x.shape)}")
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ShapeError(
                f"{self.name} takes samples of shape {self.shape}, and was given {tuple(x.shape[1:])}"
            )
        pool, batch = self._open(), Batch(x, self.name, self.y_shape, self._complex)
        try:
            with self.ledger.clock(pool.capacity):
                self._evaluate(pool, batch)
        except _Enough:
            self.close()
        except BaseException:
            self.close()
            raise
        finally:
            self.last = batch.members()
            self.ledger.add(self.last)
        self.y_shape, self._complex = batch.y_shape, batch.complex
        self._judge(batch)
        return batch.tensor()

    @property
    def _called(self) -> Callable[[Any], Any]:
        if isinstance(self.function, Command):  # a command times itself
            return partial(self.function, timeout=self.timeout)
        return self.function

    def _open(self) -> Pool:
        if self._pool is None:
            self._pool = pool = self._new_pool()
            self._finalizer = weakref.finalize(self, pool.close)
        return self._pool

    def _new_pool(self) -> Pool:
        if self.executor is None and isinstance(self.function, Command):
            return Threads(self.workers or 1, self._called)
        if self.workers is not None and self._packed is not None:
            return Processes(self.workers, self._packed, [shared_among(self.workers)])
        call = partial(work.run, self._called, self._kind)
        if self.executor is None:
            return Here(call)
        if self._packed is not None:
            call = ByValue(partial(work.remote, *self._packed))
        return Foreign(self.executor, call, self.submit_kwargs)

    def _evaluate(self, pool: Pool, batch: Batch) -> None:
        units = batch.units(CHUNK if self.vectorised else None)
        again = self._call(pool, batch, [unit for unit in units if len(unit.rows) > 1], 0)
        again += [unit for unit in units if len(unit.rows) == 1]
        self._call(pool, batch, again, self.retries)

    def _call(self, pool: Pool, batch: Batch, units: list[Unit], retries: int) -> list[Unit]:
        """Look up or call each unit; return, one by one, the samples of chunks that failed."""
        cache, again, missing = self._cache, [], []
        limit = (
            self.max_failed * max(len(batch.inputs), WINDOW) if self.on_failure == "drop" else 0
        )
        for unit in units:
            key = "" if cache is None else cache.key(unit.x)
            value = None if cache is None else cache.get(key)
            if value is None:
                missing.append((unit, key))
            else:
                batch.accept(unit, value, Member("ok", attempts=0, cached=True), self.vectorised)

        def finished(index: int, reply: work.Reply, attempts: int) -> None:
            unit, key = missing[index]
            state, value, text, seconds = reply
            if state == "bad":
                raise InputError(f"{self.name} {text}" if text.startswith("returned") else text)
            member = Member(state, text, attempts, seconds / len(unit.rows))
            if state == "ok":
                good = batch.accept(unit, value, member, self.vectorised)
                if good and cache is not None:
                    cache.put(key, value)
            elif len(unit.rows) > 1:
                again.extend(unit.singles())
            else:
                batch.fail(unit, member)
            if batch.failures > limit:
                raise _Enough

        timeout = None if isinstance(self.function, Command) else self.timeout
        inputs = [unit.x for unit, _ in missing]
        evaluate(pool, inputs, finished, self.ledger, retries=retries, timeout=timeout)
        return again

    def _judge(self, batch: Batch) -> None:
        """Raise BlackBoxError where too many calls failed."""
        failed, recent = batch.failures, self.ledger.recent
        if not failed:
            return
        if self.on_failure == "raise":
            why = "on_failure='raise' allows no failure"
        elif sum(recent) > self.max_failed * len(recent):
            why = f"more than max_failed={self.max_failed:g} allows"
        elif batch.y_shape is None:
            why = "none has succeeded yet, so the shape of an answer is unknown"
        else:
            return
        folder = None if self._cache is None else self._cache.folder
        inputs = [x[None] if self.vectorised else x for x in batch.inputs]
        table = report(self.function, self._kind, self.last, inputs, folder)
        raise BlackBoxError(
            f"{self.name} failed for {sum(recent)} of its last {len(recent)} calls: {why}\n{table}"
        )
