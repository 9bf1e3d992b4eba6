"""Masks as people make them: brushes of any editor, JPEG, alpha, low values; photographs are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from invguide.errors import InputError
from invguide.restoration.demo import PHOTO
from invguide.restoration.masks import read_mask
from tiny import run

SIZE = (120, 160)


def drawn(scale: int = 1) -> Image.Image:
    """A stroke, a thin line and a disc, black on white."""
    image = Image.new("L", (160 * scale, 120 * scale), 255)
    draw = ImageDraw.Draw(image)
    s = scale
    draw.line([(10 * s, 10 * s), (80 * s, 100 * s), (150 * s, 30 * s)], fill=0, width=9 * s)
    draw.line([(5 * s, 110 * s), (60 * s, 90 * s)], fill=0, width=s)
    draw.ellipse([110 * s, 80 * s, 135 * s, 105 * s], fill=0)
    return image


@pytest.fixture
def white() -> np.ndarray:
    return np.asarray(drawn()) > 0


def read(path: Path, **more: bool) -> np.ndarray:
    return read_mask(path, SIZE, **more)[0].numpy()


@pytest.mark.filterwarnings("error:mask")
@pytest.mark.parametrize("name", ["m.png", "m.bmp", "m.gif", "m.tiff"])
def test_black_and_white_needs_no_word(tmp_path: Path, white: np.ndarray, name: str):
    for mode in ("L", "RGB", "1", "RGBA", "P"):
        if (mode, name) == ("RGBA", "m.gif"):
            continue
        drawn().convert(mode).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), white), mode
        assert np.array_equal(read(tmp_path / name, invert=True), ~white), mode
    Image.fromarray(white.astype(np.uint16) * 65535).save(tmp_path / "m16.png")
    assert np.array_equal(read(tmp_path / "m16.png"), white)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (0, 127),
        (128, 255),
        (254, 255),
        ((0, 0, 0), (255, 0, 0)),
        ((0, 0, 255), (9, 255, 9)),
    ],
)
@pytest.mark.parametrize("invert", [False, True])
def test_two_values_are_two_values(
    tmp_path: Path, white: np.ndarray, low: object, high: object, invert: bool
):
    array = np.where(white[..., None], high, low).astype(np.uint8)
    Image.fromarray(array.squeeze()).save(tmp_path / "m.png")
    with pytest.warns(UserWarning, match=r"has the two values .* taken for black and white"):
        found = read(tmp_path / "m.png", invert=invert)
    assert np.array_equal(found, white != invert)


def test_the_hole_of_a_photograph_with_alpha(tmp_path: Path, white: np.ndarray):
    photo = np.asarray(Image.open(PHOTO).convert("RGB").resize((160, 120)))
    Image.fromarray(np.dstack([photo, white.astype(np.uint8) * 255])).save(tmp_path / "m.png")
    share = f"{white.mean():.1%}"
    with pytest.warns(
        UserWarning, match=f"from its alpha channel: the {share} of pixels that are opaque"
    ):
        assert np.array_equal(read(tmp_path / "m.png"), white)
    with pytest.warns(UserWarning, match="alpha channel"):
        assert np.array_equal(read(tmp_path / "m.png", invert=True), ~white)
    # Black and white beside alpha: both count. An alpha that is the same everywhere: only colours do.
    both = np.dstack([white.astype(np.uint8) * 255] * 3 + [np.full(SIZE, 255)]).astype(np.uint8)
    both[:20, :, 3] = 0
    Image.fromarray(both).save(tmp_path / "m.png")
    with pytest.warns(UserWarning, match="missing where they are black or transparent"):
        found = read(tmp_path / "m.png")
    assert np.array_equal(found, white & (np.arange(120) >= 20)[:, None])
    both[..., 3] = 77
    Image.fromarray(both).save(tmp_path / "m.png")
    assert np.array_equal(read(tmp_path / "m.png"), white)


@pytest.mark.parametrize("invert", [False, True])
def test_soft_edges_are_missing_and_said(tmp_path: Path, invert: bool):
    """Eight times as fine and scaled down, as brushes are drawn: whatever the brush touched is not known."""
    image = drawn(8).resize((160, 120), Image.Resampling.BOX)
    if invert:
        image = image.point(lambda v: 255 - v)
    image.save(tmp_path / "m.png")
    touched = np.asarray(image) != (0 if invert else 255)
    greys = int((touched & (np.asarray(image) != (255 if invert else 0))).sum())
    said = r"has soft edges: (\d+) pixels"
    with pytest.warns(UserWarning, match=said) as notes:
        found = read(tmp_path / "m.png", invert=invert)
    assert np.array_equal(found, ~touched)
    counted = int(str(notes[0].message).split("edges: ")[1].split()[0])
    almost_black = int((np.abs(np.asarray(image).astype(int) - (255 if invert else 0)) < 13).sum())
    black = int((np.asarray(image) == (255 if invert else 0)).sum())
    assert counted == greys - (almost_black - black)  # those within 5 % of black are black


@pytest.mark.filterwarnings("ignore:mask .* has soft edges")
@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_jpeg_masks_lose_only_what_is_near_an_edge(
    tmp_path: Path, white: np.ndarray, quality: int
):
    drawn().save(tmp_path / "m.jpg", quality=quality)
    found = read(tmp_path / "m.jpg")
    stroke = white.copy()
    stroke[85:115, :65] = True  # JPEG may well lose a line of one pixel
    assert not (found & ~stroke).any()
    blocks = np.asarray(drawn().reduce(8)) == 255  # blocks of 8 x 8 without any black
    clean = np.kron(blocks, np.ones((8, 8), bool))
    near = np.asarray(Image.fromarray(~white).filter(ImageFilter.MaxFilter(9)))
    assert found[clean & ~near].all()


def test_greys_that_are_no_edges_are_refused(tmp_path: Path):
    photo = Image.open(PHOTO).resize((160, 120))
    photo.save(tmp_path / "photo.png")
    with pytest.raises(
        InputError, match=r"is grey in \d+% of its pixels.*\(is it a photograph\?\)"
    ):
        read(tmp_path / "photo.png")
    faint = Image.fromarray(100 + np.asarray(photo.convert("L")) // 8)
    faint.save(tmp_path / "faint.png")
    with pytest.raises(
        InputError, match=r"has values from 0\.39.*hardly apart.*raise its contrast"
    ):
        read(tmp_path / "faint.png")
    labels = np.kron(np.arange(12).reshape(3, 4) % 3, np.ones((40, 40)))
    Image.fromarray((labels * 127).astype(np.uint8)).save(tmp_path / "labels.png")
    with pytest.raises(InputError, match="these are no soft edges"):
        read(tmp_path / "labels.png")
    scattered = Image.fromarray(np.random.default_rng(0).random((60, 80)) < 0.3).convert("L")
    scattered.resize((160, 120), Image.Resampling.BILINEAR).save(tmp_path / "scaled.png")
    with pytest.raises(InputError, match="these are no soft edges"):
        read(tmp_path / "scaled.png")


def test_one_value_is_none(tmp_path: Path):
    for value, words in ((255, "every pixel as known"), (0, "no pixel as known")):
        image = Image.new("RGB", (160, 120), (value,) * 3)
        for name in ("m.png", "m.jpg"):
            image.save(tmp_path / name, quality=40)
            with pytest.raises(InputError, match=words):
                read(tmp_path / name)


def test_the_command_line_says_it_once(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.open(PHOTO).resize((160, 120)).save(tmp_path / "in" / f"{name}.png")
    drawn(4).resize((160, 120), Image.Resampling.BOX).save(tmp_path / "m.png")
    base = ("restore", tmp_path / "in", "--task", "inpaint", "--mask", tmp_path / "m.png")
    quick = ("--prior", "natural-tiny", "--steps", "1", "--out", tmp_path / "out")
    assert run(*base, *quick).count("note: mask") == 1
