"""Commands and workers that leave pipes, background processes and detached sessions; answers of two kinds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import invguide as ig
from invguide.blackbox.command import read
from invguide.errors import BlackBoxError, InputError

linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
X = torch.tensor([[1.0, 2.0]])
LIMIT = 60.0


def living(mark: str) -> list[int]:
    """Processes that have this word among theirs."""
    found = []
    for name in os.listdir("/proc"):
        try:
            words = (
                Path("/proc", name, "cmdline").read_bytes().split(b"\0") if name.isdigit() else []
            )
        except OSError:
            continue
        if mark.encode() in words:
            found.append(int(name))
    return found


# ---- pipes


@pytest.mark.parametrize("format", ["npy", "npz", "json", "txt"])
def test_an_output_that_is_a_pipe_is_refused(format: str, tmp_path: Path) -> None:
    """To open it would hang for ever; the timeout of a call has ended with its process."""
    box = ig.BlackBox(
        ig.Command("sh -c 'mkfifo $1' x {output} {input}", format), timeout=LIMIT, retries=0
    )
    with pytest.raises(
        BlackBoxError, match=r"no \w+ file of numbers .*it is a pipe, a device or a folder"
    ):
        box(X)
    os.mkfifo(tmp_path / f"y.{format}")
    with pytest.raises(ValueError, match="it is a pipe"):
        read(tmp_path / f"y.{format}")


@pytest.mark.parametrize("made", ["ln -s /dev/zero $1", "mkdir $1", "ln -s pipe $1; mkfifo pipe"])
def test_other_outputs_that_are_no_files(made: str) -> None:
    box = ig.BlackBox(
        ig.Command(f"sh -c '{made}' x {{output}} {{input}}"), timeout=LIMIT, retries=0
    )
    with pytest.raises(BlackBoxError, match="it is a pipe, a device or a folder"):
        box(X)


def test_messages_that_become_a_pipe() -> None:
    """The program replaces the file of its own messages."""
    script = "echo sorry >&2; rm stderr.txt; mkfifo stderr.txt; exit 3"
    box = ig.BlackBox(
        ig.Command(f"sh -c '{script}' {{input}} {{output}}"), timeout=LIMIT, retries=0
    )
    with pytest.raises(BlackBoxError, match="exit code 3; stderr ends: sorry"):
        box(X)


# ---- what is left behind

DETACHED = {
    "background": "{sleep} &",
    "session": "setsid {sleep} &",
    "session and new environment": "env -i setsid {sleep} &",
    "session elsewhere": "cd /; setsid {sleep} &",
    "twice": "setsid sh -c '\\''setsid {sleep} & setsid {sleep}'\\'' &",
}


@pytest.mark.slow
@linux
@pytest.mark.parametrize("how", DETACHED)
@pytest.mark.parametrize("end", ["cp $1 $2", "exit 3", "sleep 999"])
def test_what_a_command_has_started_ends_with_it(how: str, end: str, tmp_path: Path) -> None:
    """After success, failure and timeout."""
    mark = f"1000.{os.getpid()}"
    line = DETACHED[how].format(sleep=f"sleep {mark}")
    box = ig.BlackBox(
        ig.Command(
            f"sh -c 'place=$PWD; {line} cd \"$place\"; touch {tmp_path}/begun; {end}' x {{input}} {{output}}"
        ),
        timeout=LIMIT if end != "sleep 999" else 1.0,
        retries=0,
    )
    if end == "cp $1 $2":
        assert torch.equal(box(X), X)
    else:
        with pytest.raises(BlackBoxError, match=r"exit code 3|no answer after 1 s"):
            box(X)
    assert (tmp_path / "begun").exists()
    assert living(mark) == []


@linux
def test_a_neighbour_is_left_alone() -> None:
    """The same program, started by somebody else."""
    mark = f"1001.{os.getpid()}"
    with subprocess.Popen(["sleep", mark]) as other:
        box = ig.BlackBox(ig.Command(f"sh -c 'sleep {mark} & cp $1 $2' x {{input}} {{output}}"))
        assert torch.equal(box(X), X)
        assert living(mark) == [other.pid]
        other.kill()


def starts_and_hangs(mark: str) -> Callable[[np.ndarray], np.ndarray]:
    def function(x: np.ndarray) -> np.ndarray:
        import subprocess
        import time

        subprocess.Popen(["setsid", "sleep", mark], start_new_session=True)
        if x[0] < 0:
            time.sleep(1000)
        if x[0] > 5:
            import os

            os._exit(3)
        return x

    return function


@linux
@pytest.mark.parametrize("first", [-1.0, 1.0, 9.0], ids=["hangs", "returns", "dies"])
def test_what_a_worker_has_started_ends_with_it(first: float) -> None:
    mark = f"1002.{os.getpid()}"
    box = ig.BlackBox(
        starts_and_hangs(mark), workers=1, timeout=LIMIT if first > 0 else 2.0, retries=0
    )
    x = torch.tensor([[first, 0.0], [1.0, 0.0]])
    y = box(x)
    assert bool(y[0].isnan().all()) is (first != 1.0)
    assert torch.equal(y[1], x[1])
    box.close()
    assert living(mark) == []


# ---- complex and real answers


@pytest.mark.parametrize("vectorised", [False, True])
def test_one_complex_row_among_real_ones_is_refused(vectorised: bool) -> None:
    def function(x: np.ndarray) -> np.ndarray:
        rows = x if vectorised else x[None]
        y = rows * (1j if (rows[:, 0] > 2).any() else 1)
        return y if vectorised else y[0]

    x = (
        torch.arange(100.0).reshape(50, 2)
        if vectorised
        else torch.tensor([[1.0, 0], [1, 0], [3, 0], [1, 0]])
    )
    x = x - 60 if vectorised else x  # the second chunk is complex
    box = ig.BlackBox(function, vectorised=vectorised)
    with pytest.raises(
        InputError, match=r"returned complex numbers for sample \d+ and real ones for others"
    ):
        box(x)


def test_kinds_are_remembered_between_batches_and_failures_have_none() -> None:
    def function(x: np.ndarray) -> np.ndarray:
        return np.full(1, np.nan) if x[0] < 0 else np.full(1, 1j) if x[0] > 1 else np.ones(1)

    box = ig.BlackBox(function)
    y = box(torch.tensor([[-1.0], [2.0], [2.0]]))  # a failure is not yet a kind
    assert y.is_complex()
    assert bool(y[0].isnan())
    with pytest.raises(InputError, match="returned real numbers for sample 0 and complex ones"):
        box(torch.tensor([[0.0]]))
