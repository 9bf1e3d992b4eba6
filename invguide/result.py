"""What a run returns: samples in data units, their summary, an honest diagnosis, and a manifest."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.errors import InputError


@dataclass(repr=False)
class Result:
    """Outcome of `solve`, `guide` or `driver.run`; all arrays on the CPU, data units.

    Attributes:
        samples: (B, num_samples, *shape); rows of failed samples are NaN.
        chi2: Mean of |y - A x|^2 / sigma_y^2 per sample, (B, num_samples); near 1 where a sample explains y to
            within its noise, NaN where no noise level is known.
        log_prob: Log target per sample up to a constant, (B, num_samples).
        status: "ok", "dropped: ..." or "interrupted" for each sample, [B][num_samples].
        nfe: Network calls per sample.
        seconds: Wall time, over all resumed parts.
        manifest: Settings, seeds, versions and fingerprints, ready for JSON.
        metrics: Where a truth was given: name -> (B,) or (B, num_samples).
        log_weights: Unnormalised log-weight per sample, (B, num_samples), of particle methods; zeros otherwise.
        reward: Of each sample, (B, num_samples), where `solve` was given one beside the measurement; else None.
        residual: y - A(mean), shape of y; None where there is no measurement or the operator is a black box.
    """

    samples: Tensor
    chi2: Tensor
    log_prob: Tensor
    status: list[list[str]]
    nfe: float
    seconds: float
    manifest: dict[str, Any]
    y: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    residual: Tensor | None = None
    log_weights: Tensor | None = None
    reward: Tensor | None = None

    def __repr__(self) -> str:
        """One line: how many samples of what, by which solver, and what they cost."""
        measurements, samples, *shape = self.samples.shape
        solver = self.manifest.get("settings", {}).get("solver", "unknown solver")
        chi2 = self.chi2[torch.isfinite(self.chi2)]
        parts = [f"{measurements} x {samples} samples of {tuple(shape)}", solver]
        parts += [f"chi2 {chi2.mean().item():.2f}"] if len(chi2) else []
        missing = int((~self.finished).sum())
        parts += [f"{missing} of them missing"] if missing else []
        return f"Result({', '.join(parts)}, {self.nfe:.0f} calls)"

    def _repr_html_(self) -> str:
        """In notebooks: the panel of the first measurement where samples are pictures, and the diagnosis."""
        from invguide.images.panel import panel_png

        text = f"<code>{escape(repr(self))}</code><br>{escape(self.diagnosis)}"
        png = panel_png(self)
        if png is None:
            return text
        source = b64encode(png).decode()
        return f'<img alt="panel of the result" src="data:image/png;base64,{source}"><br>{text}'

    @property
    def finished(self) -> Tensor:
        """(B, num_samples) booleans: which samples are there."""
        return torch.tensor([[s == "ok" for s in row] for row in self.status])

    @property
    def weights(self) -> Tensor:
        """(B, num_samples), summing to 1 over the finished samples, 0 elsewhere; 1 / n except for particle methods."""
        return torch.softmax(self._logits, 1).nan_to_num(0.0)

    @property
    def _logits(self) -> Tensor:
        logits = torch.zeros_like(self.chi2) if self.log_weights is None else self.log_weights
        return torch.where(self.finished, logits, -torch.inf)

    @property
    def mean(self) -> Tensor:
        """(B, *shape), weighted, over the finished samples; NaN where there is none."""
        return self._average(self.samples)

    @property
    def std(self) -> Tensor:
        """(B, *shape), weighted and unbiased, over the finished samples.

        NaN where there are fewer than two, or the solver is a point estimator: equal answers are no small spread. Where
        one sample has all weight, to rounding, it is the limit of the same: half the mean square of the distances to
        it, weighted as the others are among themselves. `diagnosis` says so.
        """
        if self.manifest.get("point_estimate"):
            return torch.full_like(self.mean, float("nan"))
        variance = self._average((self.samples - self.mean[:, None]) ** 2)
        known = 1 - self.weights.square().sum(1)  # 1 - 1/n for equal weights
        known = known.reshape(-1, *(1,) * (variance.ndim - 1))
        return torch.where(known > 1e-6, variance / known, self._around_the_heaviest()).sqrt()

    def _around_the_heaviest(self) -> Tensor:
        """sum_j v_j (x_j - x_top)^2 / 2 over all samples j but the heaviest, v their weights; NaN if there is none."""
        logits, top = self._logits, self.weights.argmax(1)
        others = logits.scatter(1, top[:, None], -torch.inf)
        weights = torch.softmax(others, 1).nan_to_num(0.0)
        heaviest = self.samples[torch.arange(len(top)), top]
        return self._average((self.samples - heaviest[:, None]) ** 2, weights) / 2

    def _average(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = self.weights if weights is None else weights
        weights = weights.reshape(*weights.shape, *(1,) * (values.ndim - 2))
        total = torch.where(weights > 0, weights * values, 0.0).sum(1)
        return torch.where(weights.sum(1) > 0, total, float("nan"))

    @property
    def forward_model(self) -> list[dict[str, Any]]:
        """Calls, failures, seconds and utilisation of each black box in the target."""
        return self.manifest.get("forward_model", [])

    @property
    def warnings(self) -> list[str]:
        """What is odd about finished samples, one line for each of them."""
        return self.manifest.get("warnings", [])

    @property
    def diagnosis(self) -> str:
        """One line: how many samples there are, what is odd, and whether they explain the measurement."""
        done = int(self.finished.sum())
        text = f"{done} of {self.finished.numel()} samples finished"
        chi2 = self.chi2[torch.isfinite(self.chi2)]
        if self.reward is not None:
            text = f"{text}; reward {self.reward[self.finished].mean().item():.4g}"
        alone = (self.finished.sum(1) > 1) & (self.weights.amax(1) > 0.999)
        if bool(alone.any()):
            text = f"{text}; one has all the weight: mean and std rest on it, a larger ensemble may help"
        if self.warnings:
            more = f" (and {len(self.warnings) - 1} more)" if len(self.warnings) > 1 else ""
            text = f"{text}; warning: {self.warnings[0]}{more}"
        if not len(chi2):
            return text
        value = chi2.mean().item()
        if value < 0.5:
            verdict = "below 1: the measurement's noise is fitted too, or sigma_y is too large"
        elif value <= 2:
            verdict = "the samples explain y to within its noise"
        else:
            verdict = "above 1: y is not explained; is sigma_y, the operator or the guidance off?"
        return f"{text}; chi2 {value:.2f}, {verdict}"

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write samples.npy, mean.npy, std.npy, chi2.npy, manifest.json, and for images the PNGs and panel.png.

        Raises:
            InputError: No path of a folder.
        """
        from invguide.images.panel import write_pictures

        if not str(folder) or "\0" in str(folder):
            raise InputError(
                f"Result.save: folder is {str(folder)!r}; expected the path of a folder"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("samples", "mean", "std", "chi2"):
            np.save(folder / f"{name}.npy", getattr(self, name).numpy())
        write_pictures(self, folder)
        (folder / "manifest.json").write_text(strict_json(self.manifest) + "\n")
        return folder


def strict_json(value: Any) -> str:
    """Return JSON that every reader takes: null for NaN and infinities, text for what is no JSON."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(strict(value), indent=2, default=str)
