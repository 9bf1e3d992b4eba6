"""Bad input: one line that begins with "error:", says what is wrong and what to do, and exit code 2."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import invguide as ig
from invguide.cli.terminal import app
from invguide.errors import CheckpointError, CompatibilityError, InputError, ShapeError
from invguide.forward_operator import Operator
from invguide.operators import Blur, GaussianBlur, Identity, Inpainting
from invguide.priors.checkpoints import embedded
from invguide.solver import Solver

TINY = ("--prior", "natural-tiny", "--steps", "2", "--quiet")
QUICK = {"progress": False, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, masks and kernels, good and bad."""
    base = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    photo = rng.integers(60, 200, (32, 40, 3)).astype(np.uint8)
    Image.fromarray(photo).save(base / "photo.png")
    Image.fromarray(photo[:20, :20]).save(base / "small.png")
    (base / "text.png").write_text("hello")
    data = (base / "photo.png").read_bytes()
    (base / "short.png").write_bytes(data[: len(data) // 2])
    for name, values in (
        ("known", np.full((32, 40), 255)),
        ("unknown", np.zeros((32, 40))),
        ("other-size", np.full((30, 40), 255)),
        ("half", (np.arange(32 * 40).reshape(32, 40) % 8 == 0) * 255),
    ):
        Image.fromarray(values.astype(np.uint8)).save(base / f"mask-{name}.png")
    for name, kernel in (
        ("even", np.full((4, 4), 1 / 16)),
        ("scaled", np.full((3, 3), 1.0)),
        ("wide", np.full((3, 41), 1 / 123)),
        ("zero", np.zeros((3, 3))),
        ("cube", np.full((3, 3, 3), 1 / 27)),
    ):
        np.save(base / f"kernel-{name}.npy", kernel)
    (base / "kernel-text.txt").write_text("a b c")
    broken = np.full((40, 40), 0.5, np.float32)
    broken[1, 2] = np.nan
    Image.fromarray(broken).save(base / "nan.tiff")
    (base / "empty").mkdir()
    (base / "file").write_text("in the way")
    weights = embedded.weights_path("natural-tiny").read_bytes()
    (base / "cut.safetensors").write_bytes(weights[:100_000])
    return base


def run(folder: Path, *arguments: str | Path) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error; run in the folder of the pictures."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
    finally:
        os.chdir(before)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr.splitlines()


CASES = {
    "missing file": ("restore none.png --task denoise", "no such file or folder: none.png"),
    "no image": ("restore text.png --task denoise", "text.png is not a picture that can be read; expected one of"),
    "truncated image": ("restore short.png --task denoise", "short.png is damaged: image file is truncated"),
    "NaN": ("restore nan.tiff --task denoise", "1 NaN or infinite values (first at row 1, column 2)"),
    "empty folder": ("restore empty --task denoise", "folder empty has no pictures ("),
    "mask missing": ("restore photo.png --task inpaint", "the task inpaint needs --mask FILE: white where"),
    "mask not there": ("restore photo.png --task inpaint --mask none.png", "no such file: none.png"),
    "mask of another size": (
        "restore photo.png --task inpaint --mask mask-other-size.png",
        "mask mask-other-size.png is 40 x 30 pixels and the picture 40 x 32; they must be equal: resize the mask",
    ),
    "all known": (
        "restore photo.png --task inpaint --mask mask-known.png",
        "marks every pixel as known (white), so nothing is missing: use --task denoise",
    ),
    "all unknown": (
        "restore photo.png --task inpaint --mask mask-unknown.png",
        "marks no pixel as known (white); is it the other way round? Use --invert-mask",
    ),
    "too few known for auto": (
        "restore photo.png --task inpaint --mask mask-half.png",
        "the noise cannot be estimated: no block of 8 x 8 pixels has",
    ),
    "even kernel": (
        "restore photo.png --task deblur --kernel kernel-even.npy",
        "kernel has the even size 4 x 4, so no centre pixel; expected odd sizes: pad it",
    ),
    "kernel larger than the image": (
        "restore photo.png --task deblur --kernel kernel-wide.npy",
        "kernel kernel-wide.npy is 41 x 3 pixels, larger than the picture (40 x 32); cut it",
    ),
    "kernel of zeros": ("restore photo.png --task deblur --kernel kernel-zero.npy", "kernel sums to 0; expected"),
    "kernel of three axes": ("restore photo.png --task deblur --kernel kernel-cube.npy", "expected two axes (H, W)"),
    "kernel of words": ("restore photo.png --task deblur --kernel kernel-text.txt", "kernel-text.txt cannot be read"),
    "kernel not there": ("restore photo.png --task deblur --kernel none.npy", "no such file: none.npy"),
    "kernel and sigma": (
        "restore photo.png --task deblur --kernel kernel-even.npy --blur-sigma 2",
        "--kernel and --blur-sigma are both given; give one",
    ),
    "negative sigma_y": ("restore photo.png --task denoise --sigma-y -0.1", "sigma_y is -0.1; expected a noise"),
    "sigma_y no number": ("restore photo.png --task denoise --sigma-y much", "--sigma-y is 'much'; expected a number"),
    "sigma_y not finite": ("restore photo.png --task denoise --sigma-y nan", "sigma_y is nan; expected a noise"),
    "unknown solver": ("restore photo.png --task denoise --solver dsp", "unknown solver 'dsp'; did you mean 'DPS'?"),
    "unknown task": ("restore photo.png --task deblurr", "unknown task 'deblurr'; did you mean 'deblur'?"),
    "far task": ("restore photo.png --task xyz", "unknown task 'xyz'; choose one of: colorize, deblur, denoise"),
    "unknown prior": ("restore photo.png --task denoise --prior naturl", "did you mean 'natural'?"),
    "weights not there": ("restore photo.png --task denoise --prior x.safetensors", "weights file x.safetensors"),
    "truncated weights": (
        "restore photo.png --task denoise --prior cut.safetensors",
        "cut.safetensors cannot be read as weights (SafetensorError",
    ),
    "option of another task": (
        "restore photo.png --task denoise --factor 2",
        "--factor is not used by the task denoise, which takes no options",
    ),
    "unknown setting": (
        "restore photo.png --task denoise --solver dps --set guidance_scal=2",
        "DPS has no setting 'guidance_scal'; did you mean 'guidance_scale'?",
    ),
    "setting without value": ("restore photo.png --task denoise --set lam", "expected NAME=VALUE"),
    "setting of another type": (
        "restore photo.png --task denoise --solver hqs --set lam=big",
        "setting lam='big'; expected such as",
    ),
    "no steps": ("restore photo.png --task denoise --steps 0", "num_steps is 0; expected at least 1"),
    "no samples": ("restore photo.png --task denoise --samples 0", "--samples is 0; expected at least 1"),
    "output is a file": ("restore photo.png --task denoise --out file", "output folder file cannot be written to"),
    "quality unknown": ("restore photo.png --task jpeg", "the task jpeg needs --quality 1..100"),
    "quality out of range": ("restore photo.png --task jpeg --quality 200", "quality=200.0; expected a number from 1"),
    "blur of no width": ("restore photo.png --task deblur --blur-sigma 0", "sigma is 0.0; expected a number of pixels"),
    "factor of one": ("restore photo.png --task super-resolution --factor 1", "expected a whole number from 2 to 1000"),
    "unknown filter": (
        "restore photo.png --task super-resolution --filter bicubik",
        "filter is 'bicubik'; did you mean 'bicubic'?",
    ),
    "unknown command": ("restor photo.png", "No such command 'restor'"),
    "unknown option": ("restore photo.png --task denoise --taks x", "--taks"),
    "argument missing": ("restore", "Missing argument 'IN'"),
    "number expected": ("restore photo.png --task denoise --samples many", "Invalid value for '--samples'"),
    "degrade: missing file": ("degrade none.png --task denoise", "no such file: none.png"),
    "degrade: negative noise": ("degrade photo.png --task denoise --sigma-y -1", "sigma_y is -1; expected"),
    "degrade: onto itself": ("degrade photo.png --task denoise --out photo.png", "is the input itself"),
    "degrade: all missing": ("degrade photo.png --task inpaint --missing 1", "expected a number between 0 and 1"),
    "degrade: missing elsewhere": ("degrade photo.png --task deblur --missing 0.5", "--missing is for --task inpaint"),
    "verify: unknown target": ("verify dps --target mixtur", "unknown target 'mixtur'; did you mean"),
    "verify: unknown solver": ("verify dsp", "unknown solver 'dsp'; did you mean 'DPS'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_exit_code_2(folder: Path, case: str):
    line, expected = CASES[case]
    arguments = line.split()
    if arguments[0] == "restore" and len(arguments) > 2:
        defaults = {"--prior": "natural-tiny", "--steps": "2", "--out": "out"}
        arguments += [x for k, v in defaults.items() if k not in arguments for x in (k, v)]
        arguments += ["--quiet"]
    code, _, errors = run(folder, *arguments)
    assert code == 2, errors
    assert [e for e in errors if not e.startswith("note: ")] == errors[-1:]
    assert errors[-1].startswith("error: ")
    assert expected in errors[-1]
    assert not (folder / "out" / "manifest.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(folder: Path):
    code, _, errors = run(
        folder, "restore", "photo.png", "--task", "denoise", *TINY, "--device", "cuda"
    )
    assert code == 2
    assert errors == ["error: device 'cuda' cannot be used here; use 'cpu' or 'auto'"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(folder: Path, tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    arguments = ("restore", "photo.png", "--task", "denoise", *TINY, "--out", locked / "out")
    code, _, errors = run(folder, *arguments)
    assert code == 2
    assert "cannot be written to: Permission denied; use another --out" in errors[-1]


def test_what_is_done_is_said(folder: Path, tmp_path: Path):
    """A kernel of another sum, and exact data, are no errors: a note says what is done."""
    deblur = ("restore", "photo.png", "--task", "deblur", *TINY)
    code, _, notes = run(folder, *deblur, "--kernel", "kernel-scaled.npy", "--out", tmp_path / "a")
    assert code == 0, notes
    assert notes == ["note: Blur: kernel summed to 9 and was divided by it, so that it sums to 1"]
    exact = ("restore", "photo.png", "--task", "denoise", *TINY, "--sigma-y", "0")
    code, _, notes = run(folder, *exact, "--out", tmp_path / "b")
    assert code == 0, notes
    assert len(notes) == 1
    assert notes[0].startswith("note: sigma_y is 0 (exact data): solved as Gaussian noise of 0.00")


def test_resume_under_other_settings(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    base = ("restore", "photo.png", "--task", "deblur", *TINY, "--out", out)
    assert run(folder, *base)[0] == 0
    assert run(folder, *base, "--resume")[0] == 0
    code, _, errors = run(folder, *base, "--resume", "--seed", "1", "--blur-sigma", "2")
    assert code == 2
    assert (
        "holds a run with other settings (options: {} there, {'blur_sigma': 2.0} here, seed: 0"
        in errors[-1]
    )
    assert errors[-1].endswith("or leave out --resume to start over")


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple:
    """Stop a run of four steps with Ctrl-C in its third."""
    from invguide.solvers import HQS

    step = HQS.step

    def stop(self: Solver, problem: object, state: object, k: int, noise: object):
        if k == 2:
            raise KeyboardInterrupt
        return step(self, problem, state, k, noise)

    monkeypatch.setattr(HQS, "step", stop)
    base = (
        "restore",
        "photo.png",
        "--task",
        "deblur",
        "--prior",
        "natural-tiny",
        "--steps",
        "4",
        "--quiet",
    )
    arguments = (*base, "--out", str(out), *more)
    code, _, errors = run(folder, *arguments)
    monkeypatch.setattr(HQS, "step", step)
    assert code == 1
    assert errors == [
        "error: interrupted; the same command with --resume goes on from the checkpoint"
    ]
    return arguments


@pytest.mark.slow
def test_interrupted_then_other_settings_then_truncated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = interrupted(folder, tmp_path / "out", monkeypatch)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    code, _, errors = run(folder, *arguments, "--resume", "--blur-sigma", "2.5")
    assert code == 2
    assert "belongs to another run (operator: GaussianBlur(sigma=1.5" in errors[-1]
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: len(data) // 2])
    code, _, errors = run(folder, *arguments, "--resume")
    assert code == 2
    assert (
        "it is damaged, truncated or not a checkpoint of invguide: delete it to start over"
        in errors[-1]
    )
    checkpoint.write_bytes(data)
    assert run(folder, *arguments, "--resume")[0] == 0
    assert not checkpoint.exists()
    fresh = tmp_path / "fresh"
    assert run(folder, *arguments[:-1], fresh)[0] == 0
    assert (fresh / "restored.png").read_bytes() == (
        tmp_path / "out" / "restored.png"
    ).read_bytes()


def test_diverging_run_ends_with_the_diagnosis(folder: Path, tmp_path: Path):
    arguments = [
        "restore",
        "photo.png",
        "--task",
        "deblur",
        "--solver",
        "dps",
        "--prior",
        "natural-tiny",
    ]
    arguments += [
        "--steps",
        "4",
        "--guidance-scale",
        "1e9",
        "--sigma-y",
        "0.02",
        "--quiet",
        "--out",
        tmp_path / "out",
    ]
    arguments += ["--set", "weight=likelihood"]
    code, _, errors = run(folder, *arguments)
    assert code == 1
    assert len(errors) == 1
    assert errors[0].startswith("error: DPS diverged: ")
    assert "Likely cause: guidance_scale=1e+09 is too large" in errors[0]
    assert "; try 1e+08" in errors[0]
    assert not (tmp_path / "out").exists(), "no grey picture"


# ---- the same through Python


Y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class OtherBatch(Operator):
    """Loses the batch axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0, keepdim=True).expand(5, -1, -1, -1)


class BlackBox(Operator):
    """Cannot be differentiated."""

    differentiable = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone()


def solve(y: torch.Tensor, operator: object, sigma_y: object = 0.1, **more: object) -> None:
    ig.solve(y, operator, "natural-tiny", sigma_y=sigma_y, **{"solver": "hqs", **more}, **QUICK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_measurement_that_is_not_finite(bad: float):
    y = Y.clone()
    y[0, 1, 2, 3] = bad
    with pytest.raises(
        InputError, match=r"y has 1 NaN or infinite values \(first at index \(0, 1, 2, 3\)\)"
    ):
        solve(y, Identity())


@pytest.mark.parametrize(
    ("sigma_y", "error", "text"),
    [
        (-0.1, InputError, "sigma_y is -0.1; expected a noise standard deviation >= 0"),
        (float("nan"), InputError, "sigma_y is nan; expected"),
        (
            torch.ones(7),
            ShapeError,
            r"sigma_y has shape \(7,\); expected a number, one value per element",
        ),
        (torch.ones(2, 1, 1, 1), ShapeError, r"sigma_y has shape \(2, 1, 1, 1\)"),
        (None, InputError, r"the noise level is unknown; pass sigma_y=\.\.\."),
    ],
)
def test_sigma_y(sigma_y: object, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        solve(Y, Identity(), sigma_y)


def test_exact_data_is_solved_as_little_noise():
    from invguide.solvers import HQS

    with pytest.warns(
        UserWarning, match=r"sigma_y is 0 \(exact data\): solved as Gaussian noise of"
    ):
        solve(Y, Identity(), 0.0, solver=HQS(num_steps=1))


def test_operators_that_cannot_be():
    with pytest.raises(
        ShapeError, match=r"OtherBatch was given 1 samples .* returned \(5, 3, 32, 32\); expected"
    ):
        solve(Y, OtherBatch(), shape=(3, 32, 32))
    with pytest.raises(
        ShapeError,
        match=r"Inpainting.* shape \(1, 16, 16\).* shape \(3, 32, 32\); resize the mask",
    ):
        solve(Y, Inpainting(torch.eye(16)))
    with pytest.raises(InputError, match="every pixel as known"):
        Inpainting(torch.ones(32, 32))
    with pytest.raises(InputError, match="no pixel as known"):
        Inpainting(torch.zeros(32, 32))
    with pytest.raises(ShapeError, match="even size 2 x 3"):
        Blur(torch.ones(2, 3) / 6)
    with pytest.raises(
        ShapeError, match="Blur was given images of 32 x 32 pixels; it needs at least 35 x 35"
    ):
        solve(Y, Blur(torch.ones(35, 35) / 35**2))
    with pytest.raises(ShapeError, match=r"y lacks its batch axis: pass y\[None\]"):
        solve(Y[0], GaussianBlur(1.0), shape=(3, 32, 32))


def test_small_image():
    with pytest.raises(
        ShapeError, match=r"needs at least 32 along each free axis; wrap it as .*Padded"
    ):
        solve(Y[..., :20], Identity())


def test_black_box_and_a_solver_that_needs_gradients():
    with pytest.raises(
        CompatibilityError, match=r"HQS differentiates .* BlackBox is a black box"
    ) as caught:
        solve(Y, BlackBox(), shape=(3, 32, 32))
    able = [
        n for n, k in Solver.registry.items() if not (k.requires.gradient or k.requires.linear)
    ]
    able = [n for n in able if Solver.registry[n].requires.target in ("likelihood", "either")]
    for name in able:
        assert name in str(caught.value).split("solvers that would do:")[1]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="unknown solver 'red-dif'; did you mean 'REDDiff'"):
        solve(Y, Identity(), solver="red-dif")
    with pytest.raises(InputError, match="unknown prior 'natral'; did you mean 'natural'"):
        ig.load_prior("natral")


def test_checkpoint_that_is_cut_off(tmp_path: Path):
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 not all of it")
    with pytest.raises(
        CheckpointError, match=r"checkpoint .*c\.pt cannot be read: .*delete it to start over"
    ):
        solve(Y, Identity(), checkpoint=tmp_path / "c.pt")


def test_weights_that_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(embedded.weights_path("natural-tiny"), tmp_path)
    with open(tmp_path / "natural-tiny.safetensors", "r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"it is missing, truncated or not written by invguide\.training"
    ):
        ig.load_prior("natural-tiny")
