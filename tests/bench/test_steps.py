"""`bench steps`, and the tasks of `bench restore` that are named to run, at toy size: figures against runs by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import invguide as ig
from invguide import bench
from invguide.bench.protocol import Protocol
from invguide.diagnostics.metrics import psnr
from invguide.errors import InputError
from invguide.solvers import HQS

ROOT = Path(__file__).parents[2]
COMMON = {"size": 32, "photos": 2, "prior": "natural-tiny", "progress": False}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two corners of a photograph, 32 pixels."""
    photo = np.asarray(Image.open(ROOT / "invguide" / "data" / "chelsea.png").convert("RGB"))
    np.savez(tmp_path / "photos.npz", img_32=np.stack([photo[:32, :32], photo[-32:, -32:]]))
    return tmp_path / "photos.npz"


def by_hand(data: Path, task: str, steps: int, **settings: float) -> float:
    """Mean PSNR of HQS by `solve`, of the measurements of the protocol."""
    protocol, values = Protocol(data, 32, 2), []
    for photo in range(2):
        likelihood = protocol.likelihood(task, photo)
        solver = HQS(num_steps=steps, **settings)
        found = ig.solve(
            likelihood.y, likelihood.operator, "natural-tiny", sigma_y=0.025, solver=solver,
            shape=(3, 32, 32), seed=photo, progress=False,
        )  # fmt: skip
        values.append(float(psnr(found.mean, protocol.truth[photo, None])))
    return sum(values) / 2


def test_steps_table(data: Path):
    tasks = ("SR x4", "motion deblur")
    table = bench.steps(data, **COMMON, tasks=tasks, numbers=(2, 5))
    assert table.head == ("task", "degraded", "2", "5", "auto", "auto less best")
    assert [row[0] for row in table.rows] == list(tasks)
    chosen = {"SR x4": 8, "motion deblur": 30}  # the policy's: see test_policy
    for row in table.rows:
        quality = table.figures[row[0]]
        assert set(quality) == {2, 5, chosen[row[0]]}
        assert int(row[4]) == chosen[row[0]]
        assert quality[5] == pytest.approx(by_hand(data, row[0], 5), abs=1e-4)
        lost = quality[chosen[row[0]]] - max(quality.values())
        assert row[5] == f"{lost:+.2f}"
        assert lost <= 0


def test_a_clipped_photo_is_compared_with_its_exposure_undone(data: Path):
    table = bench.restore(data, **COMMON, tasks=("HDR",), solvers=("auto",))
    assert [row[0] for row in table.rows] == ["degraded", "auto: HQS"]  # no TV: not linear
    protocol = Protocol(data, 32, 2)
    halves = [psnr(protocol.likelihood("HDR", k).y / 2, protocol.truth[k, None]) for k in (0, 1)]
    before = table.figures["degraded"]["HDR"]["psnr"]
    assert before == pytest.approx(float(sum(halves)) / 2, abs=1e-4)
    answer = table.figures["auto: HQS"]["HDR"]["psnr"]
    assert answer == pytest.approx(by_hand(data, "HDR", 30, lam=1.0), abs=1e-4)


def test_steps_refuses(data: Path):
    with pytest.raises(InputError, match="numbers of steps"):
        bench.steps(data, **COMMON, numbers=(0, 4))
    with pytest.raises(InputError, match="auto takes PosteriorMean"):
        bench.steps(data, **COMMON, tasks=("denoise",))
    with pytest.raises(InputError, match="unknown task"):
        bench.steps(data, **COMMON, tasks=("debulr",))
