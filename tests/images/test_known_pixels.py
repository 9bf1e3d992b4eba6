"""Known pixels stay bit for bit, and holes meet them without an edge: against dense algebra and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from invguide.images.known_pixels import put_back, stay_by_default
from invguide.images.reading import read_picture
from invguide.images.writing import encode_png
from invguide.numerics import harmonic
from invguide.numerics.harmonic import harmonic_extension
from invguide.restoration.demo import PHOTO
from tiny import run

QUICK = ("--prior", "natural-tiny", "--steps", "2", "--quiet", "--overwrite")


def laplacian(height: int, width: int) -> np.ndarray:
    """The graph Laplacian of a grid, dense, edge by edge."""
    matrix = np.zeros((height * width,) * 2)
    index = np.arange(height * width).reshape(height, width)
    for a, b in (
        *zip(index[1:].flat, index[:-1].flat, strict=True),
        *zip(index[:, 1:].flat, index[:, :-1].flat, strict=True),
    ):
        matrix[a, a] += 1
        matrix[b, b] += 1
        matrix[a, b] -= 1
        matrix[b, a] -= 1
    return matrix


def holes(kind: str, height: int, width: int) -> Tensor:
    """Where pixels are known, (H, W)."""
    known = torch.ones(height, width, dtype=torch.bool)
    if kind == "box":
        known[2:9, 3:-2] = False
    elif kind == "corner":
        known[:6, :7] = False
    elif kind == "all but one":
        known[:] = False
        known[height // 3, width // 2] = True
    elif kind == "lines":
        known[::3] = False
    else:
        known = torch.rand(height, width) < 0.3
    return known


@pytest.mark.parametrize("size", [(11, 14), (16, 16), (13, 7)])
@pytest.mark.parametrize("kind", ["box", "corner", "all but one", "lines", "scattered"])
def test_extension_is_the_dense_solution(kind: str, size: tuple[int, int]):
    known = holes(kind, *size)
    values = torch.rand(2, 3, *size, dtype=torch.float64)
    found = harmonic_extension(values, known[None], 1e-13)
    matrix, k = laplacian(*size), known.flatten().numpy()
    flat = values.flatten(2).numpy()
    inside = np.linalg.solve(matrix[~k][:, ~k], -matrix[~k][:, k] @ flat[..., k].reshape(6, -1).T)
    assert np.abs(found.flatten(2).numpy()[..., ~k].reshape(6, -1).T - inside).max() < 1e-11
    assert torch.equal(found[..., known], values[..., known])


def test_extension_of_a_harmonic_polynomial_is_itself():
    """x^2 - y^2 solves the discrete equation too; what the hole held, NaN included, does not matter."""
    y, x = torch.meshgrid(*[torch.arange(n).double() / 50 for n in (150, 131)], indexing="ij")
    truth = (x * x - y * y)[None, None]
    known = torch.ones(150, 131, dtype=torch.bool)
    known[10:140, 5:60] = False
    known[40:90, 70:120] = False
    broken = torch.where(known, truth, float("nan"))
    assert float((harmonic_extension(broken, known, 1e-13) - truth).abs().max()) < 1e-10
    assert harmonic_extension(truth, torch.ones_like(known)) is truth


@pytest.mark.parametrize("size", [60, 250, 601])
def test_no_more_work_per_pixel_for_larger_holes(size: int, monkeypatch: pytest.MonkeyPatch):
    """Plain conjugate gradients take over 1000 iterations for the largest; a multigrid cycle shrinks errors alike."""
    cycles = []
    cycle = harmonic._cycle
    monkeypatch.setattr(harmonic, "_cycle", lambda g, k, r: cycles.append(k) or cycle(g, k, r))
    for known in (torch.rand(size, size) < 0.02, holes("all but one", size, size)):
        cycles.clear()
        found = harmonic_extension(torch.rand(1, 1, size, size, dtype=torch.float64), known, 1e-8)
        assert cycles.count(0) <= 25
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("kind", ["box", "corner", "scattered"])
def test_seam_is_poisson_editing(kind: str):
    """Inside, the result has the sample's Laplacian; at the rim, the measured values: as one dense system."""
    known = holes(kind, 12, 15)
    sample = torch.rand(1, 2, 3, 12, 15)
    values = torch.rand(1, 3, 12, 15)
    found = put_back(sample, values, known[None])
    assert found.shape == sample.shape
    assert torch.equal(found[..., known], values.expand(2, -1, -1, -1)[None][..., known])
    matrix, k = laplacian(12, 15), known.flatten().numpy()
    x = sample.double().flatten(3).numpy()[0].reshape(6, -1).T
    y = np.tile(values.double().flatten(2).numpy()[0], (2, 1)).T
    inside = np.linalg.solve(matrix[~k][:, ~k], (matrix @ x)[~k] - matrix[~k][:, k] @ y[k])
    got = found.flatten(3).numpy()[0].reshape(6, -1).T[~k]
    assert np.abs(got - inside).max() < 1e-4  # 1e-5 of the largest mismatch, float32


def test_a_wrong_brightness_leaves_no_edge():
    """A sample that is right up to a constant per channel is mended exactly."""
    truth = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    known = holes("box", 40, 40)[None]
    sample = truth + torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64).reshape(3, 1, 1)
    sample[..., 20, 20] += 0.3  # a detail of the sample survives where it is unknown
    found = put_back(sample[None], truth, known & (torch.arange(40) != 20))[0]
    detail = found - truth
    assert float(detail[..., 20, 20].mean()) > 0.2
    detail[..., 18:23, 18:23] = 0
    assert float(detail.abs().max()) < 0.05


def test_when_known_pixels_stay():
    assert stay_by_default(None, 8)
    assert stay_by_default(0.0, 8)
    assert stay_by_default(0.0019, 8)  # half of 1 / 255 is 0.00196
    assert not stay_by_default(0.002, 8)
    assert not stay_by_default(0.0019, 16)
    assert stay_by_default(7e-6, 16)
    assert stay_by_default(0.0, 32)
    assert not stay_by_default(1e-6, 32)


# ---- in files


def stored(path: Path) -> np.ndarray:
    """What a file of 8 or 16 bits holds, (H, W, C), colours without alpha."""
    picture = read_picture(path)
    scale = {8: 255, 16: 65535, 32: 1}[picture.bits]
    return (picture.values[0].double() * scale).numpy().transpose(1, 2, 0)


@pytest.fixture
def mask(tmp_path: Path) -> np.ndarray:
    """True where known; a box and scattered pixels are missing. Written as mask.png."""
    known = np.random.default_rng(1).random((40, 48)) < 0.8
    known[12:24, 14:30] = False
    Image.fromarray(known).save(tmp_path / "mask.png")
    return known


def picture(channels: int, bits: int) -> np.ndarray:
    """The cat, 40 x 48 pixels, every value of 16 bits in use."""
    cat = np.asarray(Image.open(PHOTO).convert("RGB").crop((40, 40, 136, 120)).resize((48, 40)))
    array = {1: cat[..., 1:2], 3: cat, 4: np.dstack([cat, np.full((40, 48), 90)])}[channels]
    if bits == 8:
        return array.astype(np.uint8)
    return (array.astype(np.uint16) * 256) + np.random.default_rng(0).integers(
        0, 256, array.shape
    ).astype(np.uint16)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_known_pixels_stay_in_the_written_file(
    tmp_path: Path, mask: np.ndarray, channels: int, bits: int
):
    array = picture(channels, bits)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    base = ("restore", tmp_path / "in.png", "--task", "inpaint", "--mask", tmp_path / "mask.png")
    run(*base, *QUICK, "--out", tmp_path / "out")
    back = stored(tmp_path / "out" / "restored.png")
    colours = array[..., :3]
    assert np.array_equal(back[mask].round(), colours[mask])
    assert (back[~mask].round() != colours[~mask]).any(-1).mean() > 0.5
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert facts["keep_known"] is True


def test_floating_point_stays_too(tmp_path: Path, mask: np.ndarray):
    """Outside of [0, 1] as well, where nothing was clipped by a sensor."""
    array = picture(1, 8)[..., 0].astype(np.float32) / 110 - 0.4
    Image.fromarray(array).save(tmp_path / "in.tiff")
    base = ("restore", tmp_path / "in.tiff", "--task", "inpaint", "--mask", tmp_path / "mask.png")
    run(*base, *QUICK, "--out", tmp_path / "out")
    assert array[mask].max() > 1
    assert array[mask].min() < 0
    back = np.asarray(Image.open(tmp_path / "out" / "restored.tiff"))
    assert np.array_equal(back[mask], array[mask])


def test_every_sample_and_the_mean(tmp_path: Path, mask: np.ndarray):
    array = picture(3, 16)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    base = ("restore", tmp_path / "in.png", "--task", "inpaint", "--mask", tmp_path / "mask.png")
    run(
        *base, *QUICK, "--samples", "3", "--solver", "diffpir", "--arrays", "--out", tmp_path / "o"
    )
    for name in ("restored-1", "restored-2", "restored-3", "mean"):
        assert np.array_equal(stored(tmp_path / "o" / f"{name}.png")[mask].round(), array[mask])
    std = np.load(tmp_path / "o" / "std.npy")[0]
    assert std[:, mask].max() < 1e-7
    assert std[:, ~mask].mean() > 1e-3


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (("--sigma-y", "0.05"), False),
        (("--no-keep-known",), False),
        (("--sigma-y", "0.05", "--keep-known"), True),
        (("--sigma-y", "0"), True),
    ],
)
def test_the_user_decides(tmp_path: Path, mask: np.ndarray, more: tuple[str, ...], kept: bool):
    array = picture(3, 8)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    base = ("restore", tmp_path / "in.png", "--task", "inpaint", "--mask", tmp_path / "mask.png")
    run(*base, *QUICK, *more, "--out", tmp_path / "out")
    back = stored(tmp_path / "out" / "restored.png")
    assert np.array_equal(back[mask].round(), array[mask]) == kept


def test_only_where_pixels_are_missing(tmp_path: Path):
    (tmp_path / "in.png").write_bytes(encode_png(picture(3, 8)))
    base = ("restore", tmp_path / "in.png", "--task", "denoise", *QUICK, "--out", tmp_path / "out")
    said = run(*base, "--keep-known", code=2)
    assert "--keep-known is for tasks with missing pixels (inpaint), not for denoise" in said
