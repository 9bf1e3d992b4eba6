"""JPEG files: their coefficients against jpeglib, the operator against libjpeg, the law against scipy, the gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, integrate, stats

import invguide as ig
from invguide.errors import InputError, ShapeError
from invguide.images.jpeg_file import parse_jpeg, standard_tables
from invguide.images.jpeg_reading import read_coefficients
from invguide.images.reading import read_picture
from invguide.likelihood import Likelihood
from invguide.noise import Quantised
from invguide.operators import JPEGCoefficients
from invguide.operators.jpeg_coefficients import to_stored, to_upright
from invguide.problem.proximal import proximal
from invguide.restoration.demo import PHOTO
from invguide.restoration.jpeg_measurement import measure_jpeg
from invguide.restoration.tasks import TASKS

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored so, it is turned back by EXIF 6
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# A pixel is rounded at most twice on its way to a coefficient (colour transform, chroma mean), by 1/2 each time; the
# DCT of 64 such errors is at most 8 times as large (Cauchy). The encoder's DCT works in integers: 1/2 more.
LIBJPEG = {"luma": 4.5, "chroma": 8.5}


def photo(height: int = 72, width: int = 100) -> Image.Image:
    return Image.open(PHOTO).convert("RGB").crop((48, 40, 48 + width, 40 + height))


def save(path: Path, image: Image.Image, orientation: int = 1, **settings: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation]
    image = image if turn is None else image.transpose(turn)
    image.save(path, "JPEG", exif=exif, **{"quality": 20, **settings})
    return path


def tensor(image: Image.Image) -> torch.Tensor:
    array = np.asarray(image.convert("RGB") if image.mode != "L" else image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].double() / 255


def excess(
    path: Path, truth: torch.Tensor, operator: JPEGCoefficients | None = None
) -> np.ndarray:
    """By how much the coefficients of `truth` leave their steps, 8-bit pixels."""
    found = measure_jpeg(read_picture(path), None, truth.shape[1])
    law = found.noise.bind(found.y)
    predicted = (operator or found.operator)(truth)
    return 255 * ((found.y - predicted).abs() - law.step / 2).numpy()


# ---- reading files


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("size", [(72, 96), (37, 51), (9, 7)])
def test_coefficients_are_those_of_jpeglib(
    tmp_path: Path, size: tuple[int, int], subsampling: int, progressive: bool
):
    jpeglib = pytest.importorskip("jpeglib")
    for quality in (5, 30, 75, 92):
        path = tmp_path / "x.jpg"
        settings = {"subsampling": subsampling, "progressive": progressive}
        save(path, photo(*size), quality=quality, **settings)
        file = parse_jpeg(path.read_bytes())
        theirs = jpeglib.read_dct(str(path))
        for name, part, found in zip(
            ("Y", "Cb", "Cr"), file.components, read_coefficients(file), strict=True
        ):
            exact = getattr(theirs, name) * part.table
            assert found.values.shape == exact.shape
            sure = found.error < found.error.min() + 1e-9
            assert np.array_equal(found.values[sure], exact[sure])
            assert sure.mean() > (0.999 if quality <= 75 else 0.1)
            # Elsewhere 64 pixels rounded by up to 1/2; of an enlarged plane 128, made at most sqrt(2) times larger.
            assert np.abs(found.values - exact).max() <= (8.5 if subsampling == 1 else 4.5)


def test_coefficients_decode_to_the_picture(tmp_path: Path):
    """Without another reader: the inverse DCT is the luma that Pillow decodes, to its rounding."""
    path = save(tmp_path / "x.jpg", photo(), quality=10)
    found = read_coefficients(parse_jpeg(path.read_bytes()))[0].values
    blocks = np.asarray(fft.idctn(found, axes=(-2, -1), norm="ortho")) + 128
    plane = blocks.swapaxes(1, 2).reshape(72, 104)[:, :100].clip(0, 255)
    image = Image.open(path)
    image.draft("YCbCr", image.size)
    assert np.abs(plane - np.asarray(image)[..., 0]).max() < 1.01


def test_blocks_that_were_cut_off_are_read_too(tmp_path: Path):
    """Thin dark lines on white: the decoder cuts the ringing off, and the pixels no longer tell the coefficients."""
    jpeglib = pytest.importorskip("jpeglib")
    pixels = np.full((64, 64), 255, np.uint8)
    pixels[::11], pixels[:, ::13] = 0, 0
    path = save(tmp_path / "x.jpg", Image.fromarray(pixels), quality=25)
    file = parse_jpeg(path.read_bytes())
    exact = jpeglib.read_dct(str(path)).Y * file.components[0].table
    decoded = np.asarray(Image.open(path)).astype(float) - 128
    naive = fft.dctn(decoded.reshape(8, 8, 8, 8).swapaxes(1, 2), axes=(-2, -1), norm="ortho")
    assert np.abs(naive - exact).max() > 20  # else this picture would show nothing
    assert np.array_equal(read_coefficients(file)[0].values, exact)


def test_headers(tmp_path: Path):
    path = save(tmp_path / "x.jpg", photo(40, 30), orientation=6, quality=35, subsampling=2)
    file = parse_jpeg(path.read_bytes())
    assert (file.size, file.colour, file.orientation) == ((30, 40), "ycbcr", 6)
    assert file.factors == ((1, 1), (2, 2), (2, 2))
    assert file.subsampling == "4:2:0"
    for i, table in enumerate(standard_tables(35)):
        assert np.array_equal(table, np.reshape(Image.open(path).quantization[i], (8, 8)))  # pyright: ignore[reportAttributeAccessIssue]
        assert np.array_equal(file.components[i].table, table)


def test_cmyk_is_refused(tmp_path: Path):
    photo().convert("CMYK").save(tmp_path / "x.jpg", quality=50)
    with pytest.raises(InputError, match="JPEG of 4 components"):
        measure_jpeg(read_picture(tmp_path / "x.jpg"), None, 3)


# ---- the operator


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("orientation", TURNS)
def test_truth_lies_within_the_steps_of_libjpeg(
    tmp_path: Path, orientation: int, subsampling: int
):
    """Odd sizes too: what an encoder makes of the picture beyond its edges."""
    for size in ((72, 96), (45, 61), (46, 59)):
        image = photo(*size)
        path = save(tmp_path / "x.jpg", image, orientation, quality=15, subsampling=subsampling)
        over = excess(path, tensor(image))[0]
        height, width = size if orientation < 5 else size[::-1]
        luma = -(-height // 8) * -(-width // 8) * 64
        assert over[:luma].max() < LIBJPEG["luma"]
        assert over[luma:].max() < LIBJPEG["chroma"]


def test_truth_of_grey_and_rgb_files(tmp_path: Path):
    grey = photo(45, 61).convert("L")
    path = save(tmp_path / "g.jpg", grey, 8)
    assert excess(path, tensor(grey)).max() < LIBJPEG["luma"]
    assert excess(path, tensor(grey).expand(-1, 3, -1, -1)).max() < LIBJPEG["luma"]
    path = save(tmp_path / "rgb.jpg", photo(45, 61), keep_rgb=True)
    assert parse_jpeg(path.read_bytes()).colour == "rgb"
    assert excess(path, tensor(photo(45, 61))).max() < LIBJPEG["luma"]


def test_wrong_models_leave_the_steps(tmp_path: Path):
    """The planted mistakes: the grid not turned, chroma not reduced, the table of another quality."""
    image = photo(45, 61)
    path = save(tmp_path / "x.jpg", image, 3, quality=15)
    reduced = ((1, 1), (2, 2), (2, 2))
    for factors, orientation in ((reduced, 1), (reduced, 6)):
        size = (45, 61) if orientation == 1 else (61, 45)
        wrong = JPEGCoefficients(size, "ycbcr", factors, orientation)
        x = tensor(image) if orientation == 1 else tensor(image).mT
        assert excess(path, x, wrong).max() > 10 * LIBJPEG["chroma"]
    path = save(tmp_path / "y.jpg", image, quality=15)
    found = measure_jpeg(read_picture(path), None, 3)
    finer = found._replace(noise=Quantised(found.noise.step / 2))
    over = (finer.y - finer.operator(tensor(image))).abs() - finer.noise.bind(finer.y).step / 2
    assert float(over.max()) * 255 > 2 * LIBJPEG["chroma"]


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_that_of_exif(tmp_path: Path, orientation: int):
    x = torch.rand(1, 3, 24, 40, dtype=torch.float64)
    stored = to_stored(x, orientation)
    assert torch.equal(to_upright(stored, orientation), x)
    turned = JPEGCoefficients((24, 40), orientation=orientation)
    plain = JPEGCoefficients((stored.shape[-2], stored.shape[-1]))
    assert torch.equal(turned(x), plain(stored))


def test_blocks_are_orthonormal():
    operator = JPEGCoefficients((16, 24), "grey")
    x = torch.rand(2, 1, 16, 24, dtype=torch.float64)
    assert torch.allclose(operator.adjoint(operator(x)), x, atol=1e-14)
    assert torch.allclose(operator(x).square().sum(1), x.square().flatten(1).sum(1), rtol=1e-14)


@pytest.mark.parametrize("colour", ["ycbcr", "rgb", "luma", "grey"])
def test_rows_and_right_inverse(colour: str):
    planes = 1 if colour in ("luma", "grey") else 3
    factors = ((1, 1), (2, 2), (2, 1))[:planes]
    operator = JPEGCoefficients((32, 16), colour, factors, orientation=8)
    m = operator(torch.zeros(1, 1 if colour == "grey" else 3, 32, 16)).shape[1]
    rows = operator.adjoint(torch.eye(m, dtype=torch.float64))
    y = torch.rand(1, m, dtype=torch.float64)
    assert torch.allclose(operator.row_norms(y), rows.flatten(1).norm(dim=1), atol=1e-14)
    assert torch.allclose(operator(operator.right_inverse(y)), y, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JPEGCoefficients((8, 8), "cmyk"), "colour is 'cmyk'"),
        (lambda: JPEGCoefficients((8, 8), factors=((1, 1),)), "of the 3 planes"),
        (
            lambda: JPEGCoefficients((8, 8), factors=((1, 1), (0, 1), (1, 1))),
            "each a whole number of at least 1",
        ),
        (
            lambda: JPEGCoefficients((8, 8), orientation=9),
            "orientation is 9; expected a whole number from 1 to 8",
        ),
        (lambda: JPEGCoefficients((0, 8)), r"expected \(height, width\)"),
        (lambda: JPEGCoefficients((8, 8))(torch.zeros(1, 3, 8, 9)), r"given \(8, 9\) pixels"),
        (lambda: JPEGCoefficients((8, 8)).adjoint(torch.zeros(1, 5)), r"expected \(B, 192\)"),
    ],
)
def test_wrong_arguments(make: Any, message: str):
    with pytest.raises((InputError, ShapeError), match=message):
        make()


# ---- the law


def values(seed: int = 0, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    y = torch.from_numpy(generator.normal(size=(1, count)))
    return y + torch.from_numpy(generator.normal(size=(1, count))), y


@pytest.mark.parametrize("sigma_y", [0.05, 0.3, 4.0])
def test_log_density_is_that_of_scipy(sigma_y: float):
    predicted, y = values()
    law = Quantised(0.4, sigma_y).bind(y)
    ends = (-(predicted - y).abs().numpy() + s * 0.2 for s in (1, -1))
    high, low = (stats.norm.logcdf(e / sigma_y) for e in ends)
    expected = (high + np.log1p(-np.exp(low - high))).sum()
    assert float(law.log_density(predicted, y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma_y", [0.004, 0.1, 2.0])
@pytest.mark.parametrize("variance", [1e-4, 0.09, 25.0])
def test_posterior_mean_is_that_of_quadrature(sigma_y: float, variance: float):
    mean, y = values(1, 8)
    law = Quantised(0.4, sigma_y).bind(y)
    found = law.posterior_mean(mean, torch.tensor(variance), y)
    total = (variance + sigma_y**2) ** 0.5
    for z, centre, value in zip(mean[0].numpy(), y[0].numpy(), found[0].numpy()):
        low, high = ((centre + s * 0.2 - z) / total for s in (-1, 1))
        # E[c] = z + v / (v + s^2) E[u - z], u the Gaussian cut off to the step, integrated by itself.
        peak = min(max(0.0, low), high)

        def density(t: float, peak: float = peak) -> float:
            return float(np.exp((peak - t) * (peak + t) / 2))

        mass, first = (
            integrate.quad(f, low, high, points=[peak], epsabs=1e-12)[0]
            for f in (density, lambda t, d=density: t * d(t))
        )
        expected = z + variance / total * first / mass
        assert value == pytest.approx(expected, abs=1e-8)


def test_the_law_pulls_from_afar():
    y = torch.zeros(1, 1)
    law = Quantised(1e-3).bind(y)
    predicted = torch.full((1, 1), 50.0, requires_grad=True)
    law.log_density(predicted, y).sum().backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    assert float(predicted.grad) < 0
    far = law.posterior_mean(predicted.detach(), torch.tensor(1e-6), y)
    # From so far all but the part s^2 / (s^2 + v) of the way, s = 1 % of the step.
    assert float(far) == pytest.approx(50 * 1e-10 / (1e-6 + 1e-10), abs=2e-3)


def test_law_refuses_what_cannot_be():
    y = torch.zeros(2, 3)
    with pytest.raises(InputError, match="expected a step > 0"):
        Quantised(0.0).bind(y)
    with pytest.raises(InputError, match="sigma_y >= 0"):
        Quantised(1.0, -1.0).bind(y)
    with pytest.raises(InputError, match="y is complex"):
        Quantised(1.0).bind(y.to(torch.complex64))
    with pytest.raises(ShapeError, match="Quantised has shape"):
        Quantised(torch.ones(4)).bind(y)
    law = Quantised(torch.tensor([1.0, 2.0, 3.0])).bind(y)
    assert law.rows(torch.tensor([1])).step.tolist() == [[1.0, 2.0, 3.0]]


def test_data_step_is_the_posterior_mean_of_orthogonal_rows():
    """One grey block: by Monte Carlo over the prior N(x, v), those that round to y."""
    operator = JPEGCoefficients((8, 8), "grey")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    step = torch.full((64,), 1e3, dtype=torch.float64)
    step[:2] = 0.3
    y = operator(x) + 0.1
    found = proximal(Likelihood(operator, y, Quantised(step)), x, 0.04)
    draws = operator(x)[0, :2] + 0.2 * torch.randn(400_000, 2, generator=generator).double()
    inside = ((draws - y[0, :2]).abs() < 0.15).all(1)
    expected = draws[inside].mean(0)
    # Standard error of the mean: 0.15 / sqrt(3) / sqrt(100,000 draws) = 0.0003; the soft edge adds less.
    assert torch.allclose(operator(found)[0, :2], expected, atol=0.0015)
    assert torch.allclose(operator(found)[0, 2:], operator(x)[0, 2:], atol=1e-6)


# ---- pictures that are files no more, and the gain


@pytest.mark.parametrize("subsampling", [0, 2], ids=["444", "420"])
def test_decoded_picture_gives_back_its_coefficients(tmp_path: Path, subsampling: int):
    path = save(tmp_path / "x.jpg", photo(64, 96), quality=20, subsampling=subsampling)
    Image.open(path).save(tmp_path / "x.png")
    file = measure_jpeg(read_picture(path), None, 3)
    found = measure_jpeg(read_picture(tmp_path / "x.png"), 20, 3)
    assert found.operator.factors == file.operator.factors
    same = (found.y - file.y).abs() < 0.01 * file.noise.step
    assert float(same.double().mean()) > 0.95  # the rest was cut off at black or white


def test_other_quality_is_noticed(tmp_path: Path):
    path = save(tmp_path / "x.jpg", photo(64, 96), quality=20)
    Image.open(path).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match="does not look like a JPEG of quality 50"):
        measure_jpeg(read_picture(tmp_path / "x.png"), 50, 3)
    Image.open(path).crop((3, 2, 90, 60)).save(tmp_path / "cut.png")
    with pytest.warns(UserWarning, match="blocks from its top left corner"):
        measure_jpeg(read_picture(tmp_path / "cut.png"), 20, 3)


@pytest.fixture(scope="module")
def prior() -> ig.Prior:
    return ig.load_prior("natural")


def gain(
    path: Path, truth: torch.Tensor, prior: ig.Prior, name: str = "HQS", samples: int = 1
) -> float:
    picture = read_picture(path)
    found = measure_jpeg(picture, None, 3)
    solver = ig.api.make_solver(name, **TASKS["jpeg"].solver_settings[name])
    settings: dict[str, Any] = {"noise": found.noise, "solver": solver, "progress": False}
    settings["num_samples"] = samples
    restored = ig.solve(found.y, found.operator, prior, **settings).mean
    restored = restored if picture.values.shape[1] == 3 else restored.mean(1, keepdim=True)
    error = [((v.clamp(0, 1) - truth) ** 2).mean() for v in (picture.values, restored)]
    return 10 * float(torch.log10(error[0] / error[1]))


@pytest.mark.parametrize(
    ("orientation", "settings"),
    [
        *((o, {}) for o in TURNS),
        (1, {"subsampling": 0}),
        (6, {"subsampling": 1}),
        (1, {"quality": 80}),
        (1, {"quality": 95}),
    ],
)
def test_restored_is_better_than_the_file(
    tmp_path: Path, prior: ig.Prior, orientation: int, settings: dict[str, Any]
):
    image = photo()
    path = save(tmp_path / "x.jpg", image, orientation, **settings)
    found = gain(path, tensor(image), prior)
    assert found > (0.6 if settings.get("quality", 20) == 20 else 0.0)


def test_grey_file_stays_grey_and_gains(tmp_path: Path, prior: ig.Prior):
    image = photo().convert("L")
    path = save(tmp_path / "x.jpg", image, 6)
    assert gain(path, tensor(image), prior) > 0.5


def test_samples_gain_too_and_differ(tmp_path: Path, prior: ig.Prior):
    image = photo(48, 48)
    path = save(tmp_path / "x.jpg", image)
    sampler = TASKS["jpeg"].sampler
    assert sampler is not None
    one, mean = (gain(path, tensor(image), prior, sampler, count) for count in (1, 3))
    assert one > 0.2
    assert mean > one + 0.1


def test_table(tmp_path: Path):
    from invguide.bench import jpeg

    pixels = np.asarray(photo(32, 32))
    np.savez(tmp_path / "photos.npz", img_32=pixels[None])
    settings: dict[str, Any] = {"size": 32, "photos": 1, "qualities": [20], "progress": False}
    table = jpeg(tmp_path / "photos.npz", prior="natural-tiny", **settings)
    decoded = np.asarray(Image.open(save(tmp_path / "x.jpg", photo(32, 32), subsampling=2)))
    error = np.mean((decoded / 255.0 - pixels / 255.0) ** 2)
    cell = table.figures["20 4:2:0"]
    assert cell["file"][0] == pytest.approx(-10 * np.log10(error), abs=1e-4)
    assert cell["gain"][0] == pytest.approx(cell["restored"][0] - cell["file"][0])
    assert [row[:2] for row in table.rows] == [("20", "4:2:0"), ("20", "4:4:4")]
