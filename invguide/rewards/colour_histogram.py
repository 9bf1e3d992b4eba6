"""ColourHistogram: how alike the distributions of two pictures' intensities are, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from invguide.arguments.rules import Positive, Several
from invguide.errors import InputError, ShapeError
from invguide.reward import Reward
from invguide.rewards._describe import describe
from invguide.rewards._images import check_images, read_reference, require_image


@dataclass(frozen=True, repr=False, eq=False)
class ColourHistogram(Reward):
    """-mean over channels of the Wasserstein-1 distance between histograms: how far intensities have to move.

    Each pixel counts as 1, shared between the bins in proportion to exp(-(x - centre)^2 / (2 h^2)); with a narrow
    bandwidth h this is the ordinary histogram. The bins divide [0, 1]; pixels beyond it belong to the nearest one and
    have no slope. The distance, in data units, is the mean absolute difference of the cumulative histograms, so that
    the gradient knows the way however far it is.

    With gradients it holds a few times N C H W K numbers in memory.

    Args:
        reference: A picture (C, H, W) of any size in [0, 1], or its histograms (C, K), one distribution a row.
        bins: K, at least 2. Default None: 32, or as many as the given histograms have; fewer to save memory.
        bandwidth: h in widths of a bin, above 0. Default 1.0; lower for the ordinary histogram, whose slope is 0 nearly
            everywhere.

    Raises:
        InputError: Numbers of bins, bandwidths or histograms that cannot be.
        ShapeError: Images of other channels than the reference.

    Example:
        >>> import torch
        >>> darker = ColourHistogram(torch.full((1, 8, 8), 0.25))(torch.full((1, 1, 8, 8), 0.75))
        >>> round(darker.item(), 2)
        -0.5
    """

    reference: Tensor
    bins: Several | None = None
    bandwidth: Positive = 1.0
    wanted: Tensor = field(init=False)  # (C, K), fractions of the reference's pixels

    def __post_init__(self) -> None:
        reference = read_reference(self, self.reference)
        if reference.ndim == 2:
            self._check_histograms(reference)
            bins, wanted = reference.shape[1], reference.double()
        else:
            bins = self.bins or 32
            wanted = self._histograms(require_image(self, reference)[None].double(), bins)[0]
        for name, value in (("reference", reference), ("bins", bins), ("wanted", wanted)):
            object.__setattr__(self, name, value)

    def _check_histograms(self, reference: Tensor) -> None:
        bins = reference.shape[1]
        if bins < 2 or self.bins not in (None, bins):
            raise ShapeError(
                f"the histograms have shape {tuple(reference.shape)}; expected (C, {self.bins or 'K'}), K at least 2"
            )
        sums = reference.double().sum(1)
        if bool((reference < 0).any()) or not torch.allclose(
            sums, torch.ones_like(sums), atol=1e-4
        ):
            raise InputError(
                f"the histograms of the channels sum to {sums.tolist()}; expected fractions of the pixels, 0 or more, "
                f"that sum to 1"
            )

    def _histograms(self, x: Tensor, bins: int) -> Tensor:
        """(N, C, H, W) -> (N, C, K), fractions of the pixels."""
        centres = (torch.arange(bins, dtype=x.dtype, device=x.device) + 0.5) / bins
        away = (x.flatten(2)[..., None] - centres) * (bins / self.bandwidth)
        return away.square().mul(-0.5).softmax(-1).mean(2)

    def __call__(self, x: Tensor) -> Tensor:
        check_images(self, x, channels=len(self.wanted))
        found = self._histograms(x, self.wanted.shape[1])
        return -(found - self.wanted.to(x)).cumsum(-1).abs().mean(-1).mean(1)

    def __repr__(self) -> str:
        return describe(self)
