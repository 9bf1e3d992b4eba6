"""`invguide demo`: from a photograph that ships with the package to a panel, in about a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from invguide.diagnostics.metrics import psnr
from invguide.images.example import PHOTO
from invguide.images.reading import read_picture
from invguide.restoration.degradation import degrade_picture
from invguide.restoration.manifest import check_writable
from invguide.restoration.restore import restore_picture
from invguide.restoration.settings import Job, Settings
from invguide.restoration.tasks import Options

BLUR, NOISE, SAMPLES, STEPS = 1.5, 0.03, 4, 15


def run_demo(
    out: Path,
    prior: str = "natural",
    seed: int = 0,
    device: str = "auto",
    steps: int | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, float]:
    """Blur the photograph, add noise, restore it, and write everything to a folder.

    Returns:
        PSNR in dB of the "measurement" and of the "mean", and "seconds" without imports.
    """
    start = time.monotonic()
    options = Options(blur_sigma=BLUR)
    settings = Settings(
        "deblur",
        options,
        NOISE,
        solver_settings={"num_steps": STEPS if steps is None else steps},
        prior=prior,
        samples=SAMPLES,
        seed=seed,
        device=device,
    )
    job = Job.prepare(settings, say, progress)
    check_writable(out)
    measured = out / "measurement.png"
    degrade_picture(PHOTO, "deblur", options, sigma_y=NOISE, seed=seed, out=measured)
    say(
        f"measurement: the photograph {PHOTO.name}, blurred by {BLUR:g} pixels, with {NOISE:.0%} of noise"
    )
    truth = read_picture(PHOTO)
    title = "invguide demo: deblurring"
    result = restore_picture(job, measured, out, resume=False, title=title, truth=truth)
    assert result is not None
    figures = {
        "measurement": float(psnr(read_picture(measured).values, truth.values)),
        "mean": float(psnr(torch.nan_to_num(result.mean), truth.values)),
        "seconds": time.monotonic() - start,
    }
    say(
        f"  PSNR {figures['measurement']:.1f} dB measured, {figures['mean']:.1f} dB restored (mean of {SAMPLES})"
    )
    say(f"  {figures['seconds']:.0f} s; look at {out / 'panel.png'}")
    return figures
