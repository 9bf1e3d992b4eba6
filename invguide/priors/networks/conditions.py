"""Networks that are told something beside x: what, in which shape, and one message where that does not fit."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import InputError

Shape = tuple[int | str, ...]  # a letter is any size, but the same wherever it stands; B samples


class Conditional(nn.Module, ABC):
    """A network of another library as net(x, time, **condition), for conditions with one row per sample.

    Args:
        net: The network; `call` calls it.
        needs: Shapes of the conditions that must be told, by their names here.
        takes: Likewise of those that may be left out.
    """

    def __init__(
        self, net: Any, needs: Mapping[str, Shape], takes: Mapping[str, Shape] | None = None
    ) -> None:
        super().__init__()
        self.net, self.needs, self.takes = net, dict(needs), dict(takes or {})

    @abstractmethod
    def call(self, *args: Any, **condition: Any) -> Any:
        """Return what the network makes of x, time and conditions that have been checked."""

    def forward(self, x: Tensor, time: Tensor, **condition: Tensor) -> Any:
        sizes, shapes = {"B": len(x)}, self.needs | self.takes
        known = self.needs.keys() <= condition.keys() <= shapes.keys()
        if not known or not all(_fits(v, shapes[name], sizes) for name, v in condition.items()):
            self._refuse(condition, len(x))
        typed = {n: v.to(x.dtype) if v.is_floating_point() else v for n, v in condition.items()}
        return self.call(x, time, **typed)

    def _refuse(self, condition: Mapping[str, Tensor], batch: int) -> None:
        optional = f", and may be told {_listed(self.takes)}" if self.takes else ""
        got = _listed({name: tuple(value.shape) for name, value in condition.items()})
        first = next(iter(self.needs))
        words = (
            "; invguide.priors.embed_text or --prompt makes them of words"
            if first == "text"
            else ""
        )
        raise InputError(
            f"{type(self.net).__name__} is conditional on {_listed(self.needs)}{optional}, with one row for each of "
            f"the B = {batch} samples; got {got or 'nothing'}: pass condition={{{first!r}: ...}} to solve, "
            f"{first}=... to denoise, or --condition {first}=... to a command{words}"
        )


class Sized(Conditional):
    """A network of latents that is told the size of the picture.

    Attributes:
        pixels: Per latent, along each axis; `LatentPrior` sets it to that of its autoencoder.
    """

    pixels: int = 8

    def picture_size(self, x: Tensor) -> Tensor:
        """Return height and width of the pictures that latents x stand for, padding included, (B, 2)."""
        return torch.tensor(x.shape[2:], device=x.device).mul(self.pixels).expand(len(x), 2)


def _fits(value: Tensor, shape: Shape, sizes: dict[str, int]) -> bool:
    return value.ndim == len(shape) and all(
        got == (sizes.setdefault(want, got) if isinstance(want, str) else want)
        for got, want in zip(value.shape, shape, strict=True)
    )


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(
        f"{name} ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        for name, shape in shapes.items()
    )


def conditions_of(net: Callable[..., Any]) -> tuple[set[str], set[str] | None]:
    """Names that net(x, time, ...) needs, and all that it knows: None for whatever is passed."""
    try:
        signature = inspect.signature(net.forward if isinstance(net, nn.Module) else net)
    except ValueError:  # of compiled code
        return set(), None
    parameters = list(signature.parameters.values())[2:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    free = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    return (
        {p.name for p in named if p.default is p.empty},
        None if free else {p.name for p in named},
    )
