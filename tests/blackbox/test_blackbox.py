"""Black boxes: every state of a member, workers that die and hang, equal bits, the cache, commands, bad input."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch

import invguide as ig
from invguide.blackbox import Ledger, Member
from invguide.blackbox.cache import Cache
from invguide.blackbox.command import FORMATS, read, write
from invguide.blackbox.workers import Threads
from invguide.errors import BlackBoxError, InputError, RunError, ShapeError
from invguide.system.content_hash import content_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

X = torch.linspace(-1, 2, 24).reshape(8, 3)
LIMIT = 600  # seconds until something is given up that must come to an end
PATIENCE = (
    4.0  # seconds: far more than any call takes that is to be answered, on a busy machine too
)


def smooth(x: np.ndarray) -> np.ndarray:
    return np.array([np.sin(x).sum(), np.exp(x).prod()])


def expected(x: torch.Tensor = X) -> torch.Tensor:
    return torch.stack([x.sin().sum(1), x.exp().prod(1)], 1)


def mark(folder: Path, x: np.ndarray) -> int:
    """Leave one more file for this input; return how many there were."""
    stem = x.tobytes().hex()
    before = len(list(folder.glob(f"{stem}.*")))
    (folder / f"{stem}.{os.getpid()}.{time.time_ns()}").touch()
    return before


@pytest.fixture(autouse=True)
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def boxes() -> Iterator[Callable[..., ig.BlackBox]]:
    """Black boxes that are closed after the test."""
    made = []

    def make(*arguments, **settings) -> ig.BlackBox:
        made.append(ig.BlackBox(*arguments, **settings))
        return made[-1]

    yield make
    for box in made:
        box.close()


def states(box: ig.BlackBox) -> list[str]:
    return [member.state for member in box.last]


# ---- values


def test_values_of_numpy_and_torch_functions():
    assert torch.allclose(ig.BlackBox(smooth)(X), expected(), rtol=1e-6)
    assert torch.equal(
        ig.BlackBox(lambda x: x.unsqueeze(0).clamp(0, 1))(X), X[:, None].clamp(0, 1)
    )
    module = torch.nn.Linear(3, 2)
    assert torch.allclose(ig.BlackBox(module)(X), module(X).detach())
    assert not list(
        ig.BlackBox(module).parameters()
    )  # moving the operator leaves the function alone
    assert not ig.BlackBox(smooth).differentiable
    assert not ig.BlackBox(smooth)(X.clone().requires_grad_()).requires_grad


def test_torch_is_told_by_the_annotation():
    """std of arrays and tensors differ, so which one comes matters."""

    def std(x: torch.Tensor) -> torch.Tensor:
        return x.std()

    assert torch.allclose(ig.BlackBox(std)(X), X.std(1))
    assert torch.allclose(ig.BlackBox(lambda x: x.std())(X), X.std(1, correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_one_number_per_sample(dtype: torch.dtype):
    y = ig.BlackBox(lambda x: float(x.max()))(X.to(dtype))
    assert torch.equal(y, X.to(dtype).amax(1))
    assert y.dtype == dtype
    assert y.shape == (8,)


def test_complex_answers():
    y = ig.BlackBox(lambda x: np.fft.fft(x))(X.double())
    assert y.dtype == torch.complex128
    assert torch.allclose(y, torch.fft.fft(X.double()))
    with pytest.raises(InputError, match=r"returned complex numbers for sample . and real ones"):
        ig.BlackBox(lambda x: x * 1j if x[0] > 0 else x)(X)


class AtOnce(ThreadPoolExecutor):
    """Has made every call before the first answer is looked at."""

    def __init__(self) -> None:
        super().__init__(16)

    def submit(self, function, x):
        future: Future = Future()
        future.set_result(function(x))
        return future


def test_inputs_and_answers_are_copies():
    buffer = np.zeros(3)

    def greedy(x: np.ndarray) -> np.ndarray:
        buffer[:] = 2 * x
        x[:] = 7
        return buffer

    x = X.clone()
    assert torch.equal(ig.BlackBox(greedy)(x), 2 * X)
    assert torch.equal(ig.BlackBox(greedy, executor=AtOnce())(x), 2 * X)
    assert torch.equal(x, X)

    def spoil(x: np.ndarray) -> np.ndarray:
        before = x.copy()
        x[:] = np.nan
        if np.random.rand() < 0.5:  # noqa: NPY002
            raise ValueError("again")
        return before

    box = ig.BlackBox(spoil, retries=50)
    assert torch.equal(box(X), X)
    assert box.summary()["retries"] > 0


def test_gradients_inside_work_under_no_grad():
    def slope(x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()
        return torch.autograd.grad((x**3).sum(), x)[0]

    with torch.no_grad():
        assert torch.allclose(ig.BlackBox(slope)(X), 3 * X**2)
    with torch.inference_mode():
        assert torch.allclose(ig.BlackBox(slope)(X), 3 * X**2)


def test_device(device: torch.device):
    y = ig.BlackBox(smooth)(X.to(device))
    assert y.device.type == device.type


# ---- equal bits


class Delayed:
    """Answers in an order of its own."""

    def __init__(self, seed: int) -> None:
        self.delay = np.random.default_rng(seed).permutation(8) / 200

    def __call__(self, x: np.ndarray) -> np.ndarray:
        time.sleep(self.delay[int(abs(x[0] * 1e4)) % 8])
        return np.array([np.sin(x).sum(), np.exp(x).prod(), np.linalg.norm(x)])


def test_bits_do_not_depend_on_workers_or_order(boxes: Callable[..., ig.BlackBox]):
    from loky.process_executor import ProcessPoolExecutor

    reference = ig.BlackBox(Delayed(0))(X)
    for seed, workers in ((1, 1), (2, 4)):
        assert torch.equal(boxes(Delayed(seed), workers=workers)(X), reference)
    with ThreadPoolExecutor(3) as threads:
        assert torch.equal(ig.BlackBox(Delayed(3), executor=threads)(X), reference)
    processes = ProcessPoolExecutor(2)
    assert torch.equal(ig.BlackBox(Delayed(4), executor=processes)(X), reference)
    processes.shutdown(kill_workers=True)


def test_vectorised_bits_do_not_depend_on_workers(boxes: Callable[..., ig.BlackBox]):
    matrix = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    x = torch.randn(70, 7)
    sizes = []

    def linear(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return x @ matrix.T

    reference = ig.BlackBox(linear, vectorised=True)(x)
    assert sizes == [32, 32, 6]
    assert torch.allclose(reference, x @ torch.from_numpy(matrix).T, atol=1e-5)
    assert torch.equal(boxes(linear, vectorised=True, workers=2)(x), reference)


def test_one_bad_sample_does_not_cost_its_chunk():
    sizes = []

    def picky(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        if (x[:, 0] > 1.6).any():
            raise ValueError("too large")
        return np.where(x[:, 0] < -0.9, np.nan, x[:, 0])

    box = ig.BlackBox(picky, vectorised=True, retries=2)
    y = box(X)
    assert states(box) == ["non-finite", *["ok"] * 6, "failed"]
    assert sizes == [8, *[1] * 10]  # the chunk once, the samples alone, the bad one twice more
    assert torch.equal(y[1:7], X[1:7, 0])
    assert y[[0, 7]].isnan().all()
    with pytest.raises(
        ShapeError, match=r"shape \(3, 8\) for a batch of 8 samples; expected \(8, ...\)"
    ):
        ig.BlackBox(lambda x: x.T, vectorised=True)(X)


# ---- states


def troubled(x: np.ndarray, folder: Path | None = None) -> np.ndarray:
    """Goes wrong in another way on samples 1 to 5 of X."""
    match round((x[0] + 1) / 0.3913):
        case 1:
            raise ValueError("negative density")
        case 2:
            return np.array([1.0, np.inf])
        case 3:
            time.sleep(100)
        case 4:
            os._exit(3)
        case 5:
            sys.exit("gave up")
    return smooth(x)


@pytest.mark.slow
def test_every_state(boxes: Callable[..., ig.BlackBox]):
    box = boxes(troubled, workers=2, timeout=PATIENCE, retries=1, max_failed=1.0)
    y = box(X)
    assert states(box) == [
        "ok",
        "failed",
        "non-finite",
        "timed out",
        "lost worker",
        "failed",
        "ok",
        "ok",
    ]
    details = [member.detail for member in box.last]
    # Where it was raised is told by whoever pickled the function: its file, or that it has none.
    assert re.match(r"ValueError: negative density \(.+:\d+\)", details[1])
    assert details[2] == "1 of 2 numbers are NaN or infinite"
    assert details[3] == f"no answer after {PATIENCE:g} s"
    assert details[4]  # loky says how it died
    assert details[5].startswith("SystemExit: gave up")
    assert [member.attempts for member in box.last] == [1, 2, 1, 2, 2, 2, 1, 1]
    assert torch.equal(y.isnan().all(1), torch.tensor([0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool))
    good = torch.tensor([0, 6, 7])
    assert torch.equal(y[good], ig.BlackBox(smooth)(X[good]))
    summary = box.summary()
    figures = ("calls", "ok", "failed", "non_finite", "timed_out", "lost_worker", "retries")
    assert [summary[name] for name in figures] == [8, 3, 2, 1, 1, 1, 4]
    assert summary["resubmitted"] == 0  # a worker takes no other call with it
    assert 2 * PATIENCE <= summary["busy_seconds"] < 2 * summary["wall_seconds"]
    assert json.loads(json.dumps(summary)) == summary
    assert box.progress_text() == "8 calls, 5 failed"


def test_retries_are_counted(marks: Path):
    def moody(x: np.ndarray) -> np.ndarray:
        if mark(marks, x) < 2:
            raise OSError("no licence")
        return smooth(x)

    box = ig.BlackBox(moody, retries=2)
    assert torch.equal(box(X), ig.BlackBox(smooth)(X))
    assert box.summary()["retries"] == 16
    assert {member.attempts for member in box.last} == {3}
    assert len(list(marks.iterdir())) == 24


def test_a_killed_worker_costs_nothing(marks: Path, boxes: Callable[..., ig.BlackBox]):
    """SIGKILL from outside, in the middle of a call."""

    def stalled(x: np.ndarray) -> np.ndarray:
        if not mark(marks, x) and x[0] > 1.6:
            os.kill(os.getpid(), signal.SIGSTOP)  # as a call that runs for long
        return smooth(x)

    def kill() -> None:
        stem = X[7].numpy().tobytes().hex()
        while not (found := list(marks.glob(f"{stem}.*"))):
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(int(found[0].name.split(".")[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    box = boxes(stalled, workers=2)
    assert torch.equal(box(X), ig.BlackBox(smooth)(X))
    killer.join()
    assert set(states(box)) == {"ok"}
    assert box.summary()["retries"] == 1
    assert len(list(marks.iterdir())) == 9


def test_a_hung_worker_is_gone(tmp_path: Path, boxes: Callable[..., ig.BlackBox]):
    def hang(x: np.ndarray) -> float:
        if x[0] < -0.9:
            child = subprocess.Popen(["sleep", "100"])
            (tmp_path / "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(100)
        return 1.0

    box = boxes(hang, workers=1, timeout=PATIENCE, retries=0)
    y = box(X)
    assert torch.equal(y[1:], torch.ones(7))
    for pid in (tmp_path / "pids").read_text().split():
        assert not alive(int(pid))


def alive(pid: int) -> bool:
    """Zombies count as dead: whoever started them has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_starting_a_worker_is_not_the_time_of_the_call(boxes: Callable[..., ig.BlackBox]):
    class Slow:
        def __call__(self, x: np.ndarray) -> float:
            return 1.0

        def __reduce__(self):
            return slow_load, ()

    def slow_load():
        time.sleep(PATIENCE + 0.5)
        return Slow()

    box = boxes(Slow(), workers=1, timeout=PATIENCE, retries=0)
    assert torch.equal(box(X), torch.ones(8))


class Fragile:
    """A shared pool: a call that raises SystemError takes all that run with it, and nobody says whose fault it was."""

    def __init__(self, workers: int) -> None:
        self.num_workers, self.threads = workers, ThreadPoolExecutor(workers)
        self.lock, self.out, self.executions = threading.Lock(), set(), 0

    def submit(self, function, x):
        future: Future = Future()
        with self.lock:
            self.out.add(future)
            self.executions += 1
        self.threads.submit(self._run, future, function, x)
        return future

    def _run(self, future: Future, function, x) -> None:
        reply = function(x)
        dead = "SystemError" in reply[2]
        with self.lock:
            lost = list(self.out) if dead else [future] * (future in self.out)
            self.out -= set(lost)
        for one in lost:
            if dead:
                one.set_exception(BrokenExecutor("a process died"))
            else:
                one.set_result(reply)


@pytest.mark.parametrize("retries", [0, 1])
def test_a_call_that_kills_its_worker_is_isolated(retries: int):
    def deadly(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        if x[0] > 1.6:
            raise SystemError
        return smooth(x)

    x = torch.cat([X, X[:4]])
    pool = Fragile(3)
    box = ig.BlackBox(deadly, executor=pool, retries=retries)
    y = box(x)
    assert [i for i, state in enumerate(states(box)) if state == "lost worker"] == [7]
    assert y[7].isnan().all()
    good = torch.tensor([i for i in range(12) if i != 7])
    assert torch.equal(y[good], ig.BlackBox(smooth)(x[good]))
    # Innocents are not charged, whatever retries is; the culprit runs twice: with others, and alone.
    assert {member.attempts for i, member in enumerate(box.last) if i != 7} == {1}
    assert box.last[7].attempts == 2
    assert box.summary()["retries"] == 0
    assert pool.executions == 12 + box.summary()["resubmitted"]


def test_hung_calls_of_a_foreign_executor_are_given_up():
    release = threading.Event()

    def hang(x: np.ndarray) -> float:
        if x[0] < -0.9:
            release.wait(100)
        return 1.0

    with ThreadPoolExecutor(2) as threads:
        box = ig.BlackBox(hang, executor=threads, timeout=PATIENCE)
        y = box(X)
        assert states(box) == ["timed out", *["ok"] * 7]
        assert torch.equal(y[1:], torch.ones(7))
        with ThreadPoolExecutor(2) as others:
            box = ig.BlackBox(lambda x: release.wait(100), executor=others, timeout=0.3)
            with pytest.raises(BlackBoxError, match="all 2 workers of the executor hang"):
                box(X)
            release.set()


def test_a_broken_executor_is_told():
    threads = ThreadPoolExecutor(2)
    threads.shutdown()
    with pytest.raises(BlackBoxError, match=r"takes no more calls .* use workers=N"):
        ig.BlackBox(smooth, executor=threads)(X)


def test_what_finished_before_an_executor_broke_is_kept(tmp_path: Path):
    class Breaking(AtOnce):
        count = 0

        def submit(self, function, x):
            self.count += 1
            if self.count > 5:
                raise BrokenExecutor("gone")
            return super().submit(function, x)

    with pytest.raises(BlackBoxError, match="gone"):
        ig.BlackBox(smooth, executor=Breaking(), cache=tmp_path)(X)
    assert len(list(tmp_path.rglob("*.npy"))) == 5


# ---- too many failures


def test_the_report_replays(tmp_path: Path):
    def often(x: np.ndarray) -> np.ndarray:
        if x[0] < 1:
            raise ValueError(f"sample begins with {x[0]:.2f}")
        return x

    box = ig.BlackBox(often, cache=tmp_path, retries=0)
    with pytest.raises(
        BlackBoxError, match=r"often failed for 6 of its last 8 calls: more than max_failed=0.5"
    ) as e:
        box(X)
    assert issubclass(BlackBoxError, RunError)
    lines = str(e.value).splitlines()
    assert lines[1].split() == [
        "|",
        "sample",
        "|",
        "state",
        "|",
        "attempts",
        "|",
        "what",
        "happened",
        "|",
    ]
    assert "| failed |        1 | ValueError: sample begins with -1.00" in lines[3]
    assert np.array_equal(np.load(tmp_path / "failed" / "sample-0.npy"), X[0].numpy())
    (command,) = [line for line in lines if line.startswith("replay sample 0: ")]
    again = subprocess.run(
        shlex.split(command.split(": ", 1)[1]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=LIMIT,
    )
    assert again.returncode == 1
    assert "ValueError: sample begins with -1.00" in again.stderr


def test_failures_are_judged_by_the_last_calls():
    bad = [0.0]

    def often(x: np.ndarray) -> np.ndarray:
        if x[0] < bad[0]:
            raise ValueError
        return x

    box = ig.BlackBox(often, max_failed=0.5)
    one = X[:1]
    with pytest.raises(BlackBoxError, match="1 of its last 1"):
        box(one)  # no answer yet, at any max_failed
    box = ig.BlackBox(often, max_failed=1.0)
    with pytest.raises(BlackBoxError, match="none has succeeded yet"):
        box(one)
    box = ig.BlackBox(often, max_failed=0.5)
    box(X[4:])
    for _ in range(4):
        assert box(one).isnan().all()
    with pytest.raises(BlackBoxError, match="5 of its last 9 calls"):
        box(one)
    ledger = Ledger()
    for state in ["failed"] * 15 + ["ok"] * 20:
        ledger.add([Member(state)])
    assert ledger.recent == [False] * 20
    ledger.add([Member("ok")] * 50)
    assert len(ledger.recent) == 50


def test_a_hopeless_batch_is_stopped_early():
    calls = []

    def never(x: np.ndarray) -> np.ndarray:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(BlackBoxError, match="21 of its last 21"):
        ig.BlackBox(never, retries=0)(torch.zeros(40, 2))
    assert len(calls) == 21
    box = ig.BlackBox(never, on_failure="raise", retries=0)
    with pytest.raises(BlackBoxError, match="on_failure='raise'"):
        box(X)
    assert len(calls) == 22
    assert states(box) == ["failed", *["stopped"] * 7]
    assert box.summary()["calls"] == 1


def test_the_command_line_reports_a_black_box_as_a_failed_run(capsys: pytest.CaptureFixture[str]):
    import typer

    from invguide.cli.terminal import RUN_FAILED, reporting

    with pytest.raises(typer.Exit) as e, reporting():
        raise BlackBoxError("simulate failed for 6 of its last 8 calls")
    assert e.value.exit_code == RUN_FAILED
    assert capsys.readouterr().err.startswith("error: simulate failed")


# ---- the cache


def test_second_run_makes_no_call(tmp_path: Path, marks: Path):
    def counted(x: np.ndarray) -> np.ndarray:
        mark(marks, x)
        return smooth(x) if x[0] < 1.6 else np.array([np.nan, 0.0])

    first, second = (ig.BlackBox(counted, cache=tmp_path / "cache") for _ in range(2))
    y = first(X)
    assert torch.equal(second(X).nan_to_num(), y.nan_to_num())
    assert len(list(marks.iterdir())) == 9  # what was not finite is called again
    assert (second.summary()["calls"], second.summary()["cached"]) == (1, 7)
    assert second.progress_text() == "1 calls (7 more cached), 1 failed"
    assert [member.cached for member in second.last] == [True] * 7 + [False]
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    # Another dtype is another input; a damaged file is none, and is written again.
    second(X.double())
    assert len(list(marks.iterdir())) == 17
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    for i, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[-17] ^= 1  # the last byte of the numbers
        file.write_bytes(content if i % 2 else content[: len(content) // 2])
    third = ig.BlackBox(counted, cache=tmp_path / "cache")
    assert torch.equal(third(X).nan_to_num(), y.nan_to_num())
    third(X.double())
    assert third.summary()["cached"] == 0
    third(X)
    third(X.double())
    assert third.summary()["cached"] == 14


def test_keys_of_equal_bytes_differ(tmp_path: Path):
    cache = Cache(tmp_path, "f")
    zeros = [np.zeros(2, "f4"), np.zeros(1, "f8"), np.zeros((1, 2), "f4"), np.zeros(2, "i4")]
    keys = {cache.key(x) for x in (*zeros, zeros[0][:1])} | {Cache(tmp_path, "g").key(zeros[0])}
    assert len(keys) == 6
    assert cache.key(np.arange(6.0)[::2]) == cache.key(np.array([0.0, 2.0, 4.0]))


def test_keep_is_for_boxes_without_a_cache(tmp_path: Path):
    box = ig.BlackBox(smooth)
    box.keep(tmp_path / "kept")
    box.keep(tmp_path / "other")
    box(X)
    assert len(list((tmp_path / "kept").rglob("*.npy"))) == 8
    assert not (tmp_path / "other").exists()
    unknown = (x for x in "abc")
    with pytest.raises(
        InputError, match=r"cannot be read \(function.closure \w+: generator\); .* or use no cache"
    ):
        ig.BlackBox(lambda x: unknown, cache=tmp_path / "other")
    with pytest.warns(UserWarning, match="finished calls are not kept"):
        ig.BlackBox(lambda x: unknown).keep(tmp_path / "other")


CLIENT = """
import sys, time, os
from pathlib import Path
import numpy as np, torch, invguide as ig
root = Path(sys.argv[1])
def simulate(x: np.ndarray):
    (root / "marks" / f"{int(x[0])}.{os.getpid()}.{time.time_ns()}").touch()
    while x[0] >= 12 and not (root / "go").exists():
        time.sleep(0.01)
    return x * 2
box = ig.BlackBox(simulate, workers=2, cache=root / "cache")
x = torch.arange(24.0).reshape(24, 1)
y = box(x)
assert torch.equal(y, 2 * x)
box.close()
print(box.summary()["calls"], box.summary()["cached"])
"""


@pytest.mark.slow
def test_a_killed_client_resumes_without_repeating(tmp_path: Path, marks: Path):
    """Killed when twelve calls are kept and both workers are in the middle of another."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    call = [sys.executable, str(script), str(tmp_path)]
    finished = lambda: list((tmp_path / "cache").rglob("*.npy"))  # noqa: E731
    begun = lambda: {f.name for f in marks.iterdir()}  # noqa: E731
    with subprocess.Popen(call) as client:
        while len(finished()) < 12 or len(begun()) < 14:
            assert client.poll() is None
            time.sleep(0.02)
        client.kill()
    assert len(finished()) == 12
    before = begun()
    assert len(before) == 14
    (tmp_path / "go").touch()
    again = subprocess.run(call, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert again.stdout.split() == ["12", "12"]
    # Orphans may have finished what they had begun; nobody began anything else.
    assert len(begun() - before) == 12
    deadline = time.monotonic() + LIMIT
    workers = {int(name.split(".")[1]) for name in begun()}
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)  # workers do not outlive their client


FUNCTIONS = """
import functools
import numpy as np, torch
SCALE = {scale}
def helper(x):
    return x * SCALE
def named(x):
    names = {{"a", "b", "c"}}
    return helper(x) if x in names else {constant}
class Model:
    def __init__(self, weight):
        self.weight, self.table = weight, dict(zip("abc", (1, 2.0, None)))
    def __call__(self, x):
        return x @ self.weight
net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
torch.nn.init.constant_(net[0].weight, {weight}); torch.nn.init.zeros_(net[0].bias)
def recursive(x):
    return recursive(x - 1) if x > 0 else {constant}
every = [named, lambda x: x + SCALE, functools.partial(named, 1), Model(np.full((2, 2), {weight})), net,
         lambda x: net(x).sum(), recursive, Model(torch.full((2,), 1j * {weight})).__call__]
"""
PRINT = "\nfrom invguide.system.content_hash import content_of\nprint(*(content_of(f).digest for f in every))"


def identity(function: Callable) -> str:
    return content_of(function).digest


def identities(**values: float) -> list[str]:
    space: dict = {"__name__": "__main__"}
    code = FUNCTIONS.format(**{"scale": 1.0, "constant": 2, "weight": 3.0, **values})
    exec(compile(code, "script", "exec"), space)  # noqa: S102
    return [identity(function) for function in space["every"]]


@pytest.mark.slow
def test_identity_is_stable_between_processes_and_sees_changes():
    first = identities()
    assert len(set(first)) == len(first)
    code = FUNCTIONS.format(scale=1.0, constant=2, weight=3.0) + PRINT
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT
    )
    assert other.stdout.split() == first
    differs = lambda **v: [a != b for a, b in zip(first, identities(**v))]  # noqa: E731
    assert not any(differs())
    assert differs(scale=1.5) == [True, True, True, False, False, False, False, False]
    assert differs(weight=4.0) == [False, False, False, True, True, True, False, True]
    assert differs(constant=5) == [True, False, True, False, False, False, True, False]


def test_identity_of_odd_things():
    assert identity(np.sin) != identity(np.cos)
    assert identity(math.sqrt) == identity(math.sqrt)
    assert identity(partial(open, "x")) != identity(partial(open, "y"))
    lock = threading.Lock()
    assert len(identity(lambda x: (lock, x))) == 32

    class Loop:
        def __init__(self) -> None:
            self.me = self

        def __call__(self, x: int) -> int:
            return x

    assert identity(Loop()) == identity(Loop())


def test_repr_names_what_changes_results():
    assert repr(ig.BlackBox(smooth)) == "BlackBox(smooth)"
    assert repr(ig.BlackBox(partial(smooth), retries=3, cache=None)) == "BlackBox(smooth)"
    assert repr(ig.BlackBox(smooth, vectorised=True)) == "BlackBox(smooth, vectorised=True)"
    assert repr(ig.BlackBox(Delayed(0))) == "BlackBox(Delayed)"
    command = ig.BlackBox(ig.Command("cp {input} {output}"), workers=2)
    assert repr(command) == "BlackBox(Command('cp {input} {output}', format='npy'))"


# ---- commands


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_formats_keep_every_digit(format: str, dtype: type, tmp_path: Path):
    for shape in ((), (3,), (2, 3)):
        x = np.random.default_rng(0).normal(size=shape).astype(dtype)
        write(tmp_path / f"x.{format}", x)
        assert np.array_equal(read(tmp_path / f"x.{format}").astype(dtype).reshape(shape), x)


@pytest.mark.parametrize("workers", [None, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_command_values(format: str, workers: int | None, boxes: Callable[..., ig.BlackBox]):
    box = boxes(ig.Command("cp {input} {output}", format), workers=workers)
    assert torch.equal(box(X), X)
    assert set(states(box)) == {"ok"}


def test_command_finds_files_of_the_present_folder_and_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("my script.sh").write_text('echo "$GREETING" >&2; test -w . && cp "$1" "$2"; exit $3')
    line = "sh 'my script.sh' {input} {output} %d"
    box = ig.BlackBox(ig.Command(line % 0, env={"GREETING": "hello"}))
    monkeypatch.chdir("/")
    assert torch.equal(box(X), X)
    monkeypatch.chdir(tmp_path)
    box = ig.BlackBox(ig.Command(line % 3, env={"GREETING": "hello"}), retries=0)
    with pytest.raises(BlackBoxError, match="CommandFailed: exit code 3; stderr ends: hello") as e:
        box(X)
    replay = str(e.value).splitlines()[-1].split(": ", 1)[1]
    again = subprocess.run(
        shlex.split(replay), cwd="/", capture_output=True, text=True, timeout=LIMIT
    )
    assert (again.returncode, again.stderr) == (3, "hello\n")
    # An edited script is another command to the cache.
    command = ig.Command(line % 0)
    before = content_of(command).digest
    Path("my script.sh").write_text("true")
    assert content_of(command).digest != before


PICKLE = "import pickle, sys; pickle.dump([1.0], open(sys.argv[2], 'wb'))"
OBJECTS = "import numpy, sys; numpy.save(sys.argv[2], numpy.array([{}, 1]), allow_pickle=True)"


@pytest.mark.parametrize(
    ("line", "format", "match"),
    [
        ("sh -c 'exit 7'", "npy", "^CommandFailed: exit code 7$"),
        (
            "sh -c 'seq 99999 >&2; exit 1'",
            "npy",
            r"exit code 1; stderr ends: (?s:.){1900,2000}99999$",
        ),
        ("sh -c 'kill -9 $$'", "npy", "ended by signal SIGKILL"),
        ("true", "npy", "exit code 0, but it wrote no output.npy"),
        (f'{sys.executable} -c "{PICKLE}"', "npy", r"no npy file of numbers \(.+\)"),
        (f'{sys.executable} -c "{PICKLE}"', "npz", r"no npz file of numbers \(.+\)"),
        (f'{sys.executable} -c "{OBJECTS}"', "npy", r"no npy file of numbers \(.+\)"),
        ("sh -c 'echo hello > $1'", "txt", "no txt file of numbers .*hello"),
        ("sh -c ': > $1'", "txt", "empty array"),
        ("sh -c 'echo null > $1'", "json", "returned NoneType"),
        ("sh -c 'echo [1 > $1'", "json", "no json file of numbers"),
        ("sh -c 'sleep 50'", "npy", "no answer after 0.4 s"),
    ],
)
def test_command_failures(line: str, format: str, match: str):
    box = ig.BlackBox(
        ig.Command(line + " {input} {output}", format, input_format="npy"), timeout=0.4 if "sleep" in line else None,
        retries=0, max_failed=1.0,
    )  # fmt: skip
    with pytest.raises(BlackBoxError):
        box(X[:1])
    assert re.search(match, box.last[0].detail), box.last[0].detail
    assert box.last[0].state == ("timed out" if "sleep" in line else "failed")


def processes() -> Iterator[tuple[int, str]]:
    """The parent of every process that runs, and its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            command = (folder / "cmdline").read_text().replace("\0", " ").strip()
            if state != "Z":
                yield int(parent), command


def leftovers() -> tuple[int, int, int]:
    """Children, temporary folders and open files of this process."""
    children = [parent for parent, _ in processes() if parent == os.getpid()]
    folders = list(Path(tempfile.gettempdir()).glob("invguide-*"))
    return len(children), len(folders), len(os.listdir("/proc/self/fd"))


@pytest.fixture
def sleep() -> str:
    """A command that sleeps, and that nobody else on this machine has started."""
    return f"sleep 1000.{os.getpid()}"


@pytest.mark.slow
def test_commands_leave_nothing_behind(own_tmp: Path, sleep: str):
    script = own_tmp / "some.sh"
    script.write_text(
        f'n=$(od -An -tu1 -j131 -N1 "$1"); case $n in *191) {sleep} & {sleep};; *) cp "$1" "$2";; esac'
    )
    x = torch.ones(150, 1)
    x[::50] = -1.0  # last byte 191: hangs, and its child too
    box = ig.BlackBox(
        ig.Command(f"sh {script} {{input}} {{output}}"), workers=4, timeout=PATIENCE, retries=0
    )
    box(x[1:5])
    before = leftovers()
    y = box(x)
    assert torch.equal(y[:, 0].isnan(), x[:, 0] < 0)
    assert leftovers() == before
    assert sleep not in [command for _, command in processes()]
    box.close()


@pytest.mark.parametrize("workers", [None, 2])
def test_an_interrupt_ends_commands(workers: int | None, own_tmp: Path, sleep: str):
    box = ig.BlackBox(
        ig.Command(f"sh -c 'echo > started; {sleep}' {{input}} {{output}}"), workers=workers
    )
    before = leftovers()

    def interrupt() -> None:
        while not list(own_tmp.glob("invguide-*/started")):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # A shell that starts the tests in the background has interrupts ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            box(X)
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert leftovers() == before
    assert sleep not in [command for _, command in processes()]
    assert set(states(box)) == {"stopped"}


def test_a_thread_that_its_pool_does_not_know_is_waited_for(own_tmp: Path, sleep: str):
    """As an interrupt leaves one, between the start of the thread and its registration."""
    before = leftovers()
    command = ig.Command(f"sh -c 'echo > started; {sleep}' {{input}} {{output}}")
    pool = Threads(1, command)
    future = pool.submit(X[0].numpy())
    while not list(own_tmp.glob("invguide-*/started")):
        time.sleep(0.01)
    pool.executor._threads = set()
    pool.close()
    assert leftovers() == before
    assert "stopped with the run" in future.result()[2]


def test_failed_folders_are_kept_on_demand(own_tmp: Path):
    command = ig.Command("sh -c 'echo 1 > trace; exit 1' {input} {output}", keep_failed=True)
    box = ig.BlackBox(command, retries=0, max_failed=1.0)
    with pytest.raises(BlackBoxError, match="its folder is kept"):
        box(X[:1])
    folder = Path(box.last[0].detail.rsplit(": ", 1)[1].split(" (")[0])
    assert np.array_equal(np.load(folder / "input.npy"), X[0].numpy())
    assert (folder / "trace").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"workers": 0}, "workers is 0; expected at least 1, or None"),
        ({"workers": 2.5}, "workers is 2.5"),
        ({"workers": 1, "timeout": -1}, "timeout is -1.0; expected a positive number of seconds"),
        ({"workers": 1, "timeout": math.nan}, "timeout is nan"),
        ({"timeout": 3}, "cannot end a Python function in this process; give workers=1"),
        ({"executor": object()}, r"expected an object with submit\(function"),
        ({"executor": ThreadPoolExecutor}, "expected an object with submit"),
        ({"executor": ThreadPoolExecutor(1), "workers": 2}, "both workers and executor"),
        ({"submit_kwargs": {"a": 1}}, "submit_kwargs are for an executor"),
        ({"retries": -1}, "retries is -1"),
        ({"max_failed": 50}, "max_failed is 50.0; expected a fraction"),
        ({"on_failure": "rise"}, "did you mean 'raise'"),
        ({"cache": "/dev/null/cache"}, "cannot be made a folder"),
        ({"function": "simulate"}, r"for a program pass ig.Command\('simulate'\)"),
        ({"function": Delayed}, "the function is the class Delayed; pass an instance"),
        ({"function": 3}, "expected a callable or ig.Command"),
        ({"function": ig.Command("cp {input} {output}"), "vectorised": True}, "one sample per call"),
        ({"function": ig.Command("simmulate {input} {output}")}, "'simmulate' cannot be started: no such program"),
        ({"function": ig.Command("./no/such {input} {output}")}, "expected a program on PATH"),
        ({"function": partial(smooth, lock=threading.Lock()), "workers": 1}, "module level .* workers=None"),
    ],
)  # fmt: skip
def test_bad_arguments(settings: dict, match: str):
    with pytest.raises(InputError, match=match):
        ig.BlackBox(**{"function": smooth, **settings})


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda x: None, "returned NoneType; expected numbers; raise an exception, or return NaN"),
        (lambda x: "done", "returned text; expected numbers"),
        (lambda x: np.array([{}]), "returned an array of dtype object"),
        (lambda x: np.array(["a"]), "returned an array of dtype <U1"),
        (lambda x: [[1.0], [1.0, 2.0]], "returned a list that is no array"),
        (lambda x: np.empty((0, 3)), r"returned an empty array of shape \(0, 3\)"),
        (
            lambda x: x[: 1 + (x[0] > 0)],
            r"shape \(2,\) for sample 3 and \(1,\) for sample 0; expected one shape",
        ),
    ],
)
def test_bad_answers(answer: Callable, match: str):
    calls = []

    def simulate(x: np.ndarray):
        calls.append(1)
        return answer(x)

    with pytest.raises(InputError, match=match):
        ig.BlackBox(simulate)(X)
    assert len(calls) in (1, 4)  # not repeated


def test_bad_answers_of_workers(boxes: Callable[..., ig.BlackBox]):
    with pytest.raises(InputError, match="returned text"):
        boxes(lambda x: "done", workers=2)(X)

    class Absent:
        def __call__(self, x: np.ndarray) -> float:
            return 1.0

        def __reduce__(self):
            return __import__, ("no_such_module",)

    with pytest.raises(
        InputError,
        match=r"the worker cannot load the function: ModuleNotFoundError.*install its module",
    ):
        boxes(Absent(), workers=1)(X)


def test_bad_batches():
    box = ig.BlackBox(smooth, shape=(3,))
    assert box.input_shape((2,)) == (3,)
    with pytest.raises(ShapeError, match=r"takes samples of shape \(3,\), and was given \(4,\)"):
        box(torch.zeros(2, 4))
    with pytest.raises(InputError, match="empty batch"):
        box(torch.zeros(0, 3))
    box = ig.BlackBox(lambda x: x)
    box(X)
    with pytest.raises(
        ShapeError, match=r"shape \(4,\) for sample 0 and \(3,\) for samples before"
    ):
        box(torch.zeros(2, 4))
    with pytest.raises(InputError, match="submit of the executor returned list"):
        ig.BlackBox(smooth, executor=type("E", (), {"submit": lambda self, f, x: []})())(X)


@pytest.mark.parametrize(
    ("template", "settings", "match"),
    [
        ("simulate {output}", {}, r"has no \{input\}; write \{input\} and \{output\}"),
        ("simulate {input}", {}, r"has no \{output\}"),
        ("simulate '{input} {output}", {}, "cannot be split"),
        ("simulate {input} {output}", {"format": "pickle"}, "unknown format 'pickle'"),
        ("simulate {input} {output}", {"input_format": "np"}, "did you mean 'npz'"),
    ],
)
def test_bad_commands(template: str, settings: dict, match: str):
    with pytest.raises(InputError, match=match):
        ig.Command(template, **settings)


def test_a_text_file_holds_no_pictures():
    with pytest.raises(InputError, match="at most 2 axes"):
        ig.BlackBox(ig.Command("cp {input} {output}", "txt"))(torch.zeros(1, 2, 2, 2))


# ---- as an operator


def test_as_the_operator_of_a_problem():
    """Likelihood of a black box equals that of the same map written in torch, and a failure is NaN there."""
    x = X.double()
    y = expected(x[:1])
    box = ig.BlackBox(lambda x: smooth(x) if x[0] < 1.6 else 1 / 0)
    log_prob, _ = ig.Likelihood(box, y.expand(8, 2), 0.1).evaluate(x)
    reference = -0.5 * ((y - expected(x)) / 0.1).square().sum(1)
    difference = (log_prob - reference)[:7]  # both up to a constant
    assert torch.allclose(difference, difference[:1], atol=1e-9)
    assert log_prob[7].isnan()
