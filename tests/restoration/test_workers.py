"""A folder on many workers: the pictures of one process, and what a dead worker costs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from invguide.blackbox.ledger import Ledger
from invguide.blackbox.pool import evaluate
from invguide.blackbox.workers import Processes, pack
from invguide.cli.terminal import app
from invguide.errors import InputError
from invguide.restoration import workers as farm
from invguide.restoration.demo import PHOTO
from invguide.restoration.settings import Settings
from invguide.restoration.workers import Restorer, environments

QUICK = ("--task", "denoise", "--prior", "natural-tiny", "--steps", "3", "--sigma-y", "0.05")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout + result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four crops of the cat and something that is no picture."""
    pictures = tmp_path / "in"
    pictures.mkdir()
    for i, name in enumerate("abcd"):
        place = (40 + 8 * i, 40, 136 + 8 * i, 120)
        Image.open(PHOTO).crop(place).resize((48, 40)).save(pictures / f"{name}.png")
    (pictures / "x.png").write_text("no picture")
    return pictures


def deadly(restorer: Restorer, marks: Path) -> Restorer:
    """One whose worker dies at b.png, once, and at c.png, always; local, so that it is pickled by value."""

    class Deadly(Restorer):
        def __call__(self, paths: np.ndarray) -> np.ndarray:
            name = Path(str(paths[0])).name
            first = not list(marks.glob(f"{name}-*"))
            (marks / f"{name}-{time.time_ns()}").touch()
            if name == "c.png" or (name == "b.png" and first):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(paths)

    return Deadly(restorer.settings, restorer.arrays, restorer.overwrite)


@pytest.mark.slow
def test_a_dead_worker_costs_its_picture_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever dies once is restored after all, as by one process; whoever dies twice is reported."""
    one, many, marks = tmp_path / "one", tmp_path / "many", tmp_path / "marks"
    marks.mkdir()
    run("restore", folder, *QUICK, "--arrays", "--out", one, code=1)
    command = ("restore", folder, *QUICK, "--arrays", "--out", many, "--workers")
    with monkeypatch.context() as patch:
        patch.setattr(farm, "pack", lambda restorer, *more: pack(deadly(restorer, marks), *more))
        printed = run(*command, 2, code=1)
    assert printed.splitlines()[-1].startswith("error: 2 of 5 pictures failed (see above)")
    assert "c.png: failed: its worker died, twice" in printed
    assert "x.png is not a picture" in printed
    calls = [len(list(marks.glob(f"{name}.png-*"))) for name in "abcdx"]
    assert calls == [1, 2, 2, 1, 1]
    outcomes = [line.split()[1] for line in printed.splitlines() if line[1:6] == ".png "]
    assert outcomes == ["restored", "restored", "FAILED", "restored", "FAILED"]

    (folder / "x.png").unlink()
    printed = run(*command, 1)
    assert printed.count("done already") == 6  # lines and rows of the table
    for name in "abcd":
        assert_same(one / name, many / name)


def assert_same(one: Path, many: Path) -> None:
    """To rounding: the processes of workers have other numbers of threads, which add up in another order.

    Three steps of a float32 network lose 1e-5 of [0, 1] at most; another noise, prior or picture makes 1e-2.
    """
    samples = [np.load(out / "samples.npy") for out in (one, many)]
    np.testing.assert_allclose(*samples, rtol=0, atol=1e-4)
    pixels = [np.asarray(Image.open(out / "restored.png")).astype(int) for out in (one, many)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    told = [json.loads((out / "manifest.json").read_text()) for out in (one, many)]
    for manifest in told:
        manifest.pop("seconds")
    numbers: list[list[float]] = [[], []]
    words = [
        json.dumps(
            json.loads(
                json.dumps(manifest), parse_float=lambda x, kept=kept: kept.append(float(x))
            )
        )
        for manifest, kept in zip(told, numbers, strict=True)
    ]
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


@pytest.mark.slow
def test_dask_gives_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    (folder / "x.png").unlink()
    one, many = tmp_path / "one", tmp_path / "many"
    run("restore", folder, *QUICK, "--arrays", "--out", one)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, dashboard_address=None, silence_logs=50
    ) as cluster:
        scheduler = cluster.scheduler_address
        printed = run(
            "restore", folder, *QUICK, "--arrays", "--out", many, "--scheduler", scheduler
        )
    assert "[4 of 4]" in printed
    for name in "abcd":
        assert_same(one / name, many / name)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "--workers is 0" in run("restore", folder, *QUICK, *out, "--workers", 0, code=2)
    picture = folder / "a.png"
    assert "are for a folder" in run("restore", picture, *QUICK, *out, "--workers", 2, code=2)
    both = ("--workers", 2, "--scheduler", "tcp://localhost:1")
    assert "give one" in run("restore", folder, *QUICK, *out, *both, code=2)
    pytest.importorskip("distributed")
    for address in ("nowhere", "bogus://1"):
        printed = run("restore", folder, *QUICK, *out, "--scheduler", address, code=2)
        assert f"--scheduler '{address}' cannot be reached" in printed


def test_a_worker_that_does_not_see_the_files_stops_the_run(tmp_path: Path) -> None:
    restorer = Restorer(Settings("denoise"), False, False)
    restorer.base = str(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="under the same paths as here"):
        restorer(np.array(["a.png", "out"]))
    with pytest.raises(InputError, match="wrong everywhere"):
        farm._row(Path("a.png"), ("bad", None, "wrong everywhere", 0.0), "[1 of 1]", print)


# ---- processors and GPUs


def test_environments_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the user's own, which workers inherit
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    assert environments(4, "auto") == [threads]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(4, "auto")] == ["0", "1"]
    assert environments(4, "cuda:1") == [threads]  # as the user says
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(4, "cuda")] == ["3", "GPU-7"]
    assert environments(100, "cpu")[0]["OMP_NUM_THREADS"] == "1"


def test_gpus_are_dealt_out_and_that_of_a_dead_worker_is_free_again(tmp_path: Path) -> None:
    def gpu(x: np.ndarray) -> np.ndarray:  # local, so that it is pickled by value
        if x < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / f"{int(x)}.{os.getpid()}").touch()
        while len(list(tmp_path.glob(f"{int(x)}.*"))) < 3:  # nobody takes two turns of a round
            time.sleep(0.01)
        return np.array([int(os.environ["CUDA_VISIBLE_DEVICES"]), os.getpid()])

    dealt = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(2)]
    pool = Processes(3, pack(gpu, ["array"], "gpu"), dealt)

    def call(*inputs: float) -> list[Any]:
        replies: dict[int, Any] = {}
        arrays = [np.array(x) for x in inputs]
        evaluate(pool, arrays, lambda i, reply, attempts: replies.update({i: reply}), Ledger())
        return [replies[i] for i in range(len(inputs))]

    def gpus(turn: float) -> list[int]:
        return sorted(g for g, _ in {tuple(reply[1].tolist()) for reply in call(*[turn] * 3)})

    try:
        assert gpus(1) == [0, 0, 1]
        assert call(-1.0)[0][0] == "lost worker"
        living = [int(worker.environment["CUDA_VISIBLE_DEVICES"]) for worker in pool.idle]
        assert len(living) == 2
        assert gpus(2) == sorted([*living, min((0, 1), key=living.count)])
    finally:
        pool.close()
