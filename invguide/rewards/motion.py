"""Motion: whether the parts of a picture have moved as they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invguide.arguments.rules import NonNegative
from invguide.errors import InputError, ShapeError
from invguide.reward import EditReward
from invguide.rewards._images import check_images, read_reference, require_image
from invguide.rewards.network_reward import NetworkReward, as_floats

WARPS = ("target", "estimated")


class _Against(nn.Module):
    """The user's flow network, with the source as its first picture."""

    def __init__(self, source: Tensor, estimator: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.estimator, self.source = estimator, [source]  # in a list: no tensor whose type counts

    def forward(self, x: Tensor) -> Any:
        return self.estimator(self.source[0].to(x).expand_as(x), x)


@dataclass(frozen=True, repr=False, eq=False)
class Motion(NetworkReward, EditReward):
    """-(flow_weight * mean |F(source, x) - flow| + colour_weight * mean over visible pixels |source - warp(x)|).

    What is at pixel p of the source should be at p + flow(p) of x: F is an optical flow network, and warp(x)(p) =
    x(p + flow(p)), bilinear. A pixel is visible unless it leaves the picture, or is still and something that moves
    comes to lie on it. It is the loss of motion guidance (Geng and Owens 2024), which warps by the estimated flow.

    Args:
        source: The picture that is edited, (C, H, W), data units.
        flow: Wanted motion of each of its pixels, (2, H, W): to the right and down, in pixels.
        estimator: F, (B, C, H, W) twice -> flow (B, 2, H, W) from the first to the second, or a list whose last entry
            that is. Default None: colours only; such as `RAFT()`.
        edit_mask: Where the picture may change, (H, W) or (1, H, W), 1 or True; `MotionGuidance` keeps the rest.
            Default None: everywhere.
        flow_weight: As above, 0 or more, per pixel of error. Default 3.0; higher where things do not move far enough.
        colour_weight: As above, 0 or more, per data unit of error. Default 100.0; higher where things change their
            looks.
        warp: "target": by the wanted flow; "estimated": by F(source, x). Default "target"; "estimated" as in the paper.

    Raises:
        InputError: Values that cannot be.
        ShapeError: A flow or mask of another size than the source, samples that are not such pictures, or an estimator
            that returns no flow.
    """

    source: Tensor
    flow: Tensor
    estimator: Callable[[Tensor, Tensor], Any] | None = None
    edit_mask: Tensor | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    flow_weight: NonNegative = 3.0
    colour_weight: NonNegative = 100.0
    warp: str = "target"
    visible: Tensor = field(init=False)  # (H, W)

    def __post_init__(self) -> None:
        source = require_image(self, read_reference(self, self.source))
        height, width = source.shape[1:]
        if min(height, width) < 2:
            raise ShapeError(f"Motion: the source is {height} x {width}; expected at least 2 x 2")
        flow = self.flow.detach().to(source)
        if flow.shape != (2, height, width):
            raise ShapeError(
                f"Motion: the flow has shape {tuple(flow.shape)}; expected (2, {height}, {width}), as the source"
            )
        mask = torch.ones(1, height, width) if self.edit_mask is None else self.edit_mask
        mask = mask.detach().to(source)
        if mask.shape not in ((height, width), (1, height, width)):
            raise ShapeError(
                f"Motion: the edit mask has shape {tuple(mask.shape)}; expected ({height}, {width}), as the source"
            )
        if not bool(torch.isfinite(flow).all()):
            raise InputError("Motion: the flow has NaN or infinite values")
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise InputError("Motion: the edit mask goes beyond [0, 1]; 1 may change, 0 must not")
        if self.warp not in WARPS or (self.warp == "estimated" and self.estimator is None):
            raise InputError(
                f"Motion: warp is {self.warp!r}; expected 'target', or with an estimator 'estimated'"
            )
        for name, value in (
            ("source", source),
            ("flow", flow),
            ("edit_mask", mask.reshape(1, height, width)),
        ):
            object.__setattr__(self, name, value)
        if self.estimator is not None:
            self.connect(_Against(source, self.estimator), None)
        object.__setattr__(self, "visible", visible_pixels(flow))

    def __call__(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=len(self.source))
        if x.shape[1:] != self.source.shape:
            raise ShapeError(
                f"Motion was given images of shape {tuple(x.shape[1:])}; expected that of the source, "
                f"{tuple(self.source.shape)}"
            )
        wanted = self.flow.to(x).expand(len(x), -1, -1, -1)
        score = x.new_zeros(len(x))
        found = wanted if self.estimator is None else self._estimate(x)
        if self.estimator is not None:
            score = score - self.flow_weight * (found - wanted).abs().mean((1, 2, 3))
        warped = warp_by(x, found if self.warp == "estimated" else wanted)
        visible = self.visible.to(x)
        difference = (warped - self.source.to(x)).abs().mean(1) * visible
        return score - self.colour_weight * difference.sum((1, 2)) / visible.sum().clamp_min(1)

    def _estimate(self, x: Tensor) -> Tensor:
        found = self.network(x)
        found = found[-1] if isinstance(found, (list, tuple)) else found
        expected = (len(x), 2, *x.shape[2:])
        if not isinstance(found, Tensor) or found.shape != expected:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"Motion: the estimator returned {got}; expected a flow {expected}")
        return as_floats(found).to(x)


def warp_by(x: Tensor, flow: Tensor) -> Tensor:
    """x (B, C, H, W) at p + flow(p), bilinear; beyond its edge, the edge."""
    height, width = x.shape[2:]
    size = x.new_tensor([width - 1, height - 1])
    where = 2 * (_grid(flow) + flow).movedim(1, -1) / size - 1
    return F.grid_sample(x, where, mode="bilinear", padding_mode="border", align_corners=True)


def visible_pixels(flow: Tensor) -> Tensor:
    """Which pixels of the source are still to be seen in the result, (2, H, W) -> (H, W) booleans.

    Those that stay inside, but not what is still and has something that moves come to lie within a pixel of it.
    """
    _, height, width = flow.shape
    column, row = (_grid(flow) + flow).flatten(1)
    moves = (flow != 0).any(0).flatten()
    covered = torch.zeros_like(moves)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = column.floor() + dx, row.floor() + dy
        near = moves & ((column - x).abs() < 1) & ((row - y).abs() < 1)
        near &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
        covered[(y * width + x)[near].long()] = True
    inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    return (inside & (moves | ~covered)).reshape(height, width)


def _grid(flow: Tensor) -> Tensor:
    """Column and row of each pixel, (2, H, W)."""
    height, width = flow.shape[-2:]
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
