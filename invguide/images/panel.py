"""Pictures of a result: samples, mean, uncertainty, and one panel that shows them side by side.

Drawn pixel by pixel with PIL in matplotlib's fonts and colours: nothing is resampled unless it is larger than its tile.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from invguide.images.layout import Tile, _compose, colour
from invguide.images.reading import Picture
from invguide.images.writing import write_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from invguide.result import Result

TILE = 448  # pixels: about the width of one tile
SHOWN = 4  # samples in a panel, the original among them
MISSING = (228, 228, 231)


def write_pictures(
    result: Result,
    folder: Path,
    *,
    like: Sequence[Picture] | None = None,
    truth: Tensor | None = None,
    title: str = "",
    facts: Sequence[str] = (),
    sigma_y: float | None = None,
    known: Tensor | None = None,
) -> list[Path]:
    """Write restored.png (or restored-1.png ..., mean.png and std.png for several samples) and panel.png.

    Nothing is written for results that are no images: (1 or 3, H, W) with values near [0, 1]. Several measurements
    go to the sub-folders 0, 1, ...

    Args:
        result: The result.
        folder: An existing folder.
        like: One picture per measurement, in whose kind (bits, alpha, profile) results are written.
        truth: The clean images (B, C, H, W), for the panel.
        title: Of the panel.
        facts: Lines below it; by default number of samples, chi2, network calls, seconds.
        sigma_y: Unit of the residual in the panel; by default its own root mean square is.
        known: Where a measurement has pixels at all, (1 or C, H, W); the others are shown in pale grey.

    Returns:
        The files written.
    """
    if not _is_image(result.samples, known=like is not None):
        return []
    written: list[Path] = []
    for b in range(len(result.samples)):
        place = folder if len(result.samples) == 1 else folder / str(b)
        place.mkdir(exist_ok=True)
        samples = result.samples[b][result.finished[b]]
        if not len(samples):
            continue
        kind = like[b] if like is not None else None
        several = len(samples) > 1
        for i, sample in enumerate(samples):
            name = f"restored-{i + 1}" if several else "restored"
            written.append(write_picture(place / name, sample, kind))
        view = _view(result, b)
        view = replace(
            view,
            truth=None if truth is None else truth[b],
            sigma_y=sigma_y,
            known=known,
            title=title,
            facts=tuple(facts) or view.facts,
        )
        if several:
            # Around the first, so that pixels which are the same in all samples are so in the mean.
            mean = samples[0] + (samples - samples[0]).mean(0)
            written.append(write_picture(place / "mean", mean, kind))
            view.uncertainty_figure().save(place / "std.png")
            written.append(place / "std.png")
        view.panel().save(place / "panel.png")
        written.append(place / "panel.png")
    return written


def panel_png(result: Result) -> bytes | None:
    """The panel of the first measurement as a PNG file; None where samples are no images, or there are none."""
    if not _is_image(result.samples, known=False) or not bool(result.finished[0].any()):
        return None
    file = io.BytesIO()
    _view(result, 0).panel().save(file, "png")
    return file.getvalue()


def _view(result: Result, b: int) -> View:
    """What there is to be seen of measurement b, by itself."""
    return View(
        samples=result.samples[b][result.finished[b]],
        y=None if result.y is None else result.y[b],
        residual=None if result.residual is None else result.residual[b],
        facts=_facts(result, b),
    )


def _is_image(samples: Tensor, known: bool) -> bool:
    """By its shape, and unless it is known to be one, by its values."""
    if samples.ndim != 5 or samples.shape[2] not in (1, 3) or samples.is_complex():
        return False
    if known:
        return True
    values = samples[torch.isfinite(samples)]
    return len(values) > 0 and bool(((values > -0.5) & (values < 1.5)).double().mean() > 0.99)


def _facts(result: Result, b: int) -> tuple[str, ...]:
    chi2 = result.chi2[b][torch.isfinite(result.chi2[b])]
    facts = [f"solver {result.manifest.get('settings', {}).get('solver', 'unknown')}"]
    if len(chi2):
        facts.append(f"χ² {chi2.mean():.2f}")
    return (*facts, f"{result.nfe:.0f} network calls per sample", f"{result.seconds:.0f} s")


@dataclass
class View:
    """Everything that a panel of one measurement shows."""

    samples: Tensor  # (S, C, H, W)
    y: Tensor | None = None
    residual: Tensor | None = None  # of y's shape, for the mean
    truth: Tensor | None = None
    sigma_y: float | None = None
    known: Tensor | None = None
    title: str = ""
    facts: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        height, width = self.samples.shape[-2:]
        factor = max(1, round(TILE / width))
        factor = max(1, min(factor, 640 // height if height < 640 else 1))
        shrink = min(1.0, 520 / width, 640 / height) if factor == 1 else 1.0
        self.tile = max(1, round(width * factor * shrink)), max(1, round(height * factor * shrink))

    # ---- tiles

    def rows(self) -> list[list[Tile]]:
        several = len(self.samples) > 1
        first: list[Tile] = []
        if self.y is not None and _shows(self.y):
            first.append(
                Tile("Measurement", self._fit(self._measured(self.y)), self._measured_caption())
            )
        mean = self.samples.mean(0)
        name = f"Mean of {len(self.samples)} samples" if several else "Restored"
        first.append(Tile(name, self._fit(to_pixels(mean)), self._score(mean)))
        if several:
            first.append(self._uncertainty())
        if self.residual is not None and _shows(self.residual):
            first.append(self._residual(self.residual))
        original = []
        if self.truth is not None:
            original.append(Tile("Original", self._fit(to_pixels(self.truth))))
        if not several:
            return [first + original]
        shown = min(len(self.samples), SHOWN - len(original))
        samples = [
            Tile(f"Sample {i + 1}", self._fit(to_pixels(x)), self._score(x))
            for i, x in enumerate(self.samples[:shown])
        ]
        if shown == 2 and len(first) == 4 and not original:
            return [[first[0], *samples], first[1:]]  # 3 and 3 rather than 4 and 2
        return [first, samples + original]

    def _fit(self, pixels: np.ndarray) -> Image:
        """The pixels (h, w, 3) at the size of a tile: magnified with hard edges, shrunk with soft ones."""
        from PIL import Image as Pil

        image = Pil.fromarray(pixels)
        larger = image.width > self.tile[0] or image.height > self.tile[1]
        return image.resize(
            self.tile, Pil.Resampling.LANCZOS if larger else Pil.Resampling.NEAREST
        )

    def _measured(self, y: Tensor) -> np.ndarray:
        pixels = to_pixels(y)
        if self.known is not None:
            unknown = ~torch.broadcast_to(self.known != 0, y.shape).all(0).cpu().numpy()
            pixels[unknown] = MISSING
        return pixels

    def _measured_caption(self) -> str:
        assert self.y is not None
        parts = []
        if self.y.shape[-2:] != self.samples.shape[-2:]:
            parts.append(f"{self.y.shape[-1]} × {self.y.shape[-2]} pixels")
        if self.sigma_y is not None:
            parts.append(f"σ = {self.sigma_y:.3g}")
        if self.truth is not None and self.y.shape == self.truth.shape:
            parts.append(self._score(self.y))
        return ", ".join(p for p in parts if p)

    def _score(self, x: Tensor) -> str:
        if self.truth is None or x.shape != self.truth.shape:
            return ""
        error = (x.clamp(0, 1) - self.truth).square().mean().item()
        return f"{-10 * np.log10(max(error, 1e-12)):.1f} dB"

    def _uncertainty(self) -> Tile:
        std = self.samples.var(0).mean(0).sqrt().cpu().double().numpy()
        top = _round_up(float(np.quantile(std, 0.995)))
        if float(std.max()) < 1e-6:
            return Tile("Uncertainty", self._fit(colour(std, "magma")), "zero: a point estimate")
        image = self._fit(colour(std / top, "magma"))
        return Tile("Uncertainty (1 std)", image, bar=("magma", "0", f"{top:g}"))

    def _residual(self, residual: Tensor) -> Tile:
        shown = residual.mean(0).cpu().double().numpy()
        unit = self.sigma_y or float(np.sqrt(np.mean(shown**2))) or 1.0
        channels = len(residual) if self.sigma_y else 1
        # The mean over channels of independent noise is smaller than each of them.
        scaled = shown / unit * channels**0.5
        image = self._fit(colour(scaled / 6 + 0.5, "RdBu_r"))
        name = "Residual (y − A x)"
        return Tile(
            name,
            image,
            bar=(
                "RdBu_r",
                "−3 σ" if self.sigma_y else "−3 rms",
                "+3 σ" if self.sigma_y else "+3 rms",
            ),
        )

    # ---- figures

    def panel(self) -> Image:
        """Title and facts, the measurement and summaries in the first row, samples in the second."""
        return _compose(self.rows(), self.title, self.facts)

    def uncertainty_figure(self) -> Image:
        """The standard deviation over samples (root mean square over channels), with its scale."""
        return _compose([[self._uncertainty()]], "", ())


def _shows(y: Tensor) -> bool:
    return y.ndim == 3 and y.shape[0] in (1, 3) and not y.is_complex()


def to_pixels(x: Tensor) -> np.ndarray:
    """(1 or 3, H, W) in [0, 1] -> (H, W, 3) uint8; NaN is black."""
    array = np.nan_to_num(x.detach().cpu().double().numpy(), nan=0.0).clip(0, 1)
    array = np.broadcast_to(array, (3, *array.shape[1:])).transpose(1, 2, 0)
    return np.rint(array * 255).astype(np.uint8)


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten."""
    if not value > 0:
        return 1.0
    power = 10 ** np.floor(np.log10(value))
    for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10):
        if value <= step * power * (1 + 1e-9):
            break
    return float(f"{step * power:.3g}")
