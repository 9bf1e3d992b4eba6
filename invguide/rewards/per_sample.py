"""PerSample: the base of rewards that look at one sample at a time, in numpy."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from invguide.errors import ShapeError
from invguide.reward import Reward


class PerSample(Reward):
    """A black-box reward given by `score`; a sample with a NaN or infinite value scores NaN."""

    differentiable = False

    @abstractmethod
    def score(self, sample: np.ndarray) -> float:
        """Score one sample, a float64 array (*shape) in data units that must not be changed."""

    def __call__(self, x: Tensor) -> Tensor:
        samples = x.detach().cpu().double().numpy()
        scores = [self.score(s) if np.isfinite(s).all() else float("nan") for s in samples]
        return torch.tensor(scores, dtype=x.dtype, device=x.device)


def check_image(sample: np.ndarray, reward: Reward) -> None:
    """Raise ShapeError unless the sample is a picture (C, H, W)."""
    if sample.ndim != 3:
        raise ShapeError(
            f"{type(reward).__name__} was given samples of shape {sample.shape}; expected images (C, H, W)"
        )
