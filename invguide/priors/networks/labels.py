"""Class labels of conditional networks: one index per sample, checked where they enter."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from invguide.errors import InputError


def check_label(label: Tensor | None, classes: int, batch: int) -> Tensor:
    """Return the label, (batch,) indices below `classes`, or say what to pass."""
    if label is None:
        raise InputError(
            f"this prior is conditional on one of {classes} classes: pass condition={{'label': ...}} to solve, "
            "or label=... to denoise, with one class index per sample"
        )
    if label.shape != (batch,) or not bool(((label >= 0) & (label < classes)).all()):
        raise InputError(
            f"label must be {batch} class indices from 0 to {classes - 1}, one per sample; "
            f"got {label.tolist()}"
        )
    return label


def refuse_label(label: Tensor | None) -> None:
    if label is not None:
        raise InputError("this prior is not conditional on a class: leave label out")


class WithLabels(nn.Module):
    """A network of another library, which names its labels otherwise, as net(x, time, label=(B,)).

    Args:
        net: Called with class_labels=... where it is conditional.
        classes: Their number; 0 of an unconditional network.
        one_hot: It takes labels as rows of 0 and one 1, in the type of x, rather than as indices.
        method: The one of the network that computes.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int = 0,
        *,
        one_hot: bool = False,
        method: str = "__call__",
    ) -> None:
        super().__init__()
        self.net, self.classes, self.one_hot, self.method = net, classes, one_hot, method

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Any:
        call = getattr(self.net, self.method)
        if not self.classes:
            refuse_label(label)
            return call(x, time)
        label = check_label(label, self.classes, len(x))
        if self.one_hot:
            label = F.one_hot(label.long(), self.classes).to(x.dtype)
        return call(x, time, class_labels=label)
