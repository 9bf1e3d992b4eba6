"""SegmentationAgreement: how well a segmenter recognises the wanted regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from invguide.errors import InputError, ShapeError
from invguide.rewards.network_reward import Function, NetworkReward, read_logits


@dataclass(frozen=True, repr=False, eq=False)
class SegmentationAgreement(NetworkReward):
    """Mean over pixels of log p(label of the pixel | x), natural logarithm; 0 is perfect agreement.

    Logits of another size than the labels are resized to it, bilinearly. The segmentation loss of universal guidance
    (Bansal et al. 2023) is its negative.

    Args:
        segmenter: Images -> logits (N, K, H', W'), or a dict that has them as "logits" or "out".
        labels: Wanted class of each pixel, (H, W) integers; or booleans, of which True is class 1.
        ignore_index: Pixels with this label do not count. Default None: all do; 255 in many data sets.
        transform: Images in [0, 1] -> what the segmenter expects. Default None: as they are; such as
            `Preprocess.imagenet(None)`.

    Raises:
        InputError: Labels that the segmenter does not have, nothing but ignored pixels, something else than logits.
        ShapeError: Labels or logits of another shape.
    """

    segmenter: Function
    labels: Tensor
    ignore_index: int | None = None
    transform: Function | None = None

    def __post_init__(self) -> None:
        labels = self.labels.detach()
        if labels.ndim != 2 or not labels.numel():
            raise ShapeError(
                f"labels have shape {tuple(labels.shape)}; expected (H, W), shared by all samples"
            )
        if labels.is_floating_point() or labels.is_complex():
            raise InputError(f"labels are {labels.dtype}; expected class indices: labels.long()")
        labels = labels.to(torch.int64, copy=True)
        counts = torch.ones_like(labels, dtype=torch.bool)
        if self.ignore_index is not None:
            counts = labels != self.ignore_index
        wanted = labels[counts]  # (P,)
        if not wanted.numel():
            raise InputError(
                f"every pixel has the label {self.ignore_index}, which is ignored; nothing is left to score"
            )
        low = int(wanted.min())
        if low < 0:
            raise InputError(f"labels go down to {low}; expected 0 or more, or ignore_index={low}")
        object.__setattr__(self, "labels", labels)
        self.connect(self.segmenter, self.transform)
        self.network.register_buffer("counts", counts)
        self.network.register_buffer("wanted", wanted)

    def __call__(self, x: Tensor) -> Tensor:
        logits = read_logits(self, self.network(x), len(x), ndim=4)
        counts, wanted = self.network.get_buffer("counts"), self.network.get_buffer("wanted")
        if logits.shape[2:] != counts.shape:
            logits = F.interpolate(logits, tuple(counts.shape), mode="bilinear")
        if wanted.max() >= logits.shape[1]:
            raise InputError(
                f"labels go up to {int(wanted.max())}; expected 0 to {logits.shape[1] - 1}, the segmenter has "
                f"{logits.shape[1]} classes; pixels that do not count are named by ignore_index=..."
            )
        log_prob = logits[:, :, counts].log_softmax(1)  # (N, K, P)
        return log_prob.gather(1, wanted.expand(len(x), 1, -1)).mean((1, 2)).to(x)
