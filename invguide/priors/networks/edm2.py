"""The magnitude-preserving U-Net of Karras et al. 2024 (EDM2, arXiv 2312.02696), with the names of its checkpoints.

No layer has a bias or a normalisation with parameters. Every layer expects features of unit variance and returns
such: rows of weights, sums, concatenations and activations are divided by what they do to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invguide.errors import InputError

EPSILON = 1e-4  # added to the root mean square of what is normalised
SILU_OF_NORMAL = 0.596  # root mean square of silu(n), n standard normal


@dataclass(frozen=True)
class Architecture:
    """What the weights themselves tell about an EDM2 network.

    Attributes:
        size: Height and width of the images that it was trained on.
        channels: Of each level, the finest first; every level has half the size of the one before.
        attention: Whether each level has attention in its blocks.
        num_blocks: Per level, on the way down; one more on the way up.
        noise_channels, embedding_channels: Widths of the embedding of the noise level, and of the final one.
        num_classes: Of a class-conditional network, or 0.
    """

    size: int
    image_channels: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    num_blocks: int
    noise_channels: int
    embedding_channels: int
    num_classes: int = 0


@dataclass(frozen=True)
class Balance:
    """What the weights do not tell; the defaults are those of every released network.

    Attributes:
        channels_per_head: Of the attention.
        residual, attention: Weight of a branch, from 0 to 1, where it is added to the main path.
        label: Weight of the class, from 0 to 1, beside that of the noise level.
        concatenation: Weight of what is skipped, from 0 to 1, beside that of the main path.
        limit: Largest magnitude of what a block returns, or None.
    """

    channels_per_head: int = 64
    residual: float = 0.3
    attention: float = 0.3
    label: float = 0.5
    concatenation: float = 0.5
    limit: float | None = 256.0


class EDM2(nn.Module):
    """The raw network F of EDM's preconditioning, (B, C, H, W) and ln(sigma) / 4 (B,) -> (B, C, H, W)."""

    def __init__(self, architecture: Architecture, balance: Balance) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.balance = balance
        levels = list(enumerate(a.channels))

        def block(inputs: int, outputs: int, **options: bool | str) -> Block:
            return Block(inputs, outputs, a.embedding_channels, balance, **options)  # pyright: ignore[reportArgumentType]

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = Waves(a.noise_channels)
        self.emb_noise = Layer(a.noise_channels, a.embedding_channels)
        if a.num_classes:
            self.emb_label = Layer(a.num_classes, a.embedding_channels)

        self.enc = nn.ModuleDict()
        current, skipped = a.channels[0], [a.channels[0]]
        for level, channels in levels:
            at = f"{a.size >> level}x{a.size >> level}"
            if level == 0:  # the channel in addition is constant: it stands for a bias
                self.enc[f"{at}_conv"] = Layer(a.image_channels + 1, current, 3)
            else:
                self.enc[f"{at}_down"] = block(current, current, resize="down")
                skipped.append(current)
            for k in range(a.num_blocks):
                self.enc[f"{at}_block{k}"] = block(current, channels, attention=a.attention[level])
                current = channels
                skipped.append(current)

        self.dec = nn.ModuleDict()
        for level, channels in reversed(levels):
            at = f"{a.size >> level}x{a.size >> level}"
            if level == len(levels) - 1:
                self.dec[f"{at}_in0"] = block(current, current, decoder=True, attention=True)
                self.dec[f"{at}_in1"] = block(current, current, decoder=True)
            else:
                self.dec[f"{at}_up"] = block(current, current, decoder=True, resize="up")
            for k in range(a.num_blocks + 1):
                self.dec[f"{at}_block{k}"] = block(
                    current + skipped.pop(), channels, decoder=True, attention=a.attention[level]
                )
                current = channels
        self.out_conv = Layer(current, a.image_channels, 3)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """class_labels, (B, num_classes), are rows of 0 and one 1."""
        embedding = self.emb_noise(self.emb_fourier(time).to(x.dtype))
        if class_labels is not None:
            label = self.emb_label(class_labels * math.sqrt(self.architecture.num_classes))
            embedding = added(embedding, label, self.balance.label)
        embedding = silu(embedding)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skipped = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skipped.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = concatenated(x, skipped.pop(), self.balance.concatenation)
            x = block(x, embedding)
        return self.out_conv(x, self.out_gain)


class Layer(nn.Module):
    """A convolution, or a matrix where there is no kernel, whose rows have unit length whatever the weights are."""

    def __init__(self, inputs: int, outputs: int, kernel: int | None = None) -> None:
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *size))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        rows = normalised(exact, tuple(range(1, exact.ndim)))
        rows = (rows * (gain / math.sqrt(exact[0].numel()))).to(x.dtype)
        if rows.ndim == 2:
            return F.linear(x, rows)
        return F.conv2d(x, rows, padding=rows.shape[-1] // 2)


class Waves(nn.Module):
    """Cosines of time, (B,) -> (B, channels), at random frequencies and phases that are kept with the weights."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, time: Tensor) -> Tensor:
        freqs, phases = self.freqs.to(time.dtype), self.phases.to(time.dtype)
        return math.sqrt(2) * torch.cos(time[:, None] * freqs + phases)


class Block(nn.Module):
    """Two convolutions around the embedding, and attention where wanted, each added to the main path."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        balance: Balance,
        *,
        decoder: bool = False,
        resize: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        if attention and outputs % balance.channels_per_head:
            raise InputError(
                f"{outputs} channels cannot be divided into heads of {balance.channels_per_head}; pass the "
                "channels_per_head= that the network was trained with"
            )
        self.heads = outputs // balance.channels_per_head
        self.balance, self.decoder, self.resize = balance, decoder, resize
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Layer(inputs if decoder else outputs, outputs, 3)
        self.emb_linear = Layer(embedding, outputs)
        self.conv_res1 = Layer(outputs, outputs, 3)
        self.conv_skip = Layer(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        if attention:
            self.attn_qkv = Layer(outputs, 3 * outputs, 1)
            self.attn_proj = Layer(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.resize:
            x = F.avg_pool2d(x, 2) if self.resize == "down" else F.interpolate(x, scale_factor=2)
        if not self.decoder:
            x = normalised(self.conv_skip(x), (1,))
        y = self.conv_res0(silu(x))
        y = silu(y * (1 + self.emb_linear(embedding, self.emb_gain))[:, :, None, None])
        if self.decoder:
            x = self.conv_skip(x)
        x = added(x, self.conv_res1(y), self.balance.residual)
        if hasattr(self, "attn_qkv"):
            x = added(x, self.attend(x), self.balance.attention)
        limit = self.balance.limit
        return x if limit is None else x.clamp(-limit, limit)

    def attend(self, x: Tensor) -> Tensor:
        rows = self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3))
        query, key, value = normalised(rows, (2,)).transpose(2, 4).unbind(3)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attn_proj(mixed.mT.reshape(x.shape))


def normalised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Divide by the root mean square over these dimensions."""
    exact = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=exact)
    count = math.prod(x.shape[d] for d in dims)
    return x / (EPSILON + length / math.sqrt(count)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    return F.silu(x) / SILU_OF_NORMAL


def added(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """(1 - weight) x + weight y, of unit variance where x and y are independent and of such."""
    return ((1 - weight) * x + weight * y) / math.hypot(1 - weight, weight)


def concatenated(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """x and y, scaled so that their shares in a sum over channels are 1 - weight and weight, whatever their number."""
    n, m = x.shape[1], y.shape[1]
    scale = math.sqrt(n + m) / math.hypot(1 - weight, weight)
    return torch.cat(
        [scale * (1 - weight) / math.sqrt(n) * x, scale * weight / math.sqrt(m) * y], dim=1
    )
