"""NetworkReward: the base of rewards that ask a user's network about x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import isclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from invguide.arguments.checks import shown
from invguide.errors import InputError, ShapeError
from invguide.numerics.trial import evaluating
from invguide.reward import Reward
from invguide.rewards._describe import describe

Function = Callable[[Tensor], Any]


class Network(nn.Module):
    """A user's network as rewards call it: where x is, in eval mode, in its own precision, on a copy of x.

    The network is moved in place, as a likelihood moves its operator, and left in the mode in which it was found; its
    weights and their `requires_grad` stay as they are, and `torch.autograd.grad` with respect to x leaves nothing in
    their `.grad`.

    Args:
        function: A module, or any callable on a batch.
        transform: Applied to x first; None: nothing.
    """

    def __init__(self, function: Function, transform: Function | None = None) -> None:
        super().__init__()
        self.function, self.transform = function, transform

    def forward(self, x: Tensor) -> Any:
        self.to(x.device)
        with evaluating(self), torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            given = x.clone() if self.transform is None else self.transform(x.clone())
            if not isinstance(given, Tensor):
                raise InputError(
                    f"the transform returned {shown(given)}; expected a tensor, what the network takes"
                )
            return self.function(given.to(next(_precisions(self.function), given.dtype)))


def _precisions(function: Function) -> Iterator[torch.dtype]:
    module = function if isinstance(function, nn.Module) else nn.Module()
    tensors = chain(module.parameters(), module.buffers())
    return (t.dtype for t in tensors if t.is_floating_point())


@dataclass(frozen=True, repr=False, eq=False)
class NetworkReward(Reward):
    """A reward on what `network` says of x; a subclass has its settings as fields, and connects in `__post_init__`."""

    network: Network = field(init=False)

    def connect(self, function: Function, transform: Function | None) -> None:
        """Set `network` up, or raise InputError for what is no network."""
        for name, value in (("network", function), ("transform", transform)):
            if isclass(value) or not (callable(value) or (name == "transform" and value is None)):
                kind = f"the class {value.__name__}" if isclass(value) else repr(value)
                raise InputError(
                    f"{type(self).__name__}: the {name} is {kind}; expected a module or a callable on a batch of images"
                )
        object.__setattr__(self, "network", Network(function, transform))

    def __repr__(self) -> str:
        return describe(self)


def read_logits(owner: object, output: Any, count: int, ndim: int) -> Tensor:
    """Return logits (count, K, ...) of `ndim` axes, K of at least two classes, in single precision or better."""
    name = type(owner).__name__
    if isinstance(output, Mapping):  # as Hugging Face and the segmenters of torchvision name them
        output = output.get("logits", output.get("out", output))
    expected = f"({count}, K{', H, W' if ndim == 4 else ''})"
    if not isinstance(output, Tensor):
        raise InputError(
            f"{name}: the network returned a {type(output).__name__}; expected logits {expected}, or a dict that has "
            f"them as 'logits' or 'out'"
        )
    if output.ndim != ndim or len(output) != count:
        raise ShapeError(
            f"{name}: the network returned shape {tuple(output.shape)} for {count} images; expected logits {expected}"
        )
    if output.shape[1] < 2:
        raise ShapeError(
            f"{name}: the network returned a single class; expected logits of at least two, {expected}. One logit z of "
            f"yes against no is two: torch.cat([0 * z, z], 1)"
        )
    return as_floats(output)


def as_floats(output: Tensor) -> Tensor:
    """Return half precision as single precision, so that sums and logarithms keep their digits."""
    return output.float() if output.element_size() < 4 else output
