"""The command line from end to end, on small pictures with the small prior."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invguide.diagnostics.metrics import psnr
from invguide.images.reading import read_picture
from invguide.images.writing import encode_png, write_picture
from invguide.operators import GaussianBlur, Grayscale
from invguide.priors.checkpoints.embedded import EMBEDDED, load_embedded, weights_path
from invguide.restoration import measure
from invguide.restoration import restore as restoration
from invguide.restoration.demo import PHOTO
from invguide.restoration.tasks import TASKS, Options, find_task
from invguide.solver import Solver
from tiny import run

GUESS = ("--prior", "natural-tiny", "--steps", "3")  # the noise level is estimated
QUICK = (*GUESS, "--sigma-y", "0.05")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """The cat, 40 x 48 pixels."""
    path = tmp_path / "cat.png"
    Image.open(PHOTO).crop((40, 40, 136, 120)).resize((48, 40)).save(path)
    return path


def manifest(folder: Path) -> dict:
    text = (folder / "manifest.json").read_text()
    assert "NaN" not in text, "strict JSON"
    return json.loads(text)


def test_restore_writes_what_it_says(photo: Path, tmp_path: Path):
    out = tmp_path / "out"
    printed = run(
        "restore",
        photo,
        "--task",
        "denoise",
        *QUICK,
        "--samples",
        3,
        "--solver",
        "dps",
        "--out",
        out,
    )
    expected = {f"restored-{i}.png" for i in (1, 2, 3)} | {
        "mean.png",
        "std.png",
        "panel.png",
        "manifest.json",
    }
    assert {p.name for p in out.iterdir()} == expected
    assert f"written to {out}" in printed
    for line in (
        "48 x 40 pixels, colour, 8 bit",
        "Identity()",
        "0.05 (given)",
        "DPS, 3 steps, 3 samples",
    ):
        assert line in printed
    m = manifest(out)
    assert m["restore"]["sha256"]["input"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    weights = weights_path("natural-tiny").read_bytes()
    assert m["restore"]["sha256"]["weights"] == hashlib.sha256(weights).hexdigest()
    assert m["settings"]["solver"] == "DPS"
    assert m["settings"]["num_steps"] == 3
    assert (m["seed"], m["nfe"], m["sigma_y"], m["sigma_y_from"]) == (0, 3, 0.05, "user")
    assert {"torch", "invguide", "python"} <= set(m["versions"])
    assert m["seconds"] > 0
    assert np.shape(m["chi2"]) == (1, 3)
    assert m["input"] == str(photo)
    assert set(m["files"]) == expected - {"manifest.json"}


def test_denoising_denoises_and_estimates_the_noise(tmp_path: Path):
    clean = read_picture(PHOTO).values[..., 40:136, 40:136] * 0.8 + 0.1
    noisy = clean + 0.1 * torch.randn(clean.shape)
    array = (noisy[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    (tmp_path / "y.png").write_bytes(encode_png(array))
    out = tmp_path / "out"
    printed = run(
        "restore", tmp_path / "y.png", "--task", "denoise", "--prior", "natural-tiny", "--out", out
    )
    restored = read_picture(out / "restored.png").values
    assert float(psnr(restored, clean)) > float(psnr(noisy, clean)) + 5
    assert "(estimated)" in printed
    assert manifest(out)["sigma_y"] == pytest.approx(0.1, rel=0.1)
    assert manifest(out)["sigma_y_from"] == "estimate"
    assert manifest(out)["noise_estimate"]["trusted"]
    assert manifest(out)["noise_estimate"]["whiteness"] > 0.8
    assert manifest(out)["settings"]["solver"] == "PosteriorMean"


def test_noise_that_cannot_be_trusted_is_said(tmp_path: Path):
    """A picture enlarged after its noise: a warning that says what to pass, and the same in the manifest."""
    noisy = 0.5 + 0.1 * torch.randn(1, 3, 64, 64)
    large = torch.nn.functional.interpolate(noisy, scale_factor=2, mode="bilinear")
    write_picture(tmp_path / "y.png", large)
    out = tmp_path / "out"
    printed = run("restore", tmp_path / "y.png", "--task", "denoise", *GUESS, "--out", out)
    assert re.search(r"note.*the noise level is a guess.*pass --sigma-y NUMBER", printed)
    assert "estimated, not to be trusted" in printed
    assert not manifest(out)["noise_estimate"]["trusted"]


def test_noise_of_a_jpeg_file_counts_its_rounding(tmp_path: Path):
    clean = read_picture(PHOTO).values[..., :128, :128] * 0.8 + 0.1
    noisy = (clean + 0.05 * torch.randn(clean.shape)).clamp(0, 1)
    array = (noisy[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "y.jpg", quality=80)
    out = tmp_path / "out"
    printed = run("restore", tmp_path / "y.jpg", "--task", "denoise", *GUESS, "--out", out)
    assert "rounding of the JPEG file" in printed
    found = manifest(out)["noise_estimate"]
    total = np.hypot(found["sigma"], found["compression"])
    assert manifest(out)["sigma_y"] == pytest.approx(total)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_kind_comes_back_in_kind(tmp_path: Path, channels: int, bits: int):
    kind = np.uint8 if bits == 8 else np.uint16
    rng = np.random.default_rng(0)
    array = rng.integers(0, np.iinfo(kind).max, (33, 37, channels)).astype(kind)
    (tmp_path / "in.png").write_bytes(encode_png(array))
    run(
        "restore",
        tmp_path / "in.png",
        "--task",
        "denoise",
        *QUICK,
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    back, picture = (
        read_picture(tmp_path / "out" / "restored.png"),
        read_picture(tmp_path / "in.png"),
    )
    assert back.describe() == picture.describe()
    assert back.values.shape == picture.values.shape
    if channels in (2, 4):
        assert np.array_equal(back.alpha, array[..., -1])


@pytest.mark.parametrize("more", [(), ("--samples", "2", "--solver", "diffpir")])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_as_colour_is_restored_as_grey(tmp_path: Path, bits: int, more: tuple[str, ...]):
    """The same bits, three times over."""
    kind = np.uint8 if bits == 8 else np.uint16
    array = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (33, 37, 1)).astype(kind)
    for name, channels in (("grey", 1), ("rgb", 3)):
        (tmp_path / f"{name}.png").write_bytes(encode_png(array.repeat(channels, -1)))
        base = ("restore", tmp_path / f"{name}.png", "--task", "denoise", *QUICK, *more)
        run(*base, "--arrays", "--out", tmp_path / name)
    same = [np.load(tmp_path / name / "samples.npy") for name in ("grey", "rgb")]
    assert np.array_equal(*same)
    last = f"restored{'-2' if more else ''}.png"
    grey, rgb = (read_picture(tmp_path / name / last) for name in ("grey", "rgb"))
    assert rgb.rgb
    assert not grey.rgb
    assert torch.equal(grey.values, rgb.values)
    assert Image.open(tmp_path / "rgb" / last).mode == "RGB"


def test_larger_with_alpha(tmp_path: Path):
    array = np.random.default_rng(0).integers(0, 255, (20, 24, 4)).astype(np.uint8)
    array[..., 3] = 77
    (tmp_path / "in.png").write_bytes(encode_png(array))
    arguments = ("--task", "super-resolution", "--factor", "2", *QUICK, "--out", tmp_path / "out")
    run("restore", tmp_path / "in.png", *arguments)
    back = read_picture(tmp_path / "out" / "restored.png")
    assert back.size == (40, 48)
    assert back.alpha is not None
    assert (back.alpha == 77).all()


def test_colorize_gives_colours(photo: Path, tmp_path: Path):
    """With a prior that does not say that it knows no objects: the small one, as a file of somebody."""
    Image.open(photo).convert("L").save(tmp_path / "grey.png")
    colorize = ("restore", tmp_path / "grey.png", "--task", "colorize")
    said = run(*colorize, *QUICK, "--out", tmp_path / "out", code=2)
    assert "needs a prior that knows objects, and natural-tiny knows small crops only" in said
    assert not (tmp_path / "out").exists()
    prior = shutil.copy(weights_path("natural-tiny"), tmp_path)
    run(*colorize, *QUICK, "--prior", prior, "--out", tmp_path / "out")
    back = read_picture(tmp_path / "out" / "restored.png").values
    assert back.shape == (1, 3, 40, 48)
    luma = read_picture(tmp_path / "grey.png").values
    assert float((Grayscale()(back) - luma).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("task", sorted(TASKS))
def test_degrade_then_restore_as_it_advises(photo: Path, tmp_path: Path, task: str):
    more = ("--missing", "0.3") if task == "inpaint" else ()
    factor = ("--factor", "2") if task == "super-resolution" else ()
    if factor:
        Image.open(photo).resize((96, 80)).save(photo)
    y = tmp_path / "y.png"
    printed = run("degrade", photo, "--task", task, "--out", y, *more, *factor)
    advice = printed.strip().splitlines()[-1].removeprefix("restore with: invguide ").split()
    assert advice[:4] == ["restore", str(y), "--task", task]
    prior = shutil.copy(weights_path("natural-tiny"), tmp_path)  # a file may know objects
    run(*advice, "--prior", prior, "--steps", "2", "--out", tmp_path / "out")
    restored, clean = (read_picture(p) for p in (tmp_path / "out" / "restored.png", photo))
    assert restored.describe() == clean.describe()


def test_degrade_is_the_operator_with_noise(tmp_path: Path):
    y = tmp_path / "y.png"
    run(
        "degrade",
        PHOTO,
        "--task",
        "deblur",
        "--blur-sigma",
        "2",
        "--sigma-y",
        "0.03",
        "--seed",
        "5",
        "--out",
        y,
    )
    noise = read_picture(y).values - GaussianBlur(sigma=2.0)(read_picture(PHOTO).values)
    assert float(noise.std()) == pytest.approx(0.03, rel=0.02)
    assert abs(float(noise.mean())) < 0.001
    first = y.read_bytes()
    run(
        "degrade",
        PHOTO,
        "--task",
        "deblur",
        "--blur-sigma",
        "2",
        "--sigma-y",
        "0.03",
        "--seed",
        "5",
        "--out",
        y,
    )
    assert y.read_bytes() == first


def test_masked_pixels_do_not_matter(photo: Path, tmp_path: Path):
    """White is known: what the picture holds where the mask is black changes nothing."""
    mask = np.full((40, 48), 255, np.uint8)
    mask[10:20, 10:30] = 0
    (tmp_path / "mask.png").write_bytes(encode_png(mask[..., None]))
    (tmp_path / "inverse.png").write_bytes(encode_png(255 - mask[..., None]))
    other = np.asarray(Image.open(photo)).copy()
    other[mask == 0] = (255, 0, 255)
    Image.fromarray(other).save(tmp_path / "other.png")
    results = []
    for name, picture, more in (
        ("a", photo, ("--mask", tmp_path / "mask.png")),
        ("b", tmp_path / "other.png", ("--mask", tmp_path / "mask.png")),
        ("c", photo, ("--mask", tmp_path / "inverse.png", "--invert-mask")),
    ):
        printed = run(
            "restore", picture, "--task", "inpaint", *more, *QUICK, "--out", tmp_path / name
        )
        assert "white is known" in printed
        results.append((tmp_path / name / "restored.png").read_bytes())
    assert results[0] == results[1] == results[2]


def test_kernel_files_agree(photo: Path, tmp_path: Path):
    kernel = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], np.float64)
    np.save(tmp_path / "k.npy", kernel / 8)
    np.savetxt(tmp_path / "k.txt", kernel)
    np.savetxt(tmp_path / "k.csv", kernel, delimiter=",")
    (tmp_path / "k.png").write_bytes(encode_png((kernel * 60).astype(np.uint8)[..., None]))
    picture = read_picture(photo)
    expected = find_task("deblur", Options()).operator(Options(kernel=tmp_path / "k.npy"), picture)
    for name in ("k.txt", "k.csv", "k.png"):
        with pytest.warns(UserWarning, match="was divided by it"):
            found = find_task("motion_deblur", Options()).operator(
                Options(kernel=tmp_path / name), picture
            )
        assert torch.allclose(found(picture.values), expected(picture.values), atol=1e-6), name


def test_jpeg_quality_comes_from_the_file(photo: Path, tmp_path: Path):
    Image.open(photo).save(tmp_path / "y.jpg", quality=35)
    arguments = ("--prior", "natural-tiny", "--steps", "1", "--out", tmp_path / "out")
    printed = run("restore", tmp_path / "y.jpg", "--task", "jpeg", *arguments)
    assert "quality 35, 4:2:0" in printed
    assert "of the file's coefficients agree" in printed
    assert (tmp_path / "out" / "restored.png").exists()


def test_folder_goes_on_where_it_stopped(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.open(photo).save(folder / "a.png")
    Image.open(photo).rotate(90, expand=True).save(folder / "b.png")
    Image.open(photo).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / "c.png").write_text("broken")
    arguments = ("restore", folder, "--task", "denoise", *QUICK, "--out", out)
    printed = run(*arguments, code=1)
    assert {p.name for p in out.iterdir()} == {"a", "b.jpg", "b.png"}
    assert re.search(r"c\.png +FAILED", printed)
    assert "c.png is not a picture" in printed
    assert (
        printed.splitlines()[-1]
        == f"error: 1 of 4 pictures failed (see above); the others are in {out}"
    )
    assert "left out notes.txt" in printed
    assert read_picture(out / "b.png" / "restored.png").size == (48, 40)

    (folder / "c.png").unlink()
    (out / "b.jpg" / "manifest.json").unlink()  # as if it had been interrupted
    solved = []
    solve = restoration._run
    monkeypatch.setattr(restoration, "_run", lambda *a: solved.append(1) or solve(*a))
    printed = run(*arguments)
    assert len(solved) == 1
    assert printed.count("done already") == 4  # two lines, two rows of the table
    assert (out / "b.jpg" / "manifest.json").exists()

    printed = run(*arguments, "--seed", "3", code=2)
    assert "holds a run with other settings (seed: 0 there, 3 here)" in printed
    assert "or --overwrite" in printed
    assert len(solved) == 1
    run(*arguments, "--seed", "3", "--overwrite")
    assert len(solved) == 4
    Image.open(photo).rotate(180).save(folder / "a.png")
    assert "another input file" in run(*arguments, "--seed", "3", code=2)


def test_a_second_run_leaves_nothing_of_the_first(photo: Path, tmp_path: Path):
    base = ("restore", photo, "--task", "denoise", *QUICK, "--out", tmp_path / "out")
    run(*base, "--samples", "2", "--arrays")
    assert (tmp_path / "out" / "samples.npy").exists()
    assert np.load(tmp_path / "out" / "samples.npy").shape == (1, 2, 3, 40, 48)
    run(*base)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "restored.png",
        "panel.png",
        "manifest.json",
    }


def test_seeds(photo: Path, tmp_path: Path):
    base = ("restore", photo, "--task", "deblur", *QUICK, "--solver", "dps")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*base, "--seed", seed, "--out", tmp_path / name, "--quiet")
    a, b, c = ((tmp_path / n / "restored.png").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_settings_reach_the_solver(photo: Path, tmp_path: Path):
    more = ("--solver", "diffpir", "--set", "zeta=0.7", "--set", "schedule=exponential")
    run("restore", photo, "--task", "denoise", *QUICK, *more, "--out", tmp_path / "out")
    settings = manifest(tmp_path / "out")["settings"]
    assert (settings["solver"], settings["zeta"], settings["schedule"]) == (
        "DiffPIR",
        0.7,
        "exponential",
    )


def test_tiles_on_request_and_for_large_pictures(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = ("restore", photo, "--task", "denoise", *QUICK)
    arrays = {}
    for name, more in (("whole", ("--tile", 0)), ("tiles", ("--tile", 32)), ("auto", ())):
        if name == "auto":
            monkeypatch.setattr(measure, "WHOLE", 40 * 48 - 1)
            monkeypatch.setattr(measure, "LARGE_TILE", 32)
        printed = run(*base, *more, "--arrays", "--out", tmp_path / name)
        assert ("tiles     32 x 32, overlap 8" in printed) == (name != "whole")
        assert manifest(tmp_path / name)["restore"]["tile"] == (more[1] if more else "auto")
        arrays[name] = np.load(tmp_path / name / "samples.npy")
    assert np.array_equal(arrays["auto"], arrays["tiles"])
    difference = np.abs(arrays["tiles"] - arrays["whole"])
    assert 0 < difference.max() < 0.1  # tiles that small miss some of their surroundings
    assert "tile is 36; expected a multiple of 8" in run(*base, "--tile", 36, code=2)


def test_a_prior_of_one_size_restores_any(photo: Path, tmp_path: Path, monkeypatch):
    fixed = load_embedded("natural-tiny")
    fixed.shape = (3, 32, 32)
    monkeypatch.setattr(
        restoration.api,
        "load_prior",
        lambda prior, **_: fixed if isinstance(prior, str) else prior,
    )
    printed = run("restore", photo, "--task", "denoise", *QUICK, "--out", tmp_path / "out")
    assert "tiles     32 x 32" in printed
    assert read_picture(tmp_path / "out" / "restored.png").size == (40, 48)


def test_prior_from_a_file(photo: Path, tmp_path: Path):
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(weights_path("natural-tiny").read_bytes())
    for name, prior in (("a", "natural-tiny"), ("b", weights)):
        arguments = (
            "--prior",
            prior,
            "--steps",
            "2",
            "--sigma-y",
            "0.05",
            "--out",
            tmp_path / name,
        )
        run("restore", photo, "--task", "denoise", *arguments)
    assert (tmp_path / "a" / "restored.png").read_bytes() == (
        tmp_path / "b" / "restored.png"
    ).read_bytes()


def test_lists_name_everything():
    import invguide.operators as operators

    solvers, kinds, priors = run("solvers"), run("operators"), run("priors")
    for name, kind in Solver.registry.items():
        assert f"\n{name}  [" in "\n" + solvers
        if not kind.__module__.startswith("invguide.solvers"):
            continue
        summary = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        assert " ".join(summary.split()[:6]) in solvers
    assert "Bias: Mode seeking" in solvers
    assert "DPS  [needs a measurement or a reward, a differentiable operator" in solvers
    for name in operators.__all__:
        assert f"\n{name}" in "\n" + kinds
    assert "GaussianBlur(sigma, padding)  [linear]" in kinds
    assert "Identity()  [linear]" in kinds
    assert "JPEG(quality)  [nonlinear]" in kinds
    for task in TASKS:
        assert f"  {task} " in kinds
    for name in EMBEDDED:
        assert name in priors
    assert "1.3 MB" in priors


def test_verify_prints_a_table():
    printed = run("verify", "hqs", "diffpir", "--samples", "20", "--steps", "3")
    assert "| DiffPIR" in printed
    assert "| (exact)" in printed
    printed = run("verify", "hqs", "--samples", "10", "--steps", "2", "--target", "gaussian-2d")
    assert "mixture" not in printed


@pytest.mark.slow
def test_bench_forwards(tmp_path: Path):
    """The tables are tested elsewhere; here, that what is asked for arrives."""
    photos = np.stack([np.asarray(Image.open(PHOTO).resize((32, 32)))] * 2)
    np.savez(tmp_path / "photos.npz", img_32=photos)
    base = (
        "--data",
        tmp_path / "photos.npz",
        "--size",
        32,
        "--prior",
        "natural-tiny",
        "--task",
        "deblur",
    )
    printed = run("bench", "restore", *base, "--photos", 1, "--solver", "hqs")
    assert "TV, best weight" in printed
    assert "HQS" in printed
    assert "DPS" not in printed
    assert "SR x2" not in printed
    printed = run("bench", "restore", *base, "--photos", 1, "--solver", "hqs", "--no-tv")
    assert "TV" not in printed
    rows = ("--solver", "hqs", "--level", 25, "--level", 50, "--no-tv")
    printed = run("bench", "denoise", *base[:-2], "--photos", 1, *rows)
    assert "25 / 255 | 50 / 255" in printed
    assert "HQS" in printed
    assert "TV" not in printed
    printed = run("bench", "driver", "--prior", "natural-tiny", "--steps", 0, code=2)
    assert printed.startswith("error: steps=0, repeats=9")
    assert "unknown task 'deblu'" in run("bench", "peers", *base[:-1], "deblu", code=2)
    arguments = ("--photos", 9, "--samples", 2)
    assert "photos is 9; the data file has 2" in run(
        "bench", "calibration", *base, *arguments, code=2
    )
    assert "cannot be read" in run("bench", "restore", "--data", tmp_path / "none.npz", code=2)


@pytest.mark.slow
def test_demo(tmp_path: Path):
    out = tmp_path / "demo"
    printed = run("demo", "--prior", "natural-tiny", "--steps", "2", "--out", out)
    assert {"panel.png", "std.png", "mean.png", "measurement.png"} <= {
        p.name for p in out.iterdir()
    }
    assert "PSNR 26.4 dB measured" in printed
    assert f"look at {out / 'panel.png'}" in printed


def test_the_photograph_has_a_licence():
    note = (PHOTO.parent / "README.md").read_text("utf-8")
    for file in PHOTO.parent.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in note
    assert "CC0" in note


# ---- as a program


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "invguide", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=900, env=os.environ
    )


@pytest.mark.slow
def test_program_from_another_folder(photo: Path):
    done = program("restore", photo.name, "--task", "denoise", *QUICK, cwd=photo.parent)
    assert done.returncode == 0, done.stderr
    assert (photo.parent / "cat-restored" / "manifest.json").exists()
    assert done.stdout.startswith("cat.png: 48 x 40 pixels")
    assert done.stderr == ""


def test_program_reports_errors_in_one_line(tmp_path: Path):
    done = program("restore", "none.png", "--task", "denoise", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such file or folder: none.png\n"


def test_help_is_light():
    code = (
        "import sys; sys.argv = ['invguide', '--help']\n"
        "from invguide.cli.commands import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "heavy = {'PIL', 'deepinv', 'kornia', 'matplotlib', 'scipy', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for command in (
        "restore",
        "degrade",
        "demo",
        "solvers",
        "operators",
        "priors",
        "verify",
        "bench",
    ):
        assert f"\n  {command} " in done.stdout
