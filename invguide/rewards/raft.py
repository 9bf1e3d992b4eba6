"""RAFT: torchvision's optical flow network, for pictures of any size with values in [0, 1]."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn import functional as F

from invguide.arguments.checks import Checked
from invguide.arguments.rules import Count, OneOf
from invguide.errors import InputError, ShapeError, require

SIZES = ("small", "large")
SMALLEST = 128  # pixels per side that its pyramid needs


class RAFT(nn.Module, metaclass=Checked):
    """Flow from a first to a second batch of colour pictures, (B, 3, H, W) twice -> (B, 2, H, W) in pixels.

    Teed and Deng 2020, as in torchvision; an `estimator` of `Motion`. Pictures are resized to sides that the network
    takes, multiples of 8 from 128 on, and the flow back to theirs.

    Args:
        size: Network, "small" or "large". Default "small"; "large" is more accurate and slower.
        weights: Name of torchvision's, or None for random ones, to load your own into `net`. Default "default": those
            that torchvision recommends, which it downloads once.
        num_updates: Refinements of the flow. Default 12; fewer are faster and less accurate.

    Raises:
        InputError: An unknown size, or num_updates below 1.
        MissingPackageError: torchvision is not installed.
    """

    def __init__(
        self,
        size: Annotated[str, OneOf(SIZES)] = "small",
        weights: str | None = "default",
        num_updates: Count = 12,
    ) -> None:
        super().__init__()
        models: Any = require("torchvision.models.optical_flow", "RAFT", "torchvision")
        make = models.raft_small if size == "small" else models.raft_large
        try:
            self.net: nn.Module = make(weights=None if weights is None else weights.upper())
        except (KeyError, ValueError) as error:
            raise InputError(
                f"RAFT: torchvision has no weights {weights!r} of the size {size!r}; expected 'default', one of "
                "its names, or None"
            ) from error
        self.net.requires_grad_(False)
        self.num_updates = num_updates

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
            raise ShapeError(
                f"RAFT was given {tuple(first.shape)} and {tuple(second.shape)}; expected colour pictures "
                f"(B, 3, H, W) twice"
            )
        given = first.shape[2:]
        sides = tuple(max(SMALLEST, -(-side // 8) * 8) for side in given)
        pair = [2 * self._resize(x, sides) - 1 for x in (first, second)]
        flow = self.net(*pair, num_flow_updates=self.num_updates)[-1]
        scale = [old / new for old, new in zip(given[::-1], sides[::-1], strict=True)]
        return self._resize(flow, given) * flow.new_tensor(scale)[:, None, None]

    @staticmethod
    def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size, mode="bilinear", antialias=True)
