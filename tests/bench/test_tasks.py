"""`bench tasks` runs the command itself, in this checkout and in another, with a user's environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from invguide.bench import commands, tasks
from invguide.errors import InputError, RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    photo = Image.open(ROOT / "invguide" / "data" / "chelsea.png").convert("RGB")
    small = np.asarray(photo.resize((32, 32)))
    np.savez(tmp_path / "photos.npz", img_32=small[None])
    return tmp_path / "photos.npz"


@pytest.mark.slow
def test_the_command_is_run_in_both_trees(data: Path) -> None:
    table = tasks(data, size=32, photos=1, tasks=["denoise"], against=ROOT, progress=False)
    there, here = table.figures["runs"]
    assert (there["tree"], here["tree"]) == ("against", "here")
    assert there["calls"] == here["calls"] >= 1  # the same code
    assert there["psnr"] == pytest.approx(here["psnr"], abs=0.01)
    noisy = float(table.rows[0][table.head.index("dB in")])
    assert noisy == pytest.approx(20, abs=0.5)  # a noise of 0.1
    assert here["psnr"] > noisy
    assert here["cpu"] > 0
    assert table.rows[-1][0] == "sum"


def test_the_environment_is_that_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    environment = commands._environment(ROOT)
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & set(environment)
    assert environment["PYTHONPATH"] == str(ROOT)


def test_busy_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = commands.subprocess.Popen
    monkeypatch.setattr(
        commands.subprocess, "Popen", lambda *a: started.append(real(*a)) or started[-1]
    )
    with commands._company(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
    assert len(started) == 2


def test_bad_input(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown task 'denoize'"):
        tasks(data, size=32, tasks=["denoize"])
    with pytest.raises(InputError, match="is no checkout of invguide"):
        tasks(data, size=32, against=tmp_path)
    with pytest.raises(RunError, match="no such file or folder"):
        commands._command(ROOT, ["restore", str(tmp_path / "none"), "--task", "denoise"])
