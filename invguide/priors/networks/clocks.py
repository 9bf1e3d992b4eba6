"""The clocks of diffusion families: how a network was shown its noisy inputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.priors.networks.preconditioning import edm_coefficients

# Converting eps or v to a denoised image multiplies the network's error by sigma. For data of order
# one, 200 is pure noise already; schedules that go on (cosine: 2e4, flow: infinity) are cut there.
LARGEST_USEFUL_SIGMA = 200.0


class Clock(ABC):
    """How a network was shown its noisy inputs: network input = factor(sigma) * x, time(sigma).

    Attributes:
        predicts: Outputs that make sense in this convention.
        sigma_min, sigma_max: The levels that the network has been trained on.
        end: The last time, of a clock that could as well run backwards; None of others.
    """

    predicts: tuple[str, ...]
    end: float | None = None
    sigma_min: float
    sigma_max: float

    @abstractmethod
    def factor(self, sigma: Tensor) -> Tensor:
        """Return s in (network input) = s * (x0 + sigma n), shape of sigma."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """Return the network's time argument, shape of sigma; sigma is within the trained range."""


class VP(Clock):
    """Variance preserving: input sqrt(abar) x0 + sqrt(1 - abar) n, time = a fractional step index.

    The step is interpolated linearly in log sigma between the levels of the table. The nearest
    level instead would be wrong by up to 9 % in sigma on the DDPM table.
    """

    predicts = ("eps", "v", "x0", "score")

    def __init__(self, alphas_bar: Tensor) -> None:
        alphas_bar = torch.as_tensor(alphas_bar).detach().to("cpu", torch.float64)
        if alphas_bar.ndim != 1 or len(alphas_bar) < 2:
            raise ShapeError(f"alphas_bar must be (T,), T >= 2; got {tuple(alphas_bar.shape)}.")
        if not bool(((alphas_bar >= 0) & (alphas_bar <= 1)).all()):
            raise InputError("alphas_bar must lie in [0, 1]: the cumulative product of 1 - beta.")
        if not bool((alphas_bar.diff() < 0).all()):
            hint = "Pass alphas_bar.flip(0)." if bool((alphas_bar.diff() > 0).all()) else ""
            raise InputError(f"alphas_bar must decrease strictly from step 0 to T - 1. {hint}")
        # Exactly 0 (zero terminal SNR) and exactly 1 have no finite log sigma: leave them out.
        inside = (alphas_bar > 0) & (alphas_bar < 1)
        self.steps = torch.arange(len(alphas_bar), dtype=torch.float64)[inside]
        self.log_sigmas = 0.5 * ((1 - alphas_bar) / alphas_bar)[inside].log()
        self.sigma_min, self.sigma_max = self.log_sigmas[[0, -1]].exp().tolist()
        self.end = len(alphas_bar) - 1.0

    def factor(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        levels, steps = self.log_sigmas.to(sigma), self.steps.to(sigma)
        log_sigma = sigma.log()
        k = torch.searchsorted(levels, log_sigma).clamp(1, len(levels) - 1)
        fraction = (log_sigma - levels[k - 1]) / (levels[k] - levels[k - 1])
        return steps[k - 1] + fraction.clamp(0, 1) * (steps[k] - steps[k - 1])


class VE(Clock):
    """Variance exploding: input x0 + sigma n, time = sigma."""

    predicts = ("eps", "x0", "score")
    sigma_min, sigma_max = 0.002, 80.0

    def factor(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


class EDM(Clock):
    """Karras et al. 2022, table 1: input (x0 + sigma n) / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4."""

    predicts = ("edm", "eps", "x0")
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = sigma_data

    def factor(self, sigma: Tensor) -> Tensor:
        return edm_coefficients(sigma, self.sigma_data).input

    def time(self, sigma: Tensor) -> Tensor:
        return edm_coefficients(sigma, self.sigma_data).noise


class Flow(Clock):
    """Flow matching: input (1 - t) x0 + t n, time t = sigma / (1 + sigma), noise at t = 1."""

    predicts = ("flow", "eps", "x0", "score")
    sigma_min, sigma_max = 0.001, math.inf
    end = 1.0

    def factor(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)


def linear_betas(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    """Ho et al. 2020."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Rombach et al. 2022: linear in sqrt(beta)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = 1000) -> Tensor:
    """Nichol & Dhariwal 2021, offset 0.008, each beta at most 0.999."""
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alphas_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp_max(0.999)


def _vp(betas: Tensor) -> VP:
    return VP((1 - betas).cumprod(0))


SCHEDULES: dict[str, Callable[[float], Clock]] = {  # called with sigma_data
    "linear-vp": lambda _: _vp(linear_betas()),
    "scaled-linear-vp": lambda _: _vp(scaled_linear_betas()),
    "cosine-vp": lambda _: _vp(cosine_betas()),
    "ve": lambda _: VE(),
    "edm": EDM,
    "flow": lambda _: Flow(),
}
