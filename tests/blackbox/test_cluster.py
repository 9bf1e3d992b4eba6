"""Black boxes on a real dask cluster of three worker processes: equal bits, a killed worker, a deadly call."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

import invguide as ig

distributed = pytest.importorskip("distributed")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

X = torch.linspace(-1, 2, 36).reshape(12, 3)


def smooth(x: np.ndarray) -> np.ndarray:
    return np.array([np.sin(x).sum(), np.exp(x).prod(), np.linalg.norm(x)])


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from dask.config import set as configured

    settings = {
        "distributed.comm.timeouts.connect": "60s",
        "distributed.scheduler.allowed-failures": 1,
    }
    with (
        configured(settings),
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_bits_equal_those_of_one_process(client: Any, tmp_path: Path):
    pids: list[int] = list(client.run(os.getpid).values())
    assert len(set(pids)) == 3

    def where(x: np.ndarray) -> np.ndarray:
        (tmp_path / str(os.getpid())).touch()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # until every worker has a call
        return np.array([float(os.getpid())])

    box = ig.BlackBox(where, executor=client.get_executor())
    assert set(box(X.double())[:, 0].tolist()) == {float(pid) for pid in pids}
    assert box.summary()["workers"] == 3
    box = ig.BlackBox(smooth, executor=client)  # a client will do
    assert torch.equal(box(X), ig.BlackBox(smooth)(X))
    assert box.summary()["ok"] == 12


def test_a_killed_worker_costs_nothing(client: Any, tmp_path: Path):
    pids: list[int] = list(client.run(os.getpid).values())
    (tmp_path / "pids").mkdir()

    def slow(x: np.ndarray) -> np.ndarray:
        (tmp_path / "pids" / f"{os.getpid()}.{time.time_ns()}").touch()
        time.sleep(0.1)
        return smooth(x)

    def kill() -> None:
        while not (found := list((tmp_path / "pids").iterdir())):
            time.sleep(0.01)
        os.kill(int(found[0].name.split(".")[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    box = ig.BlackBox(slow, executor=client.get_executor())
    y = box(X)
    killer.join()
    assert torch.equal(y, ig.BlackBox(smooth)(X))
    assert {member.state for member in box.last} == {"ok"}
    assert {member.attempts for member in box.last} == {1}
    client.wait_for_workers(3, timeout=600)
    assert set(client.run(os.getpid).values()) != set(pids)


@pytest.mark.slow
def test_a_deadly_call_is_isolated(client: Any):
    def deadly(x: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        if x[0] > 1.7:
            os.kill(os.getpid(), signal.SIGKILL)
        return smooth(x)

    box = ig.BlackBox(deadly, executor=client.get_executor())
    y = box(X)
    assert [member.state for member in box.last] == ["ok"] * 11 + ["lost worker"]
    assert distributed.scheduler.KilledWorker.__name__ in box.last[11].detail
    assert torch.equal(y[:11], ig.BlackBox(smooth)(X[:11]))
    assert y[11].isnan().all()
    client.wait_for_workers(3, timeout=600)


def test_failures_and_repeated_calls(client: Any, tmp_path: Path):
    """dask takes equal calls for one, unless it is told: a repeated call must run again."""

    def count(x: np.ndarray) -> float:
        (tmp_path / f"{os.getpid()}.{time.time_ns()}").touch()
        return 1.0

    ig.BlackBox(count, executor=client.get_executor())(X[:1].expand(6, 3))
    assert len(list(tmp_path.iterdir())) == 6

    def moody(x: np.ndarray) -> np.ndarray:
        mine = tmp_path / x.tobytes().hex()
        if x[0] > 1.7:
            raise ValueError("never")
        if not mine.exists():
            mine.touch()
            raise OSError("not yet")
        return smooth(x)

    box = ig.BlackBox(moody, executor=client.get_executor())
    y = box(X)
    assert [member.state for member in box.last] == ["ok"] * 11 + ["failed"]
    assert {member.attempts for member in box.last} == {2}
    assert torch.equal(y[:11], ig.BlackBox(smooth)(X[:11]))


@pytest.mark.slow
def test_a_hung_call_is_given_up(client: Any):
    def hang(x: np.ndarray) -> float:
        if x[0] < -0.9:
            time.sleep(12)
        return float(x[0])

    box = ig.BlackBox(hang, executor=client.get_executor(), timeout=6)
    y = box(X)
    assert [member.state for member in box.last] == ["timed out"] + ["ok"] * 11
    assert torch.equal(y[1:], X[1:, 0])


@pytest.mark.slow
def test_commands_and_options_reach_the_workers(client: Any):
    address, pid = next(iter(client.run(os.getpid).items()))
    pinned = {"executor": client.get_executor(), "submit_kwargs": {"workers": [address]}}
    pids = ig.BlackBox(lambda x: float(os.getpid()), **pinned)(X.double())
    assert pids.tolist() == [float(pid)] * 12
    assert torch.equal(ig.BlackBox(ig.Command("cp {input} {output}"), **pinned)(X), X)
