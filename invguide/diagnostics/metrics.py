"""How far samples are from a known truth; all in data units, per signal, nothing averaged over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.result import Result


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1], to which x is clamped -> (B,)."""
    error = (x.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [0, 1], to which x is clamped -> (B,); at most 1.

    Wang et al. 2004: Gaussian window of 11 pixels and standard deviation 1.5, per channel, then the mean; windows that
    leave the image are left out, unless the image is smaller than one.
    """
    from kornia.metrics import ssim as similarity

    padding = "valid" if min(x.shape[-2:]) > 11 else "same"
    return similarity(x.clamp(0, 1), truth, 11, padding=padding).flatten(1).mean(1)


def rmse(x: Tensor, truth: Tensor) -> Tensor:
    """Root mean square error, (B, *shape) -> (B,); complex values count by their modulus."""
    return (x - truth).abs().square().flatten(1).mean(1).sqrt()


def calibration(samples: Tensor, truth: Tensor) -> Tensor:
    """Actual over predicted error of the mean of S samples, (B, S, *shape) and (B, *shape) -> (B,).

    Under the exact posterior the truth is one more sample, so the mean square error of the mean of S samples is
    (1 + 1/S) times their variance, and the ratio is near 1. Above 1 the samples claim too much; infinite for point
    estimates, NaN for one sample.
    """
    count = samples.shape[1]
    predicted = ((1 + 1 / count) * samples.var(dim=1)).flatten(1).mean(1).sqrt()
    return rmse(samples.mean(dim=1), truth) / predicted


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score per pixel, (B, S, *shape) and (B, *shape) -> (B,); lower is better.

    E|x - truth| - E|x - x'| / 2 over samples, averaged over pixels, with distinct pairs only: fair in S (Ferro 2014),
    so that methods with few samples compare. Proper: sharpness and calibration are judged together.
    """
    count = samples.shape[1]
    error = (samples - truth[:, None]).abs().mean(1)
    ordered = samples.sort(dim=1).values
    rank = torch.arange(1, count + 1, dtype=samples.dtype, device=samples.device)
    weight = (2 * rank - count - 1).reshape(1, -1, *(1,) * (samples.ndim - 2))
    spread = (weight * ordered).sum(1) / (count * (count - 1))  # half the mean distance of pairs
    return (error - spread).flatten(1).mean(1)


def check_truth(truth: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the clean signals that a result of this shape (B, *shape) is to be compared with.

    Raises:
        ShapeError: Not one signal per measurement.
        InputError: Values that are not finite.
    """
    if tuple(truth.shape) != shape:
        raise ShapeError(
            f"truth has shape {tuple(truth.shape)}; expected one clean signal per measurement, {shape}"
        )
    if not bool(torch.isfinite(truth).all()):
        raise InputError("truth has NaN or infinite values; every value must be finite")
    return truth.detach()


def compare(result: Result, truth: Tensor) -> dict[str, Tensor]:
    """Metrics of a result against the clean signals.

    Args:
        result: Of B measurements with S samples each.
        truth: (B, *shape), data units.

    Returns:
        For images (1 or 3 channels): "psnr" (B, S), "psnr_mean" and "ssim_mean" (B,), of the mean of the samples; else
        "rmse" (B, S) and "rmse_mean" (B,). With two samples or more also "calibration" (B,). NaN for lost samples.

    Raises:
        ShapeError: truth does not have one signal per measurement.
    """
    samples, mean = result.samples, result.mean
    truth = check_truth(truth, tuple(mean.shape)).to(samples)
    image = truth.ndim == 4 and truth.shape[1] in (1, 3)
    name, score = ("psnr", psnr) if image else ("rmse", rmse)
    metrics = {
        name: torch.stack([score(samples[:, s], truth) for s in range(samples.shape[1])], 1),
        f"{name}_mean": score(mean, truth),
    }
    if image:
        metrics["ssim_mean"] = ssim(mean, truth)
    if samples.shape[1] > 1:
        rows = zip(samples, truth, result.finished, strict=True)
        ratios = [calibration(row[None, done], clean[None]) for row, clean, done in rows]
        metrics["calibration"] = torch.cat(ratios)
    return metrics
