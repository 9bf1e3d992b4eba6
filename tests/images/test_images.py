"""Pictures in and out, against PIL and torchvision; the noise estimate, against noise that was added."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from invguide.errors import InputError
from invguide.images.reading import Picture, read_picture
from invguide.images.writing import encode_png, write_picture


def pixels(channels: int, kind: type = np.uint8, size: tuple[int, int] = (33, 46)) -> np.ndarray:
    """Noise on a ramp, so that rows, columns, channels and both bytes differ: (H, W, C)."""
    rng = np.random.default_rng(channels)
    top = np.iinfo(kind).max
    return rng.integers(0, top + 1, (*size, channels)).astype(kind)


def as_stored(picture: Picture) -> np.ndarray:
    """The values back as integers, (H, W, C) with alpha last."""
    scale = 65535 if picture.bits == 16 else 255
    array = (picture.values[0].double() * scale).round().permute(1, 2, 0).numpy()
    return array if picture.alpha is None else np.concatenate([array, picture.alpha[..., None]], 2)


def tiff16(
    array: np.ndarray,
    compression: int = 1,
    order: str = "<",
    orientation: int = 1,
    predictor: int = 1,
) -> bytes:
    """A baseline TIFF of one strip, (H, W, C) uint16, which PIL cannot write."""
    height, width, channels = array.shape
    if predictor == 2:
        array = np.diff(array, axis=1, prepend=np.zeros_like(array[:, :1]))
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if compression == 8 else data
    bits_at = 8 + len(data) + len(data) % 2
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits_at),
        (259, 3, 1, compression),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        *([(317, 3, 1, predictor)] if compression == 8 else []),
        *([(338, 3, 1, 2)] if channels == 4 else []),
    ]
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    entries = b""
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + packed
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = data + b"\0" * (len(data) % 2) + bits
    return head + struct.pack(f"{order}I", 8 + len(body)) + body + directory


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_of_png_comes_back_bit_for_bit(tmp_path: Path, channels: int, kind: type):
    array = pixels(channels, kind)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    picture = read_picture(tmp_path / "in.png")
    assert picture.values.shape == (1, 1 if channels < 3 else 3, *array.shape[:2])
    assert (picture.alpha is not None) == (channels in (2, 4))
    assert picture.bits == (16 if kind is np.uint16 else 8)
    assert np.array_equal(as_stored(picture), array)
    written = write_picture(tmp_path / "out", picture.values, picture)
    assert written == tmp_path / "out.png"
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "in.png").read_bytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_encoder_agrees_with_other_readers(channels: int):
    eight = pixels(channels)
    found = np.asarray(Image.open(BytesIO(encode_png(eight))))
    assert np.array_equal(found.reshape(eight.shape), eight)
    sixteen = pixels(channels, np.uint16)
    image = Image.open(BytesIO(encode_png(sixteen)))
    if channels == 1:
        assert np.array_equal(np.asarray(image)[..., None], sixteen)
    else:  # PIL keeps the upper byte
        image = image if image.mode != "RGBA" or channels == 4 else image.convert("LA")
        assert np.array_equal(np.asarray(image), sixteen >> 8)


def filtered_png(array: np.ndarray) -> bytes:
    """A PNG whose rows take turns through the five filters, after the formulas of the standard, byte by byte."""
    height, _, channels = array.shape
    data = array.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    step, rows = 2 * channels, b""
    for r in range(height):
        kind = r % 5
        row = bytearray([kind])
        for i in range(data.shape[1]):
            a = data[r, i - step] if i >= step else 0
            b = data[r - 1, i] if r else 0
            c = data[r - 1, i - step] if r and i >= step else 0
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row.append((data[r, i] - (0, a, b, (a + b) // 2, paeth)[kind]) % 256)
        rows += bytes(row)
    plain = encode_png(array)
    start = plain.index(b"IDAT")
    body = zlib.compress(rows)
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body
    chunk += struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return plain[: start - 4] + chunk + plain[-12:]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_every_filter_of_sixteen_bit_png(tmp_path: Path, channels: int):
    array = pixels(channels, np.uint16, (21, 17))
    (tmp_path / "x.png").write_bytes(filtered_png(array))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")).shape[:2], (21, 17))
    assert np.array_equal(as_stored(read_picture(tmp_path / "x.png")), array)


def test_pil_writes_and_we_read_the_other_modes(tmp_path: Path):
    grey, colour = pixels(1)[..., 0], pixels(3)
    cases = {
        "bilevel.png": (Image.fromarray(grey > 100), (1, False)),
        "palette.png": (Image.fromarray(colour).quantize(32), (3, False)),
        "grey-palette.png": (Image.fromarray(grey).convert("P"), (1, False)),
        "cmyk.tif": (Image.fromarray(colour).convert("CMYK"), (3, False)),
        "sixteen.tif": (Image.fromarray(pixels(1, np.uint16)[..., 0]), (1, False)),
        "lossy.jpg": (Image.fromarray(colour), (3, False)),
        "web.webp": (Image.fromarray(pixels(4)), (3, True)),
    }
    for name, (image, (channels, alpha)) in cases.items():
        image.save(tmp_path / name)
        picture = read_picture(tmp_path / name)
        assert picture.values.shape == (1, channels, 33, 46), name
        assert (picture.alpha is not None) == alpha, name
    assert np.array_equal(
        as_stored(read_picture(tmp_path / "sixteen.tif"))[..., 0], pixels(1, np.uint16)[..., 0]
    )
    expected = np.asarray(cases["palette.png"][0].convert("RGB"))
    assert np.array_equal(as_stored(read_picture(tmp_path / "palette.png")), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("compression", "predictor"), [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_tiff(
    tmp_path: Path, channels: int, compression: int, predictor: int, order: str
):
    array = pixels(channels, np.uint16)
    data = tiff16(array, compression, order, predictor=predictor)
    (tmp_path / "in.tiff").write_bytes(data)
    picture = read_picture(tmp_path / "in.tiff")
    assert picture.bits == 16
    assert np.array_equal(as_stored(picture), array)
    (tmp_path / "turned.tiff").write_bytes(tiff16(array, compression, order, 6, predictor))
    assert np.array_equal(as_stored(read_picture(tmp_path / "turned.tiff")), np.rot90(array, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str):
    image = Image.fromarray(np.kron(pixels(3, size=(5, 7)), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"in.{suffix}", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"in.{suffix}")))
    assert np.array_equal(as_stored(read_picture(tmp_path / f"in.{suffix}")), expected)


def test_floats_profile_and_size(tmp_path: Path):
    ramp = np.linspace(0, 1, 40 * 36, dtype=np.float32).reshape(40, 36)
    Image.fromarray(ramp).save(tmp_path / "in.tiff")
    picture = read_picture(tmp_path / "in.tiff")
    assert picture.bits == 32
    written = write_picture(tmp_path / "out.png", picture.values, picture)
    assert written.suffix == ".tiff"
    assert np.array_equal(np.asarray(Image.open(written)), ramp)

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels(3)).save(tmp_path / "in.png", icc_profile=profile)
    picture = read_picture(tmp_path / "in.png")
    write_picture(tmp_path / "out.png", picture.values, picture)
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == profile


def test_alpha_follows_the_size():
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, 4:] = 200
    picture = Picture(torch.rand(1, 3, 8, 8), alpha)
    from invguide.images.writing import _resize_alpha

    larger = _resize_alpha(alpha, (32, 32))
    assert larger.shape == (32, 32)
    assert larger.dtype == np.uint8
    assert larger[:, :12].max() == 0
    assert larger[:, 22:].min() == 200
    assert _resize_alpha(alpha, (8, 8)) is alpha
    assert picture.describe() == "8 x 8 pixels, colour with alpha, 8 bit"


def test_writing_survives_nan_and_overflow(tmp_path: Path):
    values = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 0.5, 7.0]]])
    with np.errstate(all="raise"):
        write_picture(tmp_path / "x.png", values)
    assert np.asarray(Image.open(tmp_path / "x.png")).tolist() == [[0, 255, 0, 128, 255]]
    with pytest.raises(InputError, match=r"1 or 3 channels .*\(2, 4, 4\)"):
        write_picture(tmp_path / "x.png", torch.zeros(2, 4, 4))


@pytest.mark.parametrize("quality", [5, 20, 50, 75, 95])
def test_quality_of_a_jpeg_file(tmp_path: Path, quality: int):
    Image.fromarray(pixels(3)).save(tmp_path / "x.jpg", quality=quality)
    assert read_picture(tmp_path / "x.jpg").jpeg_quality == quality
    Image.fromarray(pixels(3)).save(tmp_path / "y.jpg", qtables=[list(range(1, 65))])
    assert read_picture(tmp_path / "y.jpg").jpeg_quality is None


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such file: .*none\.png"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder; expected a picture file"):
        read_picture(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(
        InputError, match=r"text\.png is not a picture that can be read; expected one of"
    ):
        read_picture(tmp_path / "text.png")
    for kind in (np.uint8, np.uint16):
        data = encode_png(pixels(3, kind))
        (tmp_path / "short.png").write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=r"short\.png is damaged"):
            read_picture(tmp_path / "short.png")
        whole = bytearray(data)
        whole[len(data) // 2] ^= 255
        (tmp_path / "flipped.png").write_bytes(bytes(whole))
        with pytest.raises(InputError, match=r"flipped\.png is damaged"):
            read_picture(tmp_path / "flipped.png")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_floats_that_are_not_finite(tmp_path: Path, bad: float):
    array = np.full((40, 40), 0.5, np.float32)
    array[3, 4] = bad
    Image.fromarray(array).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match=r"1 NaN or infinite values .first at row 3, column 4"):
        read_picture(tmp_path / "x.tiff")
    Image.fromarray(array.clip(0, 1) * 200).save(tmp_path / "x.tiff")
    if np.isfinite(bad):
        with pytest.raises(InputError, match="expected 0 to 1"):
            read_picture(tmp_path / "x.tiff")


# ---- grey as colour, and profiles


@pytest.mark.parametrize("quality", [10, 50, 90])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "bmp", "tiff"])
def test_grey_as_colour_is_grey(tmp_path: Path, suffix: str, quality: int):
    photo = Image.open(Path(__file__).parents[2] / "invguide" / "data" / "chelsea.png")
    Image.merge("RGB", [photo.convert("L")] * 3).save(tmp_path / f"x.{suffix}", quality=quality)
    picture = read_picture(tmp_path / f"x.{suffix}")
    assert (picture.grey, picture.rgb) == (True, True)
    found = np.asarray(Image.open(tmp_path / f"x.{suffix}").convert("RGB")).astype(int)
    # Decoders of WebP round each channel its own way.
    assert np.abs(found - as_stored(picture)).max() <= (1 if suffix == "webp" else 0)
    written = write_picture(tmp_path / "out", picture.values, picture)
    assert Image.open(written).mode == "RGB"
    back = read_picture(written)
    assert torch.equal(back.values, picture.values)
    assert back.describe() == picture.describe()


def test_one_level_of_colour_in_one_pixel_is_colour(tmp_path: Path):
    for kind in (np.uint8, np.uint16):
        array = pixels(1, kind).repeat(3, -1) // 2
        (tmp_path / "grey.png").write_bytes(encode_png(array))
        assert read_picture(tmp_path / "grey.png").rgb
        array[5, 7, 2] += 1
        (tmp_path / "x.png").write_bytes(encode_png(array))
        picture = read_picture(tmp_path / "x.png")
        assert (picture.grey, picture.rgb) == (False, False)
        assert np.array_equal(as_stored(picture), array)


def profile(space: str, claims: bytes = b"") -> bytes:
    """A profile of LittleCMS for RGB, GRAY or LAB; one that claims to be for another space is a broken one."""
    if space == "GRAY":
        whole = bytearray(GREY_PROFILE)
    else:
        whole = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes())
    if claims:
        whole[16:20] = claims
    return bytes(whole)


def _grey_profile() -> bytes:
    """A gamma of 2.2 for grey, by hand after ICC.1:2001-04: header, three tags, their contents."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(4 + 4 + 2 + 1 + 67 + 3)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    contents = [(b"desc", text), (b"wtpt", xyz(0.9642, 1.0, 0.8249)), (b"kTRC", curve)]
    table, data, at = struct.pack(">I", len(contents)), b"", 128 + 4 + 12 * len(contents)
    for name, content in contents:
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    head = struct.pack(
        ">I4sI4s4s4s", at + len(data), b"\0" * 4, 0x02100000, b"mntr", b"GRAY", b"XYZ "
    )
    head += struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + data


GREY_PROFILE = _grey_profile()


@pytest.mark.filterwarnings("error:.*colour profile")
def test_profiles_that_fit_are_passed_on(tmp_path: Path):
    for mode, space in (
        ("L", "GRAY"),
        ("LA", "GRAY"),
        ("RGB", "sRGB"),
        ("RGBA", "sRGB"),
        ("P", "sRGB"),
    ):
        image = Image.fromarray(pixels(4)).convert("RGB" if mode == "P" else mode)
        image = image.quantize(16) if mode == "P" else image
        data = profile(space)
        image.save(tmp_path / "x.png", icc_profile=data)
        picture = read_picture(tmp_path / "x.png")
        assert picture.profile == data
        written = Image.open(write_picture(tmp_path / "out", picture.values, picture))
        assert written.info["icc_profile"] == data
        opened: Any = ImageCms.ImageCmsProfile(BytesIO(data))  # LittleCMS takes it
        assert opened.profile.xcolor_space.strip() == ("GRAY" if space == "GRAY" else "RGB")


@pytest.mark.parametrize(
    ("mode", "space", "claims"),
    [
        ("L", "sRGB", b""),
        ("RGB", "GRAY", b""),
        ("RGB", "LAB", b""),
        ("RGB", "sRGB", b"CMYK"),
        ("RGBA", "sRGB", b"GRAY"),
        ("RGB", "", b""),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_profiles_that_do_not_fit_are_dropped_and_said(
    tmp_path: Path, mode: str, space: str, claims: bytes, suffix: str
):
    data = profile(space, claims) if space else b"no profile at all" * 20
    Image.fromarray(pixels(4)).convert(mode).save(tmp_path / f"x.{suffix}", icc_profile=data)
    with pytest.warns(UserWarning, match="its colour profile .*; it is dropped"):
        picture = read_picture(tmp_path / f"x.{suffix}")
    assert picture.profile is None
    written = write_picture(tmp_path / "out", picture.values, picture)
    assert "icc_profile" not in Image.open(written).info


def test_a_grey_palette_keeps_the_profile_for_rgb(tmp_path: Path):
    grey = Image.fromarray(pixels(1)[..., 0]).convert("RGB").quantize(64)
    grey.save(tmp_path / "x.png", icc_profile=profile("sRGB"))
    picture = read_picture(tmp_path / "x.png")
    assert (picture.grey, picture.rgb) == (True, True)
    written = Image.open(write_picture(tmp_path / "out", picture.values, picture))
    assert (written.mode, written.info["icc_profile"]) == ("RGB", picture.profile)


def test_cmyk_and_lab_become_srgb(tmp_path: Path):
    """Lab by LittleCMS as PIL calls it; CMYK with a profile that cannot be used by PIL's formula, and this is said."""
    colour = Image.fromarray(np.kron(pixels(3, size=(5, 7)), np.ones((4, 4, 1), np.uint8)))
    lab = ImageCms.profileToProfile(
        colour, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tiff")
    back = ImageCms.profileToProfile(
        lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert np.array_equal(as_stored(read_picture(tmp_path / "lab.tiff")), np.asarray(back))

    cmyk = colour.convert("CMYK")
    cmyk.save(tmp_path / "x.tiff", icc_profile=profile("sRGB", b"CMYK"))
    with pytest.warns(
        UserWarning, match="does not fit CMYK pixels; it is dropped, and colours may be off"
    ):
        picture = read_picture(tmp_path / "x.tiff")
    assert np.array_equal(as_stored(picture), np.asarray(cmyk.convert("RGB")))
    written = Image.open(write_picture(tmp_path / "out", picture.values, picture))
    opened = ImageCms.ImageCmsProfile(BytesIO(written.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(opened)
    assert read_picture(tmp_path / "out.png").profile == picture.profile
