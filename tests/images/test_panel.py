"""The pictures of a result: which files there are, and that what they show is the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from invguide.images.panel import View, _round_up, to_pixels, write_pictures
from invguide.images.reading import Picture, read_picture
from invguide.result import Result


def result_of(samples: Tensor, y: Tensor | None = None, lost: int = 0) -> Result:
    """A result with these samples (B, S, ...), the last `lost` of each dropped."""
    b, s = samples.shape[:2]
    status = [["ok"] * (s - lost) + ["dropped: why"] * lost for _ in range(b)]
    if lost:
        samples = samples.clone()
        samples[:, s - lost :] = float("nan")
    residual = None if y is None else torch.zeros_like(y)
    return Result(
        samples, torch.ones(b, s), torch.zeros(b, s), status, 7.0, 1.5, {}, y, residual=residual
    )


def find(panel: np.ndarray, tile: np.ndarray) -> tuple[int, int] | None:
    """Where the tile lies in the panel, pixel for pixel."""
    height, width = tile.shape[:2]
    corner = (panel[: 1 - height or None, : 1 - width or None] == tile[0, 0]).all(-1)
    for row, column in np.argwhere(corner):
        if np.array_equal(panel[row : row + height, column : column + width], tile):
            return int(row), int(column)
    return None


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_files_of_one_and_of_several_samples(tmp_path: Path):
    for count, expected in (
        (1, {"restored.png", "panel.png"}),
        (3, {f"restored-{i}.png" for i in (1, 2, 3)} | {"mean.png", "std.png", "panel.png"}),
    ):
        folder = tmp_path / str(count)
        folder.mkdir()
        samples = torch.rand(1, count, 3, 24, 20)
        written = write_pictures(result_of(samples), folder)
        assert names(folder) == expected
        assert {p.name for p in written} == expected
        last = read_picture(folder / f"restored{f'-{count}' if count > 1 else ''}.png")
        assert (last.values - samples[0, -1]).abs().max() <= 0.5 / 255 + 1e-6
    mean = read_picture(tmp_path / "3" / "mean.png").values
    assert (mean - samples.mean(1)).abs().max() <= 0.5 / 255 + 1e-6


def test_several_measurements_and_lost_samples(tmp_path: Path):
    write_pictures(result_of(torch.rand(2, 3, 1, 16, 16), lost=1), tmp_path)
    each = {"restored-1.png", "restored-2.png", "mean.png", "std.png", "panel.png"}
    assert names(tmp_path) == {f"{b}/{name}" for b in (0, 1) for name in each}
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_pictures(result_of(torch.rand(1, 2, 1, 16, 16), lost=2), empty) == []


@pytest.mark.parametrize(
    "samples",
    [
        torch.rand(1, 2, 46, 64),
        torch.rand(1, 2, 4, 16, 16),
        9 * torch.randn(1, 2, 1, 16, 16),
        torch.rand(1, 2, 1, 16, 16, dtype=torch.complex64),
    ],
    ids=["not an image", "four channels", "a field, not in [0, 1]", "complex"],
)
def test_what_is_no_image_gets_no_picture(tmp_path: Path, samples: Tensor):
    assert write_pictures(result_of(samples), tmp_path) == []
    assert names(tmp_path) == set()


def test_kind_of_the_input_is_kept(tmp_path: Path):
    alpha = np.full((8, 8), 40000, np.uint16)
    like = Picture(torch.zeros(1, 3, 8, 8), alpha, 16)
    write_pictures(result_of(torch.rand(1, 1, 3, 16, 16)), tmp_path, like=[like])
    back = read_picture(tmp_path / "restored.png")
    assert (back.bits, back.size) == (16, (16, 16))
    assert back.alpha is not None
    assert (back.alpha == 40000).all()


@pytest.mark.parametrize("size", [(32, 48), (96, 64), (200, 300)])
@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_panel_shows_the_pixels(count: int, truth: bool, size: tuple[int, int]):
    samples = torch.rand(count, 3, *size)
    y = torch.rand(3, *size)
    view = View(
        samples, y, y - 0.5, y if truth else None, sigma_y=0.1, title="t", facts=("a", "b")
    )
    panel = np.asarray(view.panel())
    factor = view.tile[0] // size[1]
    assert view.tile == (size[1] * factor, size[0] * factor)
    shown = [y, *samples[: min(count, 3 if truth else 4)], samples.mean(0)]
    places = [
        find(panel, np.kron(to_pixels(x), np.ones((factor, factor, 1), np.uint8))) for x in shown
    ]
    assert None not in places
    assert len(set(places)) == (len(places) - 1 if count == 1 else len(places))
    rows = view.rows()
    cells = len(rows) * max(map(len, rows))
    assert cells - sum(map(len, rows)) <= (1 if count == 2 and truth else 0), "wasted cells"
    assert max(panel.shape[:2]) < 2800


def test_large_pictures_are_shrunk_and_small_ones_are_not_blurred():
    view = View(torch.rand(1, 3, 900, 1600))
    assert view.tile[0] <= 520
    assert view.tile[0] / view.tile[1] == pytest.approx(1600 / 900, rel=0.01)
    view = View(torch.rand(1, 3, 1600, 900))
    assert view.tile[1] <= 640
    low = View(torch.rand(1, 3, 64, 64), y=torch.rand(3, 16, 16))
    tile = np.asarray(low.rows()[0][0].image)
    assert len(np.unique(tile.reshape(-1, 3), axis=0)) <= 256  # no new colours


def test_uncertainty_has_the_stated_scale(tmp_path: Path):
    samples = torch.full((4, 3, 40, 40), 0.5)
    samples[::2, :, 10:30, 10:30] += 0.1
    samples[1::2, :, 10:30, 10:30] -= 0.1
    std = samples.std(0)[0, 20, 20].item()
    tile = View(samples).rows()[0][1]
    assert tile.bar is not None
    top = float(tile.bar[2])
    assert std <= top <= 1.5 * std
    factor = tile.image.width // 40
    image = np.asarray(tile.image)[::factor, ::factor]
    expected = np.array(colormaps["magma"](std / top)[:3]) * 255
    assert np.abs(image[20, 20] - expected).max() <= 1
    assert image[0, 0].max() <= 4  # magma begins almost black
    write_pictures(result_of(samples[None]), tmp_path)
    figure = np.asarray(Image.open(tmp_path / "std.png"))
    assert find(figure, np.asarray(tile.image)) is not None


def test_equal_samples_are_called_a_point_estimate():
    tile = View(torch.full((3, 1, 32, 32), 0.3)).rows()[0][1]
    assert tile.caption == "zero: a point estimate"
    assert tile.bar is None


def test_residual_is_in_units_of_sigma():
    residual = torch.zeros(1, 32, 32)
    residual[0, :16] = 0.3
    residual[0, 16:] = -0.3
    tile = View(torch.rand(1, 1, 32, 32), torch.rand(1, 32, 32), residual, sigma_y=0.1).rows()[0][
        2
    ]
    image = np.asarray(tile.image).astype(int)
    assert tile.bar == ("RdBu_r", "−3 σ", "+3 σ")
    assert image[0, 0, 0] > image[0, 0, 2] + 50  # red: y above A x
    assert image[-1, -1, 2] > image[-1, -1, 0] + 50
    unscaled = View(torch.rand(1, 1, 32, 32), torch.rand(1, 32, 32), residual).rows()[0][2]
    assert unscaled.bar is not None
    assert unscaled.bar[1] == "−3 rms"


def test_missing_pixels_are_pale_and_scores_are_right():
    y = torch.zeros(3, 32, 32)
    known = torch.ones(1, 32, 32)
    known[:, :8] = 0
    truth = torch.full((3, 32, 32), 0.5)
    samples = truth[None] + 0.1
    rows = View(samples, y, truth=truth, known=known).rows()
    image = np.asarray(rows[0][0].image)
    assert image[0, 0].min() > 200
    assert image[-1, -1].max() == 0
    assert rows[0][1].caption == "20.0 dB"
    assert [tile.name for tile in rows[0]] == ["Measurement", "Restored", "Original"]


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0101, 0.015), (0.3, 0.3), (0.07, 0.08), (9.5, 10), (0, 1)]
)
def test_round_numbers(value: float, expected: float):
    assert _round_up(value) == pytest.approx(expected)


def test_result_saves_pictures_too(tmp_path: Path):
    result = result_of(torch.rand(1, 2, 3, 32, 32), torch.rand(1, 3, 32, 32))
    result.manifest["chi2"] = [float("nan"), 1.0]
    result.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"chi2": [None, 1.0]}
    assert {"panel.png", "restored-2.png", "manifest.json", "samples.npy"} <= names(tmp_path)
