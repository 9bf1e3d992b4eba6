"""softened: a network whose gradients do not jump, for rewards that are followed uphill."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import nn

from invguide.arguments.checks import checked
from invguide.arguments.rules import Positive
from invguide.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


@checked
def softened(network: Module, beta: Positive = 3.0) -> Module:
    """Return a copy of a network, in eval mode, with Softplus(beta) in the place of every `nn.ReLU`, however deep.

    A classifier trained with ReLUs has gradients that jump with the input, and guides worse than it classifies (EluCD,
    Ma et al. 2024, arXiv 2310.11311; beta 3 for DDPM on 128 pixels there, 5 for EDM on 64). Large beta is ReLU again.

    Args:
        network: A module; it stays as it is.
        beta: Softplus(x) = log(1 + exp(beta x)) / beta, above 0. Default 3.0; lower for smoother gradients, higher for
            the network as trained.

    Raises:
        InputError: A beta that cannot be, or a network without `nn.ReLU` (functional calls cannot be replaced).

    Example:
        >>> softened(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), beta=5)[1]
        Softplus(beta=5, threshold=20.0)
    """
    if not 0 < beta < math.inf:
        raise InputError(f"beta is {beta}; expected a finite number above 0")
    twin = copy.deepcopy(network)
    if isinstance(twin, nn.ReLU) or _replace(twin, beta) == 0:
        raise InputError(
            f"{type(network).__name__} has no nn.ReLU inside; expected a network with some as modules (calls of "
            f"torch.relu in a forward cannot be replaced: use modules there, or the network as it is)"
        )
    return twin.eval()


def _replace(module: nn.Module, beta: float) -> int:
    """Replace in place; how many. Not by `named_children`, which passes over a module's second name."""
    count = 0
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta))
                count += 1
    return count
