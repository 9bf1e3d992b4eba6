"""The noise models of deepinv as laws of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invguide.errors import InputError
from invguide.noise import (
    Gaussian,
    Laplace,
    NoiseModel,
    Poisson,
    PoissonGaussian,
    Rician,
    Uniform,
)

LEAST = 1e-3  # of the root mean square of y: below it, a law of positive means goes on as a straight line
RANGE = 30.0  # of exponents, beyond which exp overflows in single precision when it is summed


def noise_law(model: nn.Module | None) -> NoiseModel | None:
    """Return the law of a deepinv noise model; None where it adds no noise.

    Each law may have one parameter per measurement. What cannot be evaluated is a law too, which says so where it is
    used: not when `sigma_y` or `noise` is given.
    """
    kind = type(model).__name__
    if model is None or kind in ("ZeroNoise", "Identity"):
        return None
    make = _LAWS.get(kind)
    if make is None:
        why = _UNKNOWN.get(kind, "is not among those whose density is known here")
        return Unknown(f"deepinv's {kind} {why}")
    return make(model)


class _Unbound(NoiseModel):
    """A law that is another one as soon as y is known."""

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        return self.bind(y).log_density(predicted, y)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        return self.bind(y).sigma(predicted, y)


class Unknown(_Unbound):
    """A law that cannot be evaluated, and why."""

    def __init__(self, why: str) -> None:
        self.why = why

    def bind(self, y: Tensor) -> NoiseModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(
            f"{self.why}; pass sigma_y=... for Gaussian noise of about that size, or noise=..., a law or your own log "
            f"density (predicted, y) -> (B,)"
        )


class PerRow(_Unbound):
    """A law with one parameter (B,) per measurement, whatever the rank of y."""

    def __init__(
        self, make: Callable[..., NoiseModel] | type[NoiseModel], *parameters: Tensor
    ) -> None:
        self.make, self.parameters = make, parameters

    def bind(self, y: Tensor) -> NoiseModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.make(*(per_row(p.flatten(), y) for p in self.parameters)).bind(y)


def per_row(value: Tensor, y: Tensor) -> Tensor:
    """Return a number, or one per measurement (B,), as something that broadcasts to y (B, *y_shape)."""
    if value.numel() not in (1, len(y)):
        raise InputError(
            f"the noise model has {value.numel()} parameters for {len(y)} measurements; expected 1 or {len(y)}"
        )
    return value.reshape(-1, *(1,) * (y.ndim - 1)).to(y.device, y.real.dtype)


class Gamma(NoiseModel):
    """Speckle: y ~ Gamma of shape l and mean A x, whose standard deviation is A x / sqrt(l).

    log p = -l (log A x + y / A x) + terms of y. Below 1e-3 of the root mean square of y it goes on as its tangent,
    which leads back up: bounded above.
    """

    tensors = ("looks", "floor")

    def __init__(self, looks: Tensor) -> None:
        self.looks, self.floor = looks, torch.zeros(())

    def bind(self, y: Tensor) -> Gamma:
        if y.is_complex() or bool((y < 0).any()):
            raise InputError("Gamma noise: y has negative or complex values; expected intensities")
        rms = y.flatten(1).square().mean(1).sqrt()
        return self._with(looks=_rows_of(self.looks, y), floor=LEAST * per_row(rms, y))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        mean = torch.maximum(predicted, self.floor)
        value = -self.looks * (mean.log() + y / mean)
        slope = (self.looks * (y / mean - 1) / mean).detach()
        below = (predicted - self.floor).clamp_max(0)
        return (value + slope * below).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(predicted.detach(), self.floor) / self.looks.sqrt()


class FisherTippett(NoiseModel):
    """Log-intensities of speckle: y = A x + log g, g ~ Gamma of shape l and mean 1.

    log p = l (y - A x) - l exp(y - A x); its mean is A x + digamma(l) - log l and its variance trigamma(l). The
    exponent is held below 30, beyond which the law goes on as a straight line.
    """

    tensors = ("looks",)

    def __init__(self, looks: Tensor) -> None:
        self.looks = looks

    def bind(self, y: Tensor) -> FisherTippett:
        if y.is_complex():
            raise InputError("Fisher-Tippett noise: y is complex; expected log-intensities")
        return self._with(looks=_rows_of(self.looks, y))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (self.looks * ((y - predicted) - _exp(y - predicted))).flatten(1).sum(1)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return torch.polygamma(1, self.looks).sqrt()

    def whitened(self, predicted: Tensor, y: Tensor) -> Tensor:
        mean = predicted + torch.digamma(self.looks) - self.looks.log()
        return (y - mean) / self.sigma(predicted, y)


class LogPoisson(NoiseModel):
    """Low-dose tomography: y = -log(N / N0) / mu, N ~ Poisson(N0 exp(-mu A x)).

    log p = N0 (-exp(-mu y) mu A x - exp(-mu A x)) + terms of y. A ray in which nothing was counted is y = infinity,
    which no measurement may hold: set it to the value of half a photon.
    """

    tensors = ("photons", "mu")

    def __init__(self, photons: Tensor, mu: Tensor) -> None:
        self.photons, self.mu = photons, mu

    def bind(self, y: Tensor) -> LogPoisson:
        if y.is_complex():
            raise InputError("log-Poisson noise: y is complex; expected line integrals")
        return self._with(photons=_rows_of(self.photons, y), mu=_rows_of(self.mu, y))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        counted = self.photons * torch.exp(-self.mu * y)
        value = -counted * self.mu * predicted - self.photons * _exp(-self.mu * predicted)
        best = -counted * self.mu * y - counted
        return (value - best).flatten(1).sum(1)  # 0 at most: sums of large terms lose digits

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        counts = self.photons * _exp(-self.mu * predicted.detach())
        return counts.clamp_min(0.5).rsqrt() / self.mu


class Counts(NoiseModel):
    """y ~ Poisson(A x / gain): counts that are not scaled back to the units of A x, which `Poisson` has."""

    tensors = ("gain",)

    def __init__(self, gain: Tensor) -> None:
        self.gain = gain

    def bind(self, y: Tensor) -> Counts:
        Poisson(1.0).bind(y)  # which refuses what no count is
        return self._with(gain=_rows_of(self.gain, y))

    def log_density(self, predicted: Tensor, y: Tensor) -> Tensor:
        return Poisson(1.0).bind(y).log_density(predicted / self.gain, y)

    def sigma(self, predicted: Tensor, y: Tensor) -> Tensor:
        return Poisson(1.0).bind(y).sigma(predicted / self.gain, y)

    def whitened(self, predicted: Tensor, y: Tensor) -> Tensor:
        return (y - predicted / self.gain) / self.sigma(predicted, y)

    def squares(self, predicted: Tensor, y: Tensor) -> Tensor | None:
        return Poisson(1.0).bind(y).squares(predicted / self.gain, y)


def _rows_of(value: Tensor, y: Tensor) -> Tensor:
    """A parameter, a number or one per measurement, as rows of the rank of y."""
    return per_row(value.detach().flatten(), y).expand(len(y), *(1,) * (y.ndim - 1))


def _exp(exponent: Tensor) -> Tensor:
    """exp below RANGE, and its tangent above."""
    held = exponent.clamp_max(RANGE)
    return held.exp() * (1 + (exponent - RANGE).clamp_min(0))


class Parts(_Unbound):
    """Gaussian noise of a stack of measurements, flattened and joined: part i has its own sigma_y.

    Args:
        sigmas: Of each part, a number or one per measurement (B,).
        sizes: Returns how many numbers each part has, or None as long as it is not known.
    """

    def __init__(
        self, sigmas: Sequence[Tensor], sizes: Callable[[], Sequence[int] | None]
    ) -> None:
        self.sigmas, self.sizes = sigmas, sizes

    def bind(self, y: Tensor) -> NoiseModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        sizes = self.sizes()
        if sizes is None or sum(sizes) != y[0].numel():
            told = "unknown" if sizes is None else " + ".join(map(str, sizes))
            raise InputError(
                f"the parts of this stack have {told} numbers, and one measurement has {y[0].numel()}; pass y as the "
                f"TensorList that the physics returns, or sigma_y=..."
            )
        rows = [
            per_row(sigma.flatten(), y).expand(len(y), size)
            for sigma, size in zip(self.sigmas, sizes, strict=True)
        ]
        return Gaussian(torch.cat(rows, 1)).bind(y)


def stacked_law(
    laws: Sequence[NoiseModel | None], sizes: Callable[[], Sequence[int] | None]
) -> NoiseModel | None:
    """Return the law of parts that are flattened and joined; None where no part has noise."""
    if all(law is None for law in laws):
        return None
    sigmas: list[Tensor] = []
    for i, law in enumerate(laws):
        if law is None:
            return Unknown(f"part {i} of the stack has no noise, others have")
        if isinstance(law, Unknown):
            return law
        if isinstance(law, Gaussian):
            sigmas.append(law.sigma_y.detach())
        elif isinstance(law, PerRow) and law.make is Gaussian:
            sigmas.append(law.parameters[0])
        else:
            kind = type(law).__name__
            return Unknown(
                f"part {i} of the stack has {kind} noise; stacks take Gaussian noise in all parts"
            )
    return Parts(sigmas, sizes)


def _gaussian(model: Any) -> NoiseModel | None:
    sigma: Tensor = model.sigma.detach()
    if sigma.numel() == 1 and sigma.item() <= 0:
        return None
    return _law(Gaussian, sigma)


def _poisson(model: Any) -> NoiseModel:
    return _law(Poisson, model.gain) if bool(model.normalize) else Counts(model.gain)


def _law(make: Callable[..., NoiseModel], *parameters: Tensor) -> NoiseModel:
    """A law of ours: of numbers where each parameter is one, else with parameters for each measurement."""
    if all(p.numel() == 1 for p in parameters):
        return make(*(p.item() for p in parameters))
    return PerRow(make, *(p.detach() for p in parameters))


_LAWS: dict[str, Callable[[Any], NoiseModel | None]] = {
    "GaussianNoise": _gaussian,
    "PoissonNoise": _poisson,
    "PoissonGaussianNoise": lambda model: _law(PoissonGaussian, model.gain, model.sigma),
    "LaplaceNoise": lambda model: _law(Laplace, model.b),
    "UniformNoise": lambda model: _law(Uniform, model.a),
    "RicianNoise": lambda model: _law(Rician, model.sigma),
    "GammaNoise": lambda model: Gamma(model.l),
    "FisherTippettNoise": lambda model: FisherTippett(model.l),
    "LogPoissonNoise": lambda model: LogPoisson(model.N0, model.mu),
}

_UNKNOWN = {
    "SaltPepperNoise": "replaces values by others: it has no density of y given A x that a solver could climb",
    "UniformGaussianNoise": "draws a noise level that is not told for every measurement",
    "NoiseModel": "is a function of your own, whose density is not known",
}


def refuse_sensor(physics: Any) -> None:
    sensor: Any = getattr(physics, "sensor_model", None)
    probe = torch.linspace(-3, 3, 16).reshape(1, 1, 4, 4)
    try:
        same = sensor is None or torch.equal(sensor(probe), probe)
    except Exception:
        same = False
    if not same:
        raise InputError(
            f"{type(physics).__name__} has a sensor_model, which acts after the noise: no law here describes it. Leave "
            f"it out (sensor_model=lambda x: x), or pass physics.A as the operator with noise=..., your log density"
        )
