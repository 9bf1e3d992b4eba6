"""Files of runs: full, read-only and forbidden places, what killed runs leave, and one run at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import invguide as ig
from invguide import driver
from invguide.errors import CheckpointError
from invguide.likelihood import Likelihood
from invguide.operators import Identity
from invguide.problem.problem import Problem
from invguide.solvers import DPS
from invguide.system import run_file
from invguide.system.run_file import only_run, said, sweep, write_whole


def problem() -> Problem:
    prior = ig.priors.Gaussian(torch.zeros(4).double(), torch.eye(4).double())
    return Problem(prior, Likelihood(Identity(), torch.ones(1, 4).double(), 0.5))


def run(path: Path, part: Problem | None = None, **options: Any) -> ig.Result:
    settings = {"progress": False, "checkpoint": path, "checkpoint_every": 1, **options}
    return driver.run(DPS(num_steps=4), part or problem(), 1, **settings)


def deaf(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem whose network must not be called."""
    part = problem()
    monkeypatch.setattr(part.prior, "denoise", None)
    return part


# ---- real file systems


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("may not mount here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_found_before_the_first_network_call(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "big").write_bytes(bytes(60_000))
    with pytest.raises(
        CheckpointError, match=r"MB .* cannot be written: the disk is full; free some space"
    ):
        run(small_disk / "c.pt", deaf(monkeypatch))
    assert [path.name for path in small_disk.iterdir()] == ["big"]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(small_disk: Path) -> None:
    path, big = small_disk / "c.pt", small_disk / "big"
    whole = run(path.with_name("whole.pt")).samples

    def fill(report: driver.StepReport) -> None:
        if report.step == 2:
            with pytest.raises(OSError, match="No space"):
                big.write_bytes(bytes(2**20))

    with pytest.raises(CheckpointError, match="the disk is full"):
        run(path, callbacks=[fill])
    assert sorted(p.name for p in small_disk.iterdir()) == ["big", "c.pt", "whole.pt"]
    big.unlink()
    steps: list[int] = []
    again = run(path, callbacks=[lambda report: steps.append(report.step)])
    assert steps == [2, 3]  # the checkpoint after step 1 was the last
    assert torch.equal(again.samples, whole)


def test_a_read_only_file_system_is_found_before_the_first_network_call(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        CheckpointError, match=r"c\.pt cannot be written: the file system is read-only"
    ):
        run(small_disk / "c.pt", deaf(monkeypatch))


# ---- the same by what the system would say


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("when", [0, 3])
def test_errors_of_the_system_are_sentences(
    code: int, text: str, when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the trial before the run, and in the middle: the last checkpoint stays, nothing else does."""
    path, count, real = tmp_path / "c.pt", 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == when + 1:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(run_file.os, "fsync", fsync)
    part = problem() if when else deaf(monkeypatch)
    with pytest.raises(CheckpointError, match=rf"c\.pt .*cannot be written: {text}.*; "):
        run(path, part)
    assert [p.name for p in tmp_path.iterdir()] == (["c.pt"] if when else [])
    if when:
        monkeypatch.undo()
        assert torch.equal(run(path).samples, run(tmp_path / "other.pt").samples)


def test_no_permission_to_read_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "c.pt")

    def forbidden(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(
        CheckpointError, match=r"cannot be read: no permission .*change the permissions"
    ) as error:
        run(tmp_path / "c.pt")
    assert "truncated" not in str(error.value)


def test_odd_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = deaf(monkeypatch)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, text in (
        ("folder", "it is a folder"),
        ("file/c.pt", "a part of the path is a file"),
        ("n" * 300, "the name is too long"),
    ):
        with pytest.raises(CheckpointError, match=text):
            run(tmp_path / name, part)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_without_permission(tmp_path: Path) -> None:
    error = said(PermissionError(errno.EACCES, "no"), tmp_path / "c.pt", "read")
    assert "c.pt cannot be read: no permission" in str(error)


# ---- temporary files, and one run at a time


def test_names_of_temporary_files_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    names = {run_file._temporary(path).name for _ in range(1000)}
    assert len(names) == 1000
    failures: list[BaseException] = []

    def write(i: int) -> None:
        try:
            for _ in range(50):
                write_whole(path, bytes([i]) * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures
    assert len(set(path.read_bytes())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_sweeping_takes_its_own_only(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    own = [run_file._temporary(path) for _ in range(3)]
    other = [
        tmp_path / name
        for name in ("c.pt.tmp", "c.pt.notes.tmp", "dc.pt.1-00112233aabb.tmp", "c.pt")
    ]
    for p in (*own, *other):
        p.touch()
    sweep(path)
    assert set(tmp_path.iterdir()) == set(other)


HOLDER = """
import os, signal, sys, threading
from pathlib import Path
from invguide.system.run_file import only_run, _temporary
path = Path(sys.argv[1])
with only_run(path):
    _temporary(path).write_bytes(b"half")
    if "fork" in sys.argv and os.fork() == 0:
        threading.Event().wait()
    print(os.getpid(), flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_a_second_run_is_refused_and_a_killed_one_lets_go(mode: str, tmp_path: Path) -> None:
    """Also where a child of the killed run lives on."""
    path = tmp_path / "c.pt"
    command = [sys.executable, "-c", HOLDER, str(path), mode]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        assert holder.stdout is not None
        process = int(holder.stdout.readline())
        with pytest.raises(
            CheckpointError, match=rf"in use by another run of process {process} on .*; wait until"
        ):
            run(path)
        assert not path.exists()
        os.kill(process, signal.SIGKILL)
        holder.wait()
        run(path)
        if mode == "fork":
            os.killpg(process, signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_second_run_of_the_same_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    seen: list[str] = []

    def nested(report: driver.StepReport) -> None:
        for same in (path, link, tmp_path / "." / "c.pt"):
            with pytest.raises(CheckpointError, match="another run of this process"):
                run(same)
            seen.append(same.name)

    run(path, callbacks=[nested])
    assert len(seen) == 12
    run(path)  # it has let go
    with only_run(tmp_path / "other.pt"):
        run(path)


def test_the_lock_is_taken_by_one_of_many(tmp_path: Path) -> None:
    """Locked files are removed while others open them: whoever has the old one must look again."""
    path = tmp_path / "c.pt"
    code = (
        "import sys\nfrom pathlib import Path\nfrom invguide.system.run_file import only_run\n"
        "from invguide.errors import CheckpointError\npath = Path(sys.argv[1])\nlost = 0\n"
        "for i in range(300):\n    try:\n        with only_run(path):\n"
        "            with open(path.with_name('inside'), 'xb'): pass\n"
        "            path.with_name('inside').unlink()\n"
        "    except CheckpointError: lost += 1\nprint(lost)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for process in pair:
        process.communicate()
        assert process.returncode == 0  # else two were inside at once: the file was there
    assert not list(tmp_path.iterdir())


def test_the_cache_of_calls_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ig.BlackBox(abs, cache=tmp_path / "calls")
    box(torch.ones(1, 2))
    (kept,) = (tmp_path / "calls").rglob("*.npy")
    left = run_file._temporary(kept)
    left.touch()
    ig.BlackBox(abs, cache=tmp_path / "calls")
    assert left.exists()  # another process may be writing it
    os.utime(left, (0, 0))
    ig.BlackBox(abs, cache=tmp_path / "calls")
    assert not left.exists()

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_file.os, "replace", full)
    with pytest.raises(
        CheckpointError, match=r"the result of a call .* cannot be written: the disk is full"
    ):
        box(torch.zeros(1, 2))
    assert [p for p in (tmp_path / "calls").rglob("*") if p.is_file()] == [kept]
