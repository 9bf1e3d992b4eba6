"""The U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233), with the parameter names of its released checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invguide.errors import InputError
from invguide.priors.networks.labels import check_label, refuse_label

QKVOrder = Literal["legacy", "new"]
GROUPS = 32  # of every normalisation


@dataclass(frozen=True)
class Architecture:
    """What the weights themselves tell about an ADM network.

    Attributes:
        image_channels, output_channels: The latter is twice the former where the variance is learned too.
        model_channels: Width of the sinusoidal time embedding.
        channels: Of each level, the finest first; every level has half the size of the one before.
        attention: Whether each level has attention after its residual blocks.
        num_res_blocks: Per level, on the way down; one more on the way up.
        num_classes: Of a class-conditional network, or None.
        scale_shift_norm: The time embedding scales and shifts features; otherwise it is added to them.
        resblock_updown: Residual blocks change the size; otherwise strided and upsampled convolutions.
    """

    image_channels: int
    output_channels: int
    model_channels: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    num_res_blocks: int
    num_classes: int | None = None
    scale_shift_norm: bool = True
    resblock_updown: bool = True

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return 2 ** (len(self.channels) - 1)


class ADM(nn.Module):
    """Predicts the noise in a variance-preserving input, (B, C, H, W) and time steps (B,) -> (B, C or 2 C, H, W).

    Args:
        architecture: What a checkpoint tells of itself.
        num_heads: Of every attention, or
        num_head_channels: Channels of every head; one of the two must be given.
        qkv_order: How the rows of the attention's projection are ordered: "legacy" (head, then query, key
            and value) or "new" (query, key and value, then head).

    Raises:
        InputError: num_heads and num_head_channels are both or neither given, or do not divide the channels.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        qkv_order: QKVOrder,
    ) -> None:
        super().__init__()
        a = self.architecture = architecture
        if (num_heads is None) == (num_head_channels is None):
            raise InputError("give either num_heads or num_head_channels of the attention layers")
        if qkv_order not in ("legacy", "new"):
            raise InputError(f"qkv_order is {qkv_order!r}; expected 'legacy' or 'new'")
        width = 4 * a.model_channels

        def block(inputs: int, outputs: int, resize: str | None = None) -> ResBlock:
            return ResBlock(inputs, outputs, width, a.scale_shift_norm, resize)

        def attention(channels: int) -> Attention:
            heads = num_heads or channels // (num_head_channels or 1)
            return Attention(channels, heads, qkv_order)

        self.time_embed = nn.Sequential(
            nn.Linear(a.model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        if a.num_classes is not None:
            self.label_emb = nn.Embedding(a.num_classes, width)

        current = a.channels[0]
        blocks = [Stage(nn.Conv2d(a.image_channels, current, 3, padding=1))]
        skipped = [current]
        for level, channels in enumerate(a.channels):
            for _ in range(a.num_res_blocks):
                blocks.append(Stage(block(current, channels)))
                if a.attention[level]:
                    blocks[-1].append(attention(channels))
                current = channels
                skipped.append(current)
            if level < len(a.channels) - 1:
                halve = (
                    block(current, current, "down") if a.resblock_updown else Downsample(current)
                )
                blocks.append(Stage(halve))
                skipped.append(current)
        self.input_blocks = nn.ModuleList(blocks)

        self.middle_block = Stage(
            block(current, current), attention(current), block(current, current)
        )

        blocks = []
        for level, channels in reversed(list(enumerate(a.channels))):
            for k in range(a.num_res_blocks + 1):
                blocks.append(Stage(block(current + skipped.pop(), channels)))
                if a.attention[level]:
                    blocks[-1].append(attention(channels))
                current = channels
                if level and k == a.num_res_blocks:
                    blocks[-1].append(
                        block(current, current, "up") if a.resblock_updown else Upsample(current)
                    )
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, current),
            nn.SiLU(),
            nn.Conv2d(current, a.output_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        waves = sinusoids(time, self.architecture.model_channels)
        embedding = self.time_embed(waves.to(next(self.parameters()).dtype))
        if (classes := self.architecture.num_classes) is not None:
            embedding = embedding + self.label_emb(check_label(label, classes, len(x)))
        else:
            refuse_label(label)
        skipped = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            skipped.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skipped.pop()], dim=1), embedding)
        return self.out(x)


class Stage(nn.Sequential):
    """Layers in a row; residual blocks are given the embedding too."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions around the embedding, added to the input; may halve or double the size in between."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, scale_shift: bool, resize: str | None
    ) -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding, 2 * outputs if scale_shift else outputs)
        )
        self.out_layers = nn.Sequential(  # the third place is the dropout of training
            nn.GroupNorm(GROUPS, outputs),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(_resized(activation(norm(x)), self.resize))
        shift = self.emb_layers(embedding)[:, :, None, None].to(h.dtype)
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(_resized(x, self.resize)) + h


class Attention(nn.Module):
    """Every pixel attends to all of them, added to the input."""

    def __init__(self, channels: int, num_heads: int, qkv_order: QKVOrder) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise InputError(
                f"{channels} channels cannot be divided into {num_heads} heads; "
                "pass the num_heads= or num_head_channels= that the network was trained with"
            )
        self.num_heads, self.qkv_order = num_heads, qkv_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x.flatten(2)))
        if self.qkv_order == "legacy":
            rows = qkv.unflatten(1, (self.num_heads, 3, -1)).transpose(1, 2)
        else:
            rows = qkv.unflatten(1, (3, self.num_heads, -1))
        query, key, value = rows.mT.unbind(1)  # each (B, heads, pixels, channels of a head)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.mT.flatten(1, 2)).reshape(x.shape)


class Downsample(nn.Module):
    """A convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Every pixel repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_resized(x, "up"))


def _resized(x: Tensor, resize: str | None) -> Tensor:
    if resize is None:
        return x
    return F.avg_pool2d(x, 2) if resize == "down" else F.interpolate(x, scale_factor=2)


def sinusoids(time: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of time at frequencies from 1 down to 1e-4, (B,) -> (B, width)."""
    half = width // 2
    ramp = torch.arange(half, dtype=torch.float32, device=time.device) / half
    phase = time.float()[:, None] * torch.exp(-math.log(10000) * ramp)
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=1), (0, width % 2))
