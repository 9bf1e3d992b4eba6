"""Files as people have them: foreign kinds, holes, icons, hostile ones; one file in the format asked for."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import invguide as ig
from invguide.cli.terminal import app
from invguide.errors import CheckpointError, InputError
from invguide.images import picture_files
from invguide.images import reading as images
from invguide.images.picture_files import FORMATS, readable
from invguide.images.reading import read_picture
from invguide.images.writing import write_picture
from invguide.priors.checkpoints import embedded
from invguide.priors.networks.unet import UNet
from invguide.priors.wrappers.padding import Padded
from invguide.restoration.folder import list_pictures
from invguide.restoration.masks import read_mask
from invguide.restoration.restore import restore_picture
from invguide.restoration.settings import Job, Settings

RAMP = np.linspace(0.2, 0.8, 40 * 48).reshape(40, 48)
PHOTO = np.stack([255 * RAMP, 255 * RAMP[::-1], 255 * RAMP[:, ::-1]], -1).astype(np.uint8)
QUICK = ("--prior", "natural-tiny", "--steps", "2", "--sigma-y", "0.05")


def run(*arguments: str | Path) -> tuple[int, list[str]]:
    """Exit code, and the lines of standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr.splitlines()


def tiff(path: Path, array: np.ndarray, form: int) -> Path:
    """An uncompressed TIFF of any kind of numbers (H, W, C), `form` as tag 339: 1 unsigned, 2 signed, 3 float."""
    height, width, channels = array.shape
    data = array.tobytes()
    tags = [(256, [width]), (257, [height]), (258, [8 * array.itemsize] * channels), (259, [1])]
    tags += [(262, [2 if channels == 3 else 1]), (273, [8]), (277, [channels]), (278, [height])]
    tags += [(279, [len(data)]), (284, [1]), (339, [form] * channels)]
    start = 8 + len(data)
    extra, place, entries = b"", start + 2 + 12 * len(tags) + 4, b""
    for tag, values in tags:
        content = struct.pack(f"<{len(values)}I", *values)
        if len(content) > 4:
            content, extra = struct.pack("<I", place + len(extra)), extra + content
        entries += struct.pack("<HHI", tag, 4, len(values)) + content
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + extra
    path.write_bytes(struct.pack("<2sHI", b"II", 42, start) + data + directory)
    return path


# ---- what is read, and what is said of the rest


@pytest.mark.parametrize(
    ("array", "form", "text"),
    [
        ((RAMP * 9e4).astype("<u4")[..., None].repeat(3, -1), 1, "3 channels of 32-bit unsigned"),
        (RAMP.astype("<c8")[..., None], 6, "1 channel of 64-bit complex"),
        (
            PHOTO[..., :1].repeat(5, -1),
            1,
            "5 channels of 8-bit unsigned integers; expected 1 to 4",
        ),
        (
            (RAMP * 9e4 - 4e4).astype("<i2")[..., None],
            2,
            "integers from -22000 to 32000; expected 0",
        ),
    ],
)
def test_kinds_of_tiff_are_named(tmp_path: Path, array: np.ndarray, form: int, text: str):
    with pytest.raises(InputError, match=text):
        read_picture(tiff(tmp_path / "a.tiff", array, form))


def test_no_other_program_is_asked_to_open_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PIL hands PostScript to Ghostscript; the name of the file does not matter."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # fails where it is called
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    with pytest.raises(InputError, match="is not a picture that can be read; expected one of"):
        read_picture(tmp_path / "a.png")
    assert {"EPS", "PSD", "WMF"}.isdisjoint(FORMATS.values())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("option", ["", "--mask", "--kernel"])
def test_pipes_do_not_wait(tmp_path: Path, option: str):
    pipe, photo = tmp_path / "pipe.png", tmp_path / "photo.png"
    os.mkfifo(pipe)
    Image.fromarray(PHOTO).save(photo)
    task = {"": "denoise", "--mask": "inpaint", "--kernel": "deblur"}[option]
    files = (pipe,) if not option else (photo, option, pipe)
    for verb in ("restore", "plan"):
        code, errors = run(verb, *files, "--task", task, *QUICK, "--out", tmp_path / "out")
        assert code == 2
        assert "pipe.png is no regular file (a pipe or a device)" in errors[-1]


def test_many_pixels_in_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("L", (5000, 5000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"has 25 million pixels in 2\d kB: .* cut it up first"):
        read_picture(tmp_path / "bomb.png")
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    monkeypatch.setattr(picture_files, "_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"which take at least .* GB, and this machine has"):
        read_picture(tmp_path / "photo.png")


def test_a_folder_names_what_is_left_out(tmp_path: Path):
    for name, form in (("a.png", "PNG"), ("b.jfif", "JPEG"), ("c.webp", "WEBP")):
        Image.fromarray(PHOTO).save(tmp_path / name, form)
    for name in ("notes.txt", "d.psd", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    with pytest.warns(UserWarning, match=r"left out d\.psd, more/, notes\.txt: folders inside"):
        found = list_pictures(tmp_path)
    assert [f.name for f in found] == ["a.png", "b.jfif", "c.webp"]


# ---- holes and small pictures


def test_missing_values_may_be_missing(tmp_path: Path):
    values = RAMP.astype(np.float32)
    values[10:14, 20:24] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    mask = np.full(RAMP.shape, 255, np.uint8)
    mask[9:15, 19:25] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="16 NaN or infinite values"):
        read_picture(tmp_path / "a.tiff")
    inpaint = ("--task", "inpaint", "--mask", tmp_path / "mask.png", *QUICK, "--quiet")
    code, errors = run("restore", tmp_path / "a.tiff", *inpaint, "--out", tmp_path / "out")
    assert code == 0, errors
    restored = np.asarray(Image.open(tmp_path / "out" / "restored.tiff"))
    assert np.isfinite(restored).all()
    error, hole = np.abs(restored - RAMP), mask == 0
    assert error[~hole].max() < 0.1
    assert error[hole].mean() < 0.3, "0.5 is what zeros in the hole would have"
    mask[9:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, errors = run("restore", tmp_path / "a.tiff", *inpaint, "--out", tmp_path / "out")
    assert code == 2
    assert (
        "8 NaN or infinite values where the mask marks pixels as known (first at row 10"
        in errors[-1]
    )


@pytest.mark.parametrize("size", [(16, 16), (12, 60), (1, 1)])
def test_small_pictures_are_padded(tmp_path: Path, size: tuple[int, int]):
    Image.fromarray(PHOTO).resize(size[::-1]).save(tmp_path / "icon.png")
    denoise = ("--task", "deblur", *QUICK, "--quiet")
    code, errors = run("restore", tmp_path / "icon.png", *denoise, "--out", tmp_path / "out")
    assert code == 0, errors
    assert read_picture(tmp_path / "out" / "restored.png").size == size


def test_padding_makes_any_size_valid():
    prior = ig.load_prior("natural-tiny")
    assert Padded(prior, 32).min_size == 1
    assert Padded(prior, 8).min_size == prior.min_size == 32


# ---- what a file tells besides its pixels


def with_keepsakes(path: Path) -> Path:
    told = Image.Exif()
    told[0x010F], told[0x0112] = "A camera", 6
    told[0x8769] = {0x829A: (1, 60), 0xA002: 4000}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(PHOTO).save(path, quality=90, exif=told, dpi=(300, 300), icc_profile=profile)
    return path


@pytest.mark.parametrize("name", ["new.jpg", "new.png", "new.tif", "new.webp"])
def test_one_file_in_the_format_of_its_name(tmp_path: Path, name: str):
    source, out = with_keepsakes(tmp_path / "photo.jpg"), tmp_path / name
    code, errors = run("restore", source, "--task", "denoise", *QUICK, "--quiet", "--out", out)
    assert code == 0, errors
    assert {p.name for p in tmp_path.iterdir()} == {"photo.jpg", name}
    with Image.open(out) as written, Image.open(source) as read:
        assert written.format == readable()[out.suffix]
        assert written.size == read.size[::-1], "upright"
        told = written.getexif()
        assert told[0x010F] == "A camera"
        assert told.get(0x0112, 1) == 1
        assert told.get_ifd(0x8769)[0x829A] == (1, 60)
        assert 0xA002 not in told.get_ifd(0x8769)
        assert written.info["icc_profile"] == read.info["icc_profile"]
        if written.format != "WEBP":  # has no place for it
            assert written.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_what_one_file_cannot_be(tmp_path: Path):
    photo = with_keepsakes(tmp_path / "photo.jpg")
    base = ("restore", photo, "--task", "denoise", *QUICK)
    for more, text in (
        (("--out", photo), "is the input itself"),
        (("--out", tmp_path / "a.gif"), ".gif files are not written"),
        (("--out", tmp_path / "a.jpg", "--samples", "2"), "--samples is 2: give a folder"),
        (("--out", tmp_path / "a.jpg", "--arrays"), "--arrays are files too: give a folder"),
    ):
        code, errors = run(*base, *more)
        assert code == 2
        assert text in errors[-1]
    code, errors = run("restore", tmp_path, *base[2:], "--out", tmp_path / "a.jpg")
    assert "is a folder: give a folder" in errors[-1]


def test_damaged_camera_data_does_not_matter(tmp_path: Path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(40))
    Image.fromarray(PHOTO).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").kept.exif is None
    picture = read_picture(with_keepsakes(tmp_path / "b.jpg"))
    again = read_picture(write_picture(tmp_path / "c", picture.values, picture))
    assert again.kept.exif == picture.kept.exif
    assert again.kept.dpi == pytest.approx((300, 300), abs=0.01)
    assert isinstance(images.Picture(torch.zeros(1, 1, 2, 2)).kept.exif, type(None))


# ---- questions first


def test_levels_of_0_to_255(tmp_path: Path):
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    code, errors = run("restore", tmp_path / "a.png", "--task", "denoise", "--sigma-y", "15")
    assert code == 2
    assert "sigma_y is 15, and white is 1" in errors[-1]
    assert "--sigma-y 0.05882" in errors[-1]


def test_a_mask_that_is_upside_down(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "hole.png")
    Image.fromarray(255 - mask).save(tmp_path / "right.png")
    scattered = (np.random.default_rng(0).random((60, 80)) < 0.1) * 255
    Image.fromarray(scattered.astype(np.uint8)).save(tmp_path / "dots.png")
    for name in ("right.png", "dots.png"):
        read_mask(tmp_path / name, (60, 80))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"leaves 16\.7% of the picture .* use --invert-mask"):
        read_mask(tmp_path / "hole.png", (60, 80))


def test_a_run_of_hours_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from invguide.restoration import patience

    monkeypatch.setattr(patience, "LONG_WORK", 1)
    monkeypatch.setattr(patience, "HOUR", 1e-9)
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    settings = Settings(
        "denoise", sigma_y=0.05, prior="natural-tiny", solver_settings={"num_steps": 2}
    )
    asked: list[str] = []
    job = Job.prepare(settings, lambda line: None, progress=False)
    job.confirm = lambda text: bool(asked.append(text))
    with pytest.raises(InputError, match="not begun: it takes about"):
        restore_picture(job, tmp_path / "a.png", tmp_path / "out", resume=False)
    assert "(48 x 40), 2 steps" in asked[0]
    job.confirm = None
    with pytest.warns(UserWarning, match="this takes about"):
        assert restore_picture(job, tmp_path / "a.png", tmp_path / "out", resume=False)


def test_plan_takes_every_option_of_restore():
    import inspect

    from invguide.cli import restore as cli

    restore, plan = (set(inspect.signature(f).parameters) for f in (cli.restore, cli.plan))
    assert restore == plan


# ---- weights of ours


def test_sizes_of_weights_come_before_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built: list[torch.device] = []

    class Watched(UNet):
        def __init__(self, **config: object) -> None:
            super().__init__(**config)  # pyright: ignore[reportArgumentType]
            built.append(next(self.parameters()).device)

    monkeypatch.setattr(embedded, "UNet", Watched)
    with_header = embedded.weights_path("natural-tiny")
    weights = load_file(with_header)
    from safetensors import safe_open

    with safe_open(with_header, "pt") as file:
        header = file.metadata()
    network = json.loads(header["network"])
    for changed in (
        {"channels": [4096] * 3},
        {"channels": [64] * 1000},
        {"blocks": 10**9},
        {"embedding": 10**12},
        {"blocks": 1.5},
        {"image_channels": -3},
    ):
        told = {**header, "network": json.dumps({**network, **changed})}
        save_file(weights, tmp_path / "forged.safetensors", told)
        with pytest.raises(CheckpointError, match="cannot be used"):
            ig.load_prior(tmp_path / "forged.safetensors")
    assert {d.type for d in built} <= {"meta"}
    save_file(weights, tmp_path / "forged.safetensors", {**header, "sigma_data": "-1"})
    with pytest.raises(CheckpointError, match="sigma_data is -1"):
        ig.load_prior(tmp_path / "forged.safetensors")
