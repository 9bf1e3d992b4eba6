"""Denoisers of deepinv: DRUNet, DiffUNet, ADMUNet, NCSNpp and every other deepinv.models.Denoiser."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from invguide.errors import InputError
from invguide.priors.network import NetworkPrior, from_network
from invguide.priors.networks.labels import WithLabels, check_label, refuse_label

# Plain image denoisers (DRUNet, SCUNet, ...) are trained up to 50 grey levels of 255; twice that in [-1, 1].
LARGEST_OF_DENOISERS = 2 * 50 / 255


def is_deepinv(net: object) -> bool:
    return any(
        kind.__name__ == "Denoiser" and kind.__module__.startswith("deepinv.models")
        for kind in type(net).__mro__
    )


def load_deepinv(
    net: nn.Module, *, shape: tuple[int | None, ...] | None = None, **settings: Any
) -> NetworkPrior:
    """Return the prior of a deepinv denoiser; it keeps the network, in evaluation mode and frozen.

    deepinv's D(x, sigma) is in [0, 1]; here it is in [-1, 1]: 2 D((x + 1) / 2, sigma / 2) - 1. DiffUNet is not
    called so: that would cut D off to [-1, 1], where no gradient is left, and round sigma to the nearest step.
    Its network is called for the noise instead.

    Args:
        net: A deepinv.models.Denoiser.
        shape: Of one sample; by default what the network tells of itself, else (3, any, any).
        settings: As for `from_network`. sigma_max is 0.39 of a plain image denoiser, of which nothing is known
            beyond 50 grey levels of noise.

    Raises:
        InputError: The denoiser cuts its output off.
    """
    if hasattr(net, "forward_diffusion"):
        shape = shape or (int(net.in_channels), None, None)  # pyright: ignore[reportArgumentType]
        multiple = 2 ** (len(net.channel_mult) - 1)  # pyright: ignore[reportArgumentType]
        return from_network(
            _NoiseOfDiffUNet(net),
            **{"predicts": "eps", "schedule": "linear-vp", "multiple": multiple, **settings},
            shape=shape,
        )
    if getattr(net, "clip_output", False):
        raise InputError(
            f"this {type(net).__name__} cuts its output off, where no gradient is left: make it with "
            "clip_output=False"
        )
    levels = {"sigma_max": LARGEST_OF_DENOISERS, "sigma_min": 1 / 255}
    labels = 0
    if hasattr(net, "pixel_std"):  # ADMUNet and NCSNpp, preconditioned as in EDM
        unit = 1 if getattr(net, "_was_trained_on_minus_one_one", False) else 2
        levels = {"sigma_min": 0.002 * unit, "sigma_max": 80.0 * unit}
        first = next(p for name, p in net.named_parameters() if name.endswith("_conv.weight"))
        shape = shape or (first.shape[1], None, None)
        labels = int(getattr(getattr(net, "map_label", None), "in_features", 0))
    return from_network(
        WithLabels(_InMinusOneToOne(net), labels, one_hot=True),
        **{"predicts": "x0", "schedule": "ve", **levels, **settings},
        shape=shape or (3, None, None),
    )


class _InMinusOneToOne(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        return 2 * self.net((x + 1) / 2, sigma / 2, **condition) - 1


class _NoiseOfDiffUNet(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if self.net.num_classes is None:
            refuse_label(label)
            return self.net.forward_diffusion(x, time)
        label = check_label(label, self.net.num_classes, len(x))
        return self.net.forward_diffusion(x, time, y=label)
