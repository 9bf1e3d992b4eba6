"""The small fully convolutional network behind the embedded priors.

A U-Net on pixel-unshuffled input, three resolutions, residual blocks of two 3x3 convolutions, no attention.
Normalisation is per pixel (RMS over channels): a group norm would tie every pixel to the statistics of the
whole image, and overlapping tiles of a large photo would then never agree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """Fourier features of the network's scalar noise input, then a two-layer perceptron: (B,) -> (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # c_noise = ln(sigma) / 4 spans about [-1.5, 1.1]; these periods resolve it without aliasing.
        self.register_buffer("frequencies", math.pi * torch.logspace(-1, 1, 16), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, noise: Tensor) -> Tensor:
        phase = noise[:, None] * self.frequencies
        return self.layers(torch.cat([phase.cos(), phase.sin()], dim=1))


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(modulate(rms_norm(x)))))); the last convolution starts at zero."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gain, bias = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-4)
        h = self.first(F.silu(h * (1 + gain) + bias))
        return x + self.second(F.silu(h))


class Stage(nn.ModuleList):
    """Residual blocks of one resolution, one after the other."""

    def __init__(self, count: int, channels: int, width: int) -> None:
        super().__init__(ResidualBlock(channels, width) for _ in range(count))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            x = block(x, embedding)
        return x


class UNet(nn.Module):
    """Raw network F(x, c_noise); preconditioning is the adapter's business.

    Args:
        image_channels: Channels of the image.
        channels: Width at each resolution, finest first (the finest is half the image's).
        blocks: Residual blocks per resolution, on the way down and again on the way up.
        embedding: Width of the noise embedding.

    Shapes: x (B, C, H, W) with H and W multiples of `multiple`; c_noise (B,); output like x.
    """

    def __init__(
        self,
        image_channels: int = 3,
        channels: tuple[int, ...] = (64, 96, 160),
        blocks: int = 2,
        embedding: int = 128,
    ) -> None:
        super().__init__()
        self.config = {
            "image_channels": image_channels,
            "channels": list(channels),
            "blocks": blocks,
            "embedding": embedding,
        }
        self.multiple = 2 ** len(channels)
        self.embed = NoiseEmbedding(embedding)
        self.stem = nn.Conv2d(4 * image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels):
            self.encoder.append(Stage(blocks, width, embedding))
            if level + 1 < len(channels):
                self.down.append(nn.Conv2d(width, channels[level + 1], 2, stride=2))
                self.up.append(nn.ConvTranspose2d(channels[level + 1], width, 2, stride=2))
                self.decoder.append(Stage(blocks, width, embedding))
        self.head = nn.Conv2d(channels[0], 4 * image_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        embedding = self.embed(noise)
        h = self.stem(F.pixel_unshuffle(x, 2))
        skips: list[Tensor] = []
        for level, stage in enumerate(self.encoder):
            h = stage(h, embedding)
            if level < len(self.down):
                skips.append(h)
                h = self.down[level](h)
        for level in reversed(range(len(self.up))):
            h = self.decoder[level](self.up[level](h) + skips[level], embedding)
        return F.pixel_shuffle(self.head(h), 2)
