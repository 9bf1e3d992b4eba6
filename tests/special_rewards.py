"""What several test files share: rewards of the kinds that only some solvers take.

A spot that is to be moved, with a prior of spots; and what modules inside a network return, of a Gaussian's denoiser
whose head is perfect, and of two convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import invguide as ig
from invguide.feature_reward import FeatureReward
from invguide.numerics.linear import per_sample
from invguide.prior import Prior
from invguide.priors import GaussianMixture, from_network

# ---- a spot

SIZE = 12
SHAPE = (1, SIZE, SIZE)


def blob(column: float, row: float) -> Tensor:
    """A round spot, (1, H, W)."""
    grid = torch.arange(float(SIZE), dtype=torch.float64)
    square = (grid[None, :] - column) ** 2 + (grid[:, None] - row) ** 2
    return torch.exp(-square / 4)[None]


def centre(x: Tensor) -> Tensor:
    """Column and row of the centre of mass, (B, C, H, W) -> (B, 2)."""
    mass = x.mean(1) / x.mean(1).sum((1, 2), keepdim=True)
    grid = torch.arange(x.shape[-1], dtype=x.dtype)
    return torch.stack([(mass.sum(1) * grid).sum(1), (mass.sum(2) * grid).sum(1)], 1)


def centre_flow(first: Tensor, second: Tensor) -> Tensor:
    """The flow of a single spot: how far its centre has moved, everywhere."""
    moved = centre(second) - centre(first)
    return moved[:, :, None, None].expand(-1, -1, *first.shape[2:])


def shift(columns: float, rows: float) -> Tensor:
    return torch.tensor([columns, rows]).reshape(2, 1, 1).expand(2, SIZE, SIZE).double()


PLACES = [(float(c), float(r)) for c in range(3, 9) for r in range(3, 9)]
SPOTS = GaussianMixture(
    torch.stack([blob(c, r).flatten() for c, r in PLACES]), 1e-4 * torch.eye(SIZE**2).double()
)


class Spots(ig.Prior):
    """A spot at one of 36 places, as pictures."""

    shape, sigma_min, sigma_max, sigma_data = SHAPE, SPOTS.sigma_min, SPOTS.sigma_max, 0.3

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def denoise(self, x: Tensor, sigma: Any, **condition: Tensor) -> Tensor:
        return SPOTS.denoise(x.flatten(1), sigma).reshape(x.shape)


MASK = torch.zeros(SIZE, SIZE, dtype=torch.bool)
MASK[2:11, 5:12] = True


# ---- a perfect head

MEAN, VARIANCE, Y, SIGMA_Y = 0.5, 1.0, 1.5, 0.3


class Evidence(nn.Module):
    """What a perfect head would say of a noisy state: log p(y | x), y a noisy first coordinate, (B, 1)."""

    def forward(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        left = VARIANCE * sigma**2 / (VARIANCE + sigma**2)  # of x0 given x
        return -0.5 * (Y - denoised[:, :1]) ** 2 / (SIGMA_Y**2 + left)


class Body(nn.Module):
    """A Gaussian's denoiser, with that head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.evidence = Evidence()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = MEAN + (x - MEAN) * VARIANCE / (VARIANCE + per_sample(sigma, x) ** 2)
        self.evidence(denoised, per_sample(sigma, x).reshape(-1, 1) + 0 * x[:, :1])
        return denoised


def gaussian() -> tuple[Prior, FeatureReward]:
    prior = from_network(Body(), "x0", "ve", shape=(2,), data_range=(0, 1), sigma_data=1.2)
    return prior, FeatureReward(prior, "net.evidence", lambda f: f["net.evidence"][:, 0])


# ---- a network


class Block(nn.Module):
    def __init__(self, repeat: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.activation = nn.SiLU()
        self.repeat, self.calls = repeat, 0

    def inside(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.activation(self.first(x)))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.inside(x) if self.repeat is None else self.repeat(self.inside, x)
        return torch.tanh(x)


def network(repeat: Callable[..., Tensor] | None = None) -> Any:
    torch.manual_seed(3)
    block = Block(repeat).double()
    return from_network(block, "x0", "ve", shape=(3, 8, 8), multiple=1)


def distance(features: dict[str, Tensor]) -> Tensor:
    return -sum(((f - 0.3) ** 2).flatten(1).sum(1) for f in features.values())  # pyright: ignore[reportReturnType]


MODULES = ("net.first", "net.activation", "net.second")
