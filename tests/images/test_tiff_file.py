"""TIFF kinds that PIL does not read, written by tifffile, by libtiff through PIL, and by hand."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from typer.testing import CliRunner

from invguide.cli.commands import app
from invguide.errors import InputError
from invguide.images import picture_files
from invguide.images.reading import Picture, read_picture
from invguide.images.writing import write_picture

SIZE = (37, 45)  # no multiple of a tile or a strip
LAYOUTS = {
    "plain": {},
    "big endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
    "strips": {"rowsperstrip": 5},
    "tiles": {"tile": (16, 32)},
    "deflate": {"compression": "zlib"},
    "deflate in differences": {"compression": "zlib", "predictor": 2},
    "big-endian tiles in differences": {
        "compression": "zlib",
        "predictor": 2,
        "tile": (16, 16),
        "byteorder": ">",
    },
    "planes": {"planarconfig": "separate"},
    "planes of strips": {"planarconfig": "separate", "rowsperstrip": 5, "compression": "zlib"},
    "planes of tiles": {"planarconfig": "separate", "tile": (16, 16)},
}


def numbers(channels: int, kind: str) -> np.ndarray:
    """Noise, so that rows, columns, channels and bytes differ: (H, W, C)."""
    values = np.random.default_rng(channels).random((*SIZE, channels))
    return np.rint(65535 * values).astype(kind) if kind == "u2" else values.astype(kind)


def write(path: Path, array: np.ndarray, **options: Any) -> Path:
    """As tifffile writes it; planes come first where they are separate."""
    channels = array.shape[-1]
    if options.get("planarconfig") == "separate":
        array = array.transpose(2, 0, 1)
    options.setdefault("planarconfig", "contig" if channels > 1 else None)
    if channels in (2, 4):
        options.setdefault("extrasamples", ["unassalpha"])
    options["photometric"] = "rgb" if channels > 2 else "minisblack"
    tifffile.imwrite(path, array if channels > 1 else array[..., 0], **options)
    return path


def stored(picture: Picture) -> np.ndarray:
    """(H, W, C) in [0, 1], alpha last."""
    array = picture.values[0].movedim(0, -1).double().numpy()
    if picture.alpha is None:
        return array
    top = 65535 if picture.alpha.dtype == np.uint16 else 1
    return np.concatenate([array, picture.alpha[..., None] / top], -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["u2", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_in_every_layout(tmp_path: Path, channels: int, kind: str, layout: str):
    options = LAYOUTS[layout]
    if channels == 1 and "planarconfig" in options:
        pytest.skip("one channel is one plane")
    if "predictor" in options and kind != "u2":
        pytest.skip("tifffile writes no differences of floating point by itself")
    array = numbers(channels, kind)
    picture = read_picture(write(tmp_path / "a.tif", array, **options))
    assert picture.bits == (16 if kind == "u2" else 32)
    assert picture.grey == (channels < 3)
    wanted = array / 65535 if kind == "u2" else array.astype(np.float64)
    assert np.abs(stored(picture) - wanted).max() < 1e-7, "single precision"


def lzw(data: bytes) -> bytes:
    """As libtiff compresses: the strip of a grey picture of one row."""
    import io

    file = io.BytesIO()
    row = Image.frombytes("L", (len(data), 1), data)
    row.save(file, "TIFF", compression="tiff_lzw")
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        page = tiff.pages.first
        assert (page.compression, len(page.dataoffsets)) == (5, 1)
        start = page.dataoffsets[0]
        return file.getvalue()[start : start + page.databytecounts[0]]


def recompressed(path: Path, array: np.ndarray, differences: bool) -> Path:
    """An LZW file: one of tifffile, whose strips are replaced at the end of the file."""
    write(path, array, rowsperstrip=10, byteorder=">", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        tags = {t.code: (t.offset, t.valueoffset) for t in page.tags}
        count = len(page.dataoffsets)
    if differences:
        array = np.diff(array, axis=1, prepend=np.zeros_like(array[:, :1]))
    data = bytearray(path.read_bytes())
    starts, sizes = [], []
    for i in range(count):
        strip = lzw(array[10 * i : 10 * i + 10].astype(array.dtype.newbyteorder(">")).tobytes())
        starts.append(len(data))
        sizes.append(len(strip))
        data += strip
    for tag, values in ((273, starts), (279, sizes)):
        at, where = tags[tag]
        (form,) = struct.unpack_from(">H", data, at + 2)
        struct.pack_into(f">{count}{'H' if form == 3 else 'I'}", data, where, *values)
    struct.pack_into(">HH", data, tags[259][1], 5, 0)
    if differences:  # in the place of a tag that does not matter here
        data[tags[305][0] : tags[305][0] + 12] = struct.pack(">HHIHH", 317, 3, 1, 2, 0)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["u2", "f4"])
@pytest.mark.parametrize("differences", [False, True])
def test_lzw(tmp_path: Path, kind: str, differences: bool):
    if differences and kind == "f4":
        pytest.skip("differences of floats are of another kind")
    array = numbers(3, kind)
    picture = read_picture(recompressed(tmp_path / "a.tif", array, differences))
    wanted = array / 65535 if kind == "u2" else array.astype(np.float64)
    assert np.abs(stored(picture) - wanted).max() < 1e-7


def test_alpha_that_colours_are_multiplied_by(tmp_path: Path):
    array = numbers(4, "f4")
    array[..., 3] = np.where(array[..., 3] < 0.3, 0, array[..., 3])
    multiplied = np.concatenate([array[..., :3] * array[..., 3:], array[..., 3:]], -1)
    picture = read_picture(write(tmp_path / "a.tif", multiplied, extrasamples=["assocalpha"]))
    seen = array[..., 3] > 0
    assert np.abs(stored(picture) - array)[seen].max() < 1e-6
    with pytest.warns(UserWarning, match="said to be no opacity; it is left out"):
        picture = read_picture(write(tmp_path / "a.tif", array, extrasamples=["unspecified"]))
    assert picture.alpha is None


def test_what_it_tells_besides_its_pixels(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    told = {"description": "a scene", "iccprofile": profile, "metadata": None}
    told |= {"resolution": (240, 120), "resolutionunit": "inch"}
    array = numbers(3, "f4")
    extra = [(274, "H", 1, 6, True)]
    path = write(tmp_path / "a.tif", array, extratags=extra, **told)
    picture = read_picture(path)
    assert picture.profile == profile
    assert picture.kept.dpi == pytest.approx((240, 120))
    exif = Image.Exif()
    exif.load(picture.kept.exif or b"")
    assert exif[0x010E] == "a scene"
    assert np.array_equal(stored(picture).astype(np.float32), np.rot90(array, -1))
    again = read_picture(write_picture(tmp_path / "b", picture.values, picture))
    assert np.array_equal(stored(again), stored(picture))
    assert (again.profile, again.kept.dpi) == (profile, pytest.approx((240, 120)))


def test_pages_are_told(tmp_path: Path):
    pages = np.stack([numbers(3, "f4")] * 2)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb", metadata=None)
    with pytest.warns(UserWarning, match="has 2 frames; the first is taken"):
        picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(stored(picture).astype(np.float32), pages[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"channels": 5}, r"5 channels of 32-bit floating point; expected 1 to 4"),
        (
            {"predictor": 3, "compression": 8},
            "as differences of parts of them; save it without a predictor",
        ),
        ({"photometric": "cielab"}, "CIELAB; save it as grey or RGB"),
        ({"compression": 50002}, "compressed as JPEGXL; save it with deflate"),
    ],
)
def test_the_rest_is_named(tmp_path: Path, change: dict[str, Any], text: str):
    channels = change.get("channels", 3)
    array = numbers(channels, "f4")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        tags[262].overwrite(8 if "photometric" in change else 1)
        tags[259].overwrite(change.get("compression", 1))
        program = tags[305].offset
    if "predictor" in change:
        data = bytearray(path.read_bytes())
        data[program : program + 12] = struct.pack("<HHIHH", 317, 3, 1, change["predictor"], 0)
        path.write_bytes(data)
    if "predictor" in change and importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs reads it")
    with pytest.raises(InputError, match=text):
        read_picture(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_damaged_files(tmp_path: Path, compression: str | None):
    """Cut anywhere, or with one byte changed, a file is refused by name, or read as numbers."""
    path = write(tmp_path / "a.tif", numbers(3, "f4"), compression=compression, rowsperstrip=8)
    data = path.read_bytes()
    random = np.random.default_rng(0)
    refused: list[str] = []
    for i in range(120):
        whole = bytearray(data)
        if i % 3 == 0:
            whole = whole[: random.integers(1, len(data))]
        else:
            place = random.integers(300 if i % 3 == 1 else len(data))
            whole[place] ^= 1 << random.integers(8)
        path.write_bytes(whole)
        try:
            read_picture(path)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) >= 40, "those that are cut"
    assert all("a.tif" in text for text in refused)


def test_sizes_come_before_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.tif", numbers(3, "f4"), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        tags[256].overwrite(60_000)
        tags[257].overwrite(60_000)
    with pytest.raises(InputError, match=r"has 3600 million pixels in \d+ kB"):
        read_picture(path)
    path = write(tmp_path / "b.tif", numbers(3, "f4"))
    monkeypatch.setattr(picture_files, "_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"which take at least .* GB, and this machine has"):
        read_picture(path)


def test_a_stream_that_never_ends_stops_at_its_size(tmp_path: Path):
    """Eight kilobytes that unpack to eight megabytes, in the place of sixty of pixels."""
    import zlib

    path = write(tmp_path / "a.tif", numbers(3, "f4"), compression="zlib")
    data = path.read_bytes()
    bomb = zlib.compress(bytes(8_000_000))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        tags[273].overwrite(len(data))
        tags[279].overwrite(len(bomb))
    with path.open("ab") as file:
        file.write(bomb)
    import tracemalloc

    tracemalloc.start()
    try:
        assert not stored(read_picture(path)).any()
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_floats_in_colour_are_restored_as_such(tmp_path: Path):
    """With the pixels that are no numbers filled, and alpha passed on."""
    ramp = np.linspace(0.2, 0.8, 40 * 48).reshape(40, 48)
    array = np.stack([ramp, ramp[::-1], ramp[:, ::-1], np.ones_like(ramp)], -1).astype("f4")
    broken = array.copy()
    broken[10:14, 20:24, 1] = np.nan
    write(tmp_path / "a.tiff", broken)
    mask = np.full(ramp.shape, 255, np.uint8)
    mask[9:15, 19:25] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="16 NaN or infinite values"):
        read_picture(tmp_path / "a.tiff")
    words = [
        "restore",
        str(tmp_path / "a.tiff"),
        "--task",
        "inpaint",
        "--mask",
        str(tmp_path / "mask.png"),
    ]
    words += ["--prior", "natural-tiny", "--steps", "2", "--sigma-y", "0.05", "--quiet"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    restored = tifffile.imread(tmp_path / "out" / "restored.tiff")
    assert (restored.dtype, restored.shape) == (np.float32, array.shape)
    assert np.array_equal(restored[..., 3], array[..., 3])
    error, hole = np.abs(restored - array)[..., :3], mask == 0
    assert error[~hole].max() < 0.1
    assert error[hole].mean() < 0.3
