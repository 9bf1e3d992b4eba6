"""The table of JPEG files: what `restore --task jpeg` gains over the file, by quality and chroma sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invguide import driver
from invguide.bench.protocol import Protocol
from invguide.diagnostics.metrics import psnr
from invguide.system.progress import progress_bar
from invguide.system.tables import Table

if TYPE_CHECKING:
    from invguide.restoration.settings import Job

QUALITIES = (10, 20, 50, 80)
SAMPLINGS = {"4:2:0": 2, "4:4:4": 0}  # as Pillow counts them
HEAD = ("quality", "chroma", "file", "one call", "restored", "gain", "least", "calls", "agree")


def jpeg(
    data: str | Path,
    *,
    size: int = 128,
    photos: int = 28,
    prior: str = "natural",
    precision: str = "fp32",
    qualities: Sequence[int] = QUALITIES,
    solver: str = "auto",
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Table:
    """Save photos as JPEG with Pillow, restore the files as `restore --task jpeg` does, and compare with them.

    Args:
        data: An .npz file with uint8 photos `img_SIZE` (N, SIZE, SIZE, 3).
        size, photos: Which photos, and how many.
        prior: Name of a prior.
        precision: Of its network: "fp32", "bf16" or "fp16".
        qualities: Of the files.
        solver, settings: As for `restore`, by default what it takes itself.
        seed: Of the samples.
        device: As for `invguide.solve`.
        progress: Show a bar.

    Returns:
        Mean PSNR of 8-bit pictures: the files, one network call at the level of each file's true error, restored.
    """
    from invguide.restoration.settings import Job, Settings

    truth = Protocol(Path(data), size, photos).truth
    wanted = Settings(
        "jpeg", prior=prior, solver=solver, solver_settings=settings or {}, seed=seed,
        device=device or "auto",
    )  # fmt: skip
    job = Job.prepare(wanted, lambda line: None, progress=False)
    if precision != "fp32":
        job.prior.optimise(precision)
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    total = len(qualities) * len(SAMPLINGS) * photos
    with TemporaryDirectory() as folder, progress_bar(total, "jpeg", progress) as bar:
        for quality in qualities:
            for name, code in SAMPLINGS.items():
                cells = []
                for photo in truth:
                    path = Path(folder) / "photo.jpg"
                    _save(photo, path, quality, code)
                    cells.append(_cell(job, path, photo[None]))
                    bar.update(1)
                found = {n: [c[n] for c in cells] for n in cells[0]}
                rows.append(_row(quality, name, found))
                figures[f"{quality} {name}"] = found
    note = (
        f"Mean PSNR in dB of 8-bit pictures over {photos} photos of {size} pixels, prior {prior}. File: as Pillow "
        "decodes it. One call: D(file) at the level of the file's true error, which a user does not know. Gain: "
        "restored over file; least: of the worst photo. Calls: of the network, per photo. Agree: coefficients of the "
        "file within half a step of the restored picture's."
    )
    return Table(HEAD, tuple(rows), (note,), figures)


def _save(photo: Tensor, path: Path, quality: int, subsampling: int) -> None:
    from PIL import Image

    pixels = (photo * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=quality, subsampling=subsampling)


def _cell(job: Job, path: Path, truth: Tensor) -> dict[str, float]:
    from invguide.restoration.restore import prepare

    measured, solver, problem, _ = prepare(job, path)
    picture = measured.picture
    result = driver.run(
        solver, problem, seed=job.settings.seed, device=job.settings.device, progress=False
    )
    restored = result.mean
    prior = job.prior
    level = float((picture.values - truth).square().mean().sqrt()) / prior.scale
    with torch.no_grad():
        x = prior.to_normalised(picture.values).to(prior.device or "cpu")
        one = prior.to_data(prior.denoise(x, max(level, prior.sigma_min))).cpu().float()
    file, call, final = (_eight_bit_psnr(v, truth) for v in (picture.values, one, restored))
    law = measured.noise.bind(measured.y)  # pyright: ignore[reportOptionalMemberAccess]
    agree = law.agreement(measured.operator(restored), measured.y)  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "file": file,
        "one call": call,
        "restored": final,
        "gain": final - file,
        "calls": result.nfe,
        "agree": float(agree),
    }


def _eight_bit_psnr(x: Tensor, truth: Tensor) -> float:
    return float(psnr((x.clamp(0, 1) * 255).round() / 255, truth))


def _row(quality: int, name: str, found: dict[str, list[float]]) -> tuple[str, ...]:
    mean = {n: sum(values) / len(values) for n, values in found.items()}
    return (
        str(quality),
        name,
        *(f"{mean[n]:.2f}" for n in ("file", "one call", "restored")),
        f"{mean['gain']:+.2f}",
        f"{min(found['gain']):+.2f}",
        f"{mean['calls']:.0f}",
        f"{mean['agree']:.1%}",
    )
