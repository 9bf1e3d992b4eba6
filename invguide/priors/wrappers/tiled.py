"""Images of any size in bounded memory: denoised on overlapping tiles, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invguide.arguments.rules import Count, CountOrNone
from invguide.errors import InputError
from invguide.numerics.padding import extend, round_up
from invguide.prior import Prior
from invguide.priors.network import NetworkPrior
from invguide.priors.wrappers.padding import WrappedPrior, image_conditions
from invguide.system.devices import now

DEFAULT_TILE = 256
TILES_ON_GPU = 8


class Tiled(WrappedPrior):
    """A prior for images of any size, from one that is limited to its training size or by memory.

    D(x) = sum_t w_t D_inside(x_t) over overlapping tiles x_t, where the weights are smooth and sum to one. They are
    zero in the outer quarters of every overlap, where the network misses its surroundings: if it looks no farther than
    overlap / 4, D is that of the whole image. Networks that look at the whole image (attention, group normalisation)
    see one tile instead. The vector-Jacobian product is exact for this D, and goes tile by tile too: memory is that of
    one batch of tiles, for one more network call per vjp. An image no larger than one tile is denoised as it is.

    Args:
        prior: For images (C, ...).
        tile: Height and width of a tile, pixels. Default None: the size that the prior takes, else 256; smaller to save
            memory, larger to see more of the surroundings. Where the prior takes any size, tiles are as much smaller as
            the same number of them allows.
        overlap: Of neighbouring tiles, pixels, at least; at most half a tile. Default None: a quarter of the tile; four
            times as far as the network looks makes tiles exact.
        batch_size: Tiles in one network call, of one or several samples. Default None: 1 on a CPU, else 8; more for
            speed where there is memory.

    Raises:
        InputError: The prior takes tiles of another size only, or tile and overlap do not go together.
    """

    def __init__(
        self,
        prior: Prior,
        tile: Count | None = None,
        overlap: CountOrNone | None = None,
        *,
        batch_size: Count | None = None,
    ) -> None:
        super().__init__(prior)
        fixed = [size for size in prior.shape[1:] if size is not None]
        if tile is not None and any(size != tile for size in fixed):
            raise InputError(
                f"tile is {tile}, and the prior inside takes {prior.shape} only: leave tile out"
            )
        # Tiles that begin at other pixels than multiples would be sampled differently inside the network.
        self.multiple = prior.multiple if isinstance(prior, NetworkPrior) else 1
        self.tile = tuple(size or tile or DEFAULT_TILE for size in prior.shape[1:])
        smallest = min(self.tile)
        self.overlap = (
            smallest // 4 // self.multiple * self.multiple if overlap is None else overlap
        )
        if not 0 <= self.overlap <= smallest // 2:
            raise InputError(
                f"overlap is {self.overlap}; expected at most half the tile, {smallest // 2}"
            )
        for name, size in (("tile", tile), ("overlap", self.overlap)):
            if size is not None and size % self.multiple:
                raise InputError(f"{name} is {size}; expected a multiple of {self.multiple}")
        self.batch_size = batch_size
        self._trial: Trial | None = None

    @contextmanager
    def trial(self, batches: int = 4) -> Iterator[Trial]:
        """Inside, go through so many batches of tiles, spread over the image, where there are more of them.

        For `invguide.plan`: what it costs to go through all is known from a few. D is 0 in the others.

        Yields:
            What the batches that were left out would have taken.
        """
        self._trial = Trial(batches)
        try:
            yield self._trial
        finally:
            self._trial = None

    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        self._check(x)
        sizes = [
            max(round_up(got, self.multiple), fixed or 0)
            for got, fixed in zip(x.shape[2:], self.prior.shape[1:], strict=True)
        ]
        images = {n: extend(c, sizes) for n, c in image_conditions(condition, x).items()}
        condition |= images
        padded = extend(x, sizes)
        if all(size <= tile for size, tile in zip(sizes, self.tile, strict=True)):
            denoised = self.prior.denoise(padded, sigma, **condition)
        else:
            exact = torch.promote_types(x.dtype, torch.float32)
            level = torch.as_tensor(sigma, dtype=exact, device=x.device).detach().expand(len(x))
            denoised = _Denoise.apply(padded, self, level, condition)
        return denoised[(..., *(slice(size) for size in x.shape[2:]))]

    def extra_repr(self) -> str:
        return f"tile={self.tile}, overlap={self.overlap}"

    def batches(self, x: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Iterator[Batch]:
        """Yield every tile of every row of x, a few at a time."""
        axes = [
            cuts(size, fixed or self._shrunk(size, tile), self.overlap, self.multiple)
            for size, tile, fixed in zip(x.shape[2:], self.tile, self.prior.shape[1:], strict=True)
        ]
        images = image_conditions(condition, x)
        places = [(row, cut) for row in range(len(x)) for cut in product(*axes)]
        count = self.batch_size or (1 if x.device.type == "cpu" else TILES_ON_GPU)
        starts: Iterable[int] = range(0, len(places), count)
        for start in starts if self._trial is None else self._trial.spread(starts, x.device):
            chosen = places[start : start + count]
            at = [(row, ..., *(c.part for c in cut)) for row, cut in chosen]
            rows = torch.tensor([row for row, _ in chosen], device=x.device)
            parts = {
                n: torch.stack([c[i] for i in at]) if n in images else c[rows.to(c.device)]
                for n, c in condition.items()
            }
            weights = [_outer([c.weight for c in cut]).to(x) for _, cut in chosen]
            yield Batch(torch.stack([x[i] for i in at]), sigma[rows], parts, at, weights)

    def _shrunk(self, size: int, tile: int) -> int:
        """The smallest tile that covers an axis with as few tiles."""
        count = _count(size, tile, self.overlap)
        return round_up(math.ceil((size + (count - 1) * self.overlap) / count), self.multiple)


class Trial:
    """A few batches in place of all.

    Attributes:
        seconds: That those left out would have taken, by the time of the others.
    """

    def __init__(self, batches: int) -> None:
        self.batches, self.seconds = batches, 0.0

    def spread(self, starts: Sequence[int], device: torch.device) -> Iterator[int]:
        """Yield some of the starts, and time what is done with them."""
        count = min(self.batches, len(starts))
        begin = now(device)
        for i in range(count):
            yield starts[i * len(starts) // count]
        self.seconds += (now(device) - begin) * (len(starts) - count) / count


class Batch(NamedTuple):
    """Tiles that go through the network together."""

    x: Tensor  # (N, C, *tile)
    sigma: Tensor  # (N,)
    condition: dict[str, Tensor]
    at: list[tuple[Any, ...]]  # where each belongs: an index of the whole (B, C, ...)
    weights: list[Tensor]  # of each, *tile


class Cut(NamedTuple):
    """A tile along one axis."""

    part: slice
    weight: Tensor


def _count(size: int, tile: int, overlap: int) -> int:
    return max(1, math.ceil((size - overlap) / (tile - overlap)))


def cuts(size: int, tile: int, overlap: int, multiple: int = 1) -> list[Cut]:
    """Cover an axis with the fewest tiles that overlap at least so much; their weights sum to one at every pixel.

    Between tiles i and i + 1 a crossfade c_i rises from 0 to 1 over half of their overlap, around its middle; the
    weight of tile i is c_(i-1) - c_i, so that the sum telescopes.
    """
    count = _count(size, tile, overlap)
    starts = [i * (size - tile) // max(1, count - 1) // multiple * multiple for i in range(count)]
    pixels = torch.arange(size, dtype=torch.float64) + 0.5
    fades = [torch.ones(size, dtype=torch.float64)]
    for left, right in pairwise(starts):
        middle = (right + left + tile) / 2
        phase = ((pixels - middle) / max(1, overlap / 2) + 0.5).clamp(0, 1)
        fades.append((1 - torch.cos(math.pi * phase)) / 2)
    fades.append(torch.zeros(size, dtype=torch.float64))
    parts = [slice(start, start + tile) for start in starts]
    return [Cut(p, (a - b)[p]) for p, (a, b) in zip(parts, pairwise(fades), strict=True)]


def _outer(weights: Sequence[Tensor]) -> Tensor:
    total = weights[0]
    for weight in weights[1:]:
        total = total[..., None] * weight
    return total


class _Denoise(torch.autograd.Function):
    """The blended denoiser; its backward pass repeats the network tile by tile, so that no graph is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tiled: Tiled, sigma: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = tiled, sigma, condition
        denoised = torch.zeros_like(x)
        for batch in tiled.batches(x, sigma, condition):
            parts = tiled.prior.denoise(batch.x, batch.sigma, **batch.condition)
            for i, part, weight in zip(batch.at, parts, batch.weights, strict=True):
                denoised[i] += weight * part
        return denoised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        tiled, sigma, condition = ctx.arguments
        gradient = torch.zeros_like(x)
        for batch in tiled.batches(x, sigma, condition):
            with torch.enable_grad():
                tiles = batch.x.detach().requires_grad_()
                parts = tiled.prior.denoise(tiles, batch.sigma, **batch.condition)
            weighted = torch.stack(
                [w * cotangent[i] for i, w in zip(batch.at, batch.weights, strict=True)]
            )
            (products,) = torch.autograd.grad(parts, tiles, weighted)
            for i, product_ in zip(batch.at, products, strict=True):
                gradient[i] += product_
        return gradient, None, None, None
