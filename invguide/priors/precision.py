"""Whether half precision is faster on this machine, and as good: a trial of a few calls of the network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from invguide.numerics.linear import per_sample
from invguide.priors.known_images import known_images
from invguide.system.devices import now

if TYPE_CHECKING:
    from invguide.priors.network import NetworkPrior

HALF = "bf16"
FASTER = 1.25  # below this, noise could decide
LOSS = 0.01  # dB, of a denoised photograph
LEVELS = (0.05, 0.15, 0.5)  # noise standard deviations, data units (white = 1)
ROUNDS = 2
HOPELESS = 2.0  # times as slow in one call

_KNOWN: WeakKeyDictionary[NetworkPrior, dict[object, Trial]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        dtype: "bf16" where that is FASTER and loses at most LOSS dB, else "fp32".
        speed_up: Time of fp32 over time of bf16, the least of each.
        loss: The most that photographs lose in PSNR by bf16 where they are denoised, dB.
    """

    dtype: str
    speed_up: float
    loss: float

    def __str__(self) -> str:
        return (
            f"{self.dtype}: on this machine bf16 takes {1 / self.speed_up:.2f} of the time of fp32 and is off by "
            f"{self.loss:.4f} dB"
        )


def try_half(
    prior: NetworkPrior,
    condition: dict[str, Tensor] | None = None,
    clock: Callable[[], float] | None = None,
) -> Trial | None:
    """Time fp32 and bf16 in turns on a small photograph; once per process, prior and device.

    The prior is left as it was found. On a CPU the time is that of the CPU, so that other work on the machine enters
    less; the least of three calls counts.

    Args:
        prior: A network.
        condition: What a conditional one is told, one row each.
        clock: Seconds; by default CPU time, or on a GPU wall time.

    Returns:
        What came out; None where nothing can be tried: no module, no pictures, or a condition is needed.
    """
    from invguide.priors.networks.conditions import conditions_of

    shape, condition = prior.shape, condition or {}
    pictures = len(shape) == 3 and shape[0] in (1, 3) and prior.affine
    if not isinstance(prior.net, nn.Module) or not pictures:
        return None
    if not conditions_of(prior.net)[0] <= condition.keys():
        return None
    device = next((p.device for p in prior.parameters()), torch.device("cpu"))
    known = _KNOWN.setdefault(prior, {})
    if device not in known:
        before = prior.precision, prior.layout
        try:
            known[device] = _measure(prior, device, condition, clock or _clock(device))
        finally:
            prior.set_precision(*before)
    return known[device]


def _measure(
    prior: NetworkPrior,
    device: torch.device,
    condition: dict[str, Tensor],
    clock: Callable[[], float],
) -> Trial:
    images = known_images(prior.shape, min_size=prior.min_size)[:1].to(device, prior.dtype)
    clean = prior.to_normalised(images)
    rows = {name: row.to(device)[:1] for name, row in condition.items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    low, high = prior.sigma_min, prior.sigma_max
    sigmas = [min(max(level / prior.scale, low), high) for level in LEVELS]

    def call(dtype: str, sigma: float) -> tuple[Tensor, float]:
        prior.set_precision(
            dtype, torch.channels_last if dtype == HALF else torch.contiguous_format
        )
        level = torch.full((1,), sigma, device=device)
        x = clean + per_sample(level, clean) * noise
        start = clock()
        denoised = prior.denoise(x, level, **rows)
        return denoised, clock() - start

    times: dict[str, list[float]] = {"fp32": [], HALF: []}
    losses = []
    with torch.no_grad():
        for sigma in sigmas:
            exact, spent = call("fp32", sigma)
            half, half_spent = call(HALF, sigma)
            error = (exact - clean).square().mean().clamp_min(1e-20)
            losses.append(10 * math.log10(1 + float((half - exact).square().mean() / error)))
            if sigma == sigmas[0]:
                continue  # the first calls choose algorithms
            times["fp32"].append(spent)
            times[HALF].append(half_spent)
            if half_spent > HOPELESS * spent:
                break  # a processor without such arithmetic: 5 to 30 times as slow
        else:
            for _ in range(ROUNDS):
                for dtype, seconds in times.items():
                    seconds.append(call(dtype, sigmas[1])[1])
    speed_up = min(times["fp32"]) / max(min(times[HALF]), 1e-9)
    loss = max(losses) if all(map(math.isfinite, losses)) else math.inf
    chosen = HALF if speed_up >= FASTER and loss <= LOSS else "fp32"
    return Trial(chosen, speed_up, loss)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" else partial(now, device)
