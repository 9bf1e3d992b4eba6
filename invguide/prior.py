"""The Prior contract: a denoiser at every noise level, in the one convention x = x0 + sigma * n."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from invguide.arguments.checks import Checked
from invguide.arguments.entries import Entries, check_per_sample, check_signals
from invguide.errors import InputError, ShapeError
from invguide.numerics.linear import per_sample


def denoise_at(
    denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, sigma_min: float, **condition: Tensor
) -> Tensor:
    """Return E[x0 | x] at levels sigma (B,), also below the least one, s = sigma_min, that `denoise` knows.

    There it is x + sigma^2 score(x; s) = x + (sigma / s)^2 (D(x; s) - x). D(x; s) would take away more than the noise.
    """
    level = sigma.clamp_min(sigma_min)
    share = per_sample((sigma / level) ** 2, x)
    return torch.lerp(x, denoise(x, level, **condition), share)


class Prior(Entries, nn.Module, metaclass=Checked):
    """What a pretrained diffusion model knows, as its posterior mean at every noise level.

    Attributes:
        shape: Shape of one sample, normalised or data; None where any size is accepted.
        sigma_min, sigma_max: Noise levels between which `denoise` is valid, in normalised units.
        min_size: Smallest height and width that make sense where the shape has None.
        scale, shift: data = scale * normalised + shift.
        symmetric: Whether mirror images and quarter turns of a signal are as likely as the signal itself.
        affine: Whether data = scale * normalised + shift; else `to_data` is another map, such as a decoder.
        precision: Of the network inside, "fp32" unless it was asked to be faster.
        sigma_data: Root mean square of clean signals, normalised units, by which solvers judge how far to go. None
            where it is not told: then it is measured when it is needed, by 8 network calls for a picture
            (`Problem.sigma_data`).
        knows_objects: Whether it tells what a thing is, and so which colour is likely; False where it saw only small
            crops of pictures.
    """

    entries = ("denoise", "score", "eps", "to_data", "to_normalised")
    shape: tuple[int | None, ...]
    sigma_min: float
    sigma_max: float
    min_size: int = 1
    scale: float = 1.0
    shift: float = 0.0
    affine: bool = True
    symmetric: bool = False
    sigma_data: float | None = None
    knows_objects: bool = True
    precision: str = "fp32"

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return E[x0 | x0 + sigma n = x].

        Args:
            x: Noisy states in normalised units, (B, *shape).
            sigma: Noise level, () or (B,).
            condition: Per-sample conditions, such as label (B,).

        Returns:
            (B, *shape), differentiable in x; rows are independent of each other.
        """

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        who, x = f"{type(self).__name__}.{method}", given["x"]
        check_signals(who, "x", x, None if "sigma" not in given else self.shape)
        if "sigma" in given:
            divides = getattr(type(self), method) in (Prior.score, Prior.eps)
            check_per_sample(who, "sigma", given["sigma"], len(x), positive=divides)

    def check_answer(self, method: str, given: dict[str, Any], answer: Any) -> None:
        x = given["x"]
        if method in ("denoise", "score", "eps") and answer.shape != x.shape:
            raise ShapeError(
                f"{type(self).__name__}.{method}: x has the shape {tuple(x.shape)}, and the answer "
                f"{tuple(answer.shape)}"
            )

    def optimise(self, dtype: str = "bf16", **settings: Any) -> Prior:
        """Make the network inside faster, where there is one: see `invguide.priors.network.NetworkPrior.optimise`.

        Raises:
            InputError: This prior has no network.
        """
        raise InputError(
            f"{type(self).__name__} has no network that could run in {dtype}; leave optimise out"
        )

    def check(self, images: Tensor | None = None, **condition: Tensor) -> object:
        """Tell whether the network inside is read as it was trained: see `invguide.priors.NetworkPrior.check`.

        Raises:
            InputError: This prior has no network.
        """
        raise InputError(
            f"{type(self).__name__} has no network whose convention could be wrong: nothing to check"
        )

    def forward(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        return self.denoise(x, sigma, **condition)

    def score(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return grad log p(x; sigma) = (D - x) / sigma^2 (Tweedie), shape of x."""
        return (self.denoise(x, sigma, **condition) - x) / per_sample(sigma, x) ** 2

    def eps(self, x: Tensor, sigma: Tensor | float, **condition: Tensor) -> Tensor:
        """Return the predicted unit noise (x - D) / sigma, shape of x."""
        return (x - self.denoise(x, sigma, **condition)) / per_sample(sigma, x)

    def to_data(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift

    def to_normalised(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample in data units, from that in normalised units: the same, unless it is decoded."""
        return shape

    def normalised_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample in normalised units, from that in data units."""
        return shape

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """Shape of one sample in data units, None where any size is accepted."""
        return self.shape

    @property
    def device(self) -> torch.device | None:
        """Where the prior computes: where its first tensor is; None without tensors."""
        return next((t.device for t in chain(self.parameters(), self.buffers())), None)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the prior computes in: that of its first tensor."""
        for tensor in chain(self.parameters(), self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()
