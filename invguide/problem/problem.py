"""Prior and target together, as a solver sees them: in normalised units, counted, one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.checks import Checked
from invguide.arguments.rules import Shape
from invguide.errors import InputError, InvguideError, RunError, ShapeError
from invguide.forward_operator import (
    LinearOperator,
    Operator,
    multiple_of_identity,
    orthonormal_scale,
)
from invguide.likelihood import Likelihood
from invguide.noise import CountingLaw, Gaussian, GaussianLaw
from invguide.noise.counts import Counts
from invguide.numerics.linear import inner, norm, per_sample
from invguide.prior import Prior
from invguide.problem.data_size import SharedSize, measured_size, of_first
from invguide.problem.proximal import ACCURACY, proximal
from invguide.problem.seen import Seen
from invguide.problem.whitened_map import WhitenedMap
from invguide.reward import Reward, terms
from invguide.schedule import Schedule, level_list
from invguide.system.surroundings import usable

# Standard deviation that a data step leaves to values of which y tells little, in units of sigma_data: what is clipped
# is known to be above a level, and the mean above it would be as far off as the noise level is high. 0.35 to 0.7 are
# within 0.4 dB on over-exposed photographs, 1 is 1.5 dB worse and 0.25 1 dB.
OPEN = 0.5

R = TypeVar("R", bound=Reward)

GREY = (
    "y is grey and the prior one of colour pictures: take ig.priors.Grey(prior), or operators.Grayscale() for an x in "
    "colour"
)


@dataclass
class Counters:
    """Calls so far, one per sample: a batch of eight counts eight."""

    network: int = 0
    vjp: int = 0
    forward: int = 0

    def restore(self, other: Counters) -> None:
        """Take over the numbers of another count; who holds this one sees them."""
        self.network, self.vjp, self.forward = other.network, other.vjp, other.forward


class Guidance(NamedTuple):
    """What one differentiated denoiser call tells."""

    denoised: Tensor  # D(x), (B, *shape)
    log_prob: Tensor  # log target at D, (B,)
    chi2: Tensor  # at D, (B,); NaN without a noise level
    slope: Tensor  # d log target / d D, (B, *shape)
    gradient: Tensor  # d log target / d x = J^T slope, (B, *shape)


class WhitenedLinear:
    """L^-1 (y - A x) as an affine function of x in normalised units, for a linear operator and Gaussian noise."""

    def __init__(self, likelihood: Likelihood, prior: Prior) -> None:
        self.likelihood, self.prior = likelihood, prior
        self.white = WhitenedMap(likelihood)

    def residual(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *y_shape)."""
        return self.white.residual(self.prior.to_data(x))

    def forward(self, v: Tensor) -> Tensor:
        """Of a change of x."""
        return self.white(self.prior.scale * v)

    def adjoint(self, u: Tensor) -> Tensor:
        return self.prior.scale * self.white.adjoint(u)

    def draw(self, noise: Callable[..., Tensor], purpose: str) -> Tensor:
        """Whitened measurement noise, (B, *y_shape), 0 where nothing is observed; a complex one has two parts."""
        y = self.likelihood.y
        e = noise(purpose, tuple(y.shape[1:]))
        if y.is_complex():
            e = torch.complex(e, noise(f"{purpose}, imaginary", tuple(y.shape[1:])))
        return self.likelihood.only_known(e)

    def precondition(self, u: Tensor, variance: Tensor) -> Tensor:
        """About (I + variance A A* / sigma_y^2)^-1 u, variance (B,), normalised; u where no one sigma_y holds for y.

        Exact where the operator can solve in closed form, else to a relative residual of 0.05: steps of conjugate
        gradients that are preconditioned so need no more.
        """
        sigma = self.white.noise.one_sigma
        if sigma is None:
            return u
        ridge = (sigma / self.prior.scale) ** 2 / variance
        near = 0.05 * inner(u, u).sqrt() / (2 * ridge.sqrt())
        solved = self.white.operator.solve_within(u, ridge, near) * per_sample(ridge, u.real)
        return self.likelihood.only_known(solved) if self.likelihood.masked else solved


class Problem(metaclass=Checked):
    """A prior, a likelihood or a reward (or both), and the change between normalised and data units.

    Args:
        prior: The prior.
        likelihood: log p(y | x), data units.
        reward: r(x), data units, added to the likelihood.
        shape: Shape of one sample, data units; from the prior, else from the operator, where it is not given.
        condition: Keywords for the prior: tensors, arrays, lists or numbers, each with one row per measurement or one
            for all of them.
        init: Clean signals to start from, data units, (B, *shape) or (1, *shape); None: noise alone.
        init_noise: Standard deviation of the noise that is added to them, data units: where the levels begin.

    Raises:
        ShapeError: No part knows the shape, or two of them disagree.
        InputError: One of init and init_noise without the other, or that cannot be.
    """

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood | None = None,
        reward: Reward | None = None,
        *,
        shape: Shape | None = None,
        condition: Mapping[str, Any] | None = None,
        init: Tensor | np.ndarray | None = None,
        init_noise: float | None = None,
    ) -> None:
        self.prior, self.likelihood, self.reward = prior, likelihood, reward
        rows = 1 if likelihood is None else len(likelihood.y)
        self.condition = {
            name: usable(_condition_rows(name, value, None if likelihood is None else rows))
            for name, value in (condition or {}).items()
        }
        self.counters = Counters()
        self.batch_size: int | None = None  # rows in one network call; None: all of them
        self.size = SharedSize(self.condition)
        self._orthonormal: float | None = None  # its scale, 0 where it is not; None: not yet asked
        self._own_step: bool | None = None
        self._gain: Tensor | None = None
        exact = torch.promote_types(prior.dtype, torch.float32)
        self.like = torch.empty(0, dtype=exact, device=prior.device)  # of what type states are
        self.shape = _resolve_shape(prior, likelihood, shape)
        self.num_measurements = rows
        self.origin = torch.arange(rows)  # the measurement of each row
        self.seen: Seen | None = None  # what the target answers, where somebody wants to know
        self.start, self.top = self._begin_at(init, init_noise)

    def _with(self, **changes: Any) -> Problem:
        part = self.__new__(type(self))
        vars(part).update(self.__dict__, **changes)
        return part

    def _begin_at(
        self, init: Tensor | np.ndarray | None, init_noise: float | None
    ) -> tuple[Tensor | None, float]:
        """Where a run begins, normalised units, (B, *shape), and the highest level of its schedules."""
        prior, top = self.prior, self.prior.sigma_max
        if init is None and init_noise is None:
            return None, top
        if init is None or init_noise is None:
            raise InputError(
                "init and init_noise belong together: clean signals to start from, and the standard deviation of the "
                "noise added to them, data units (0.3 changes details of pictures in [0, 1], 1 nearly all)"
            )
        if not prior.affine:
            raise InputError(
                "init= with a prior of latents: it would have to be encoded; leave it out"
            )
        level = float(init_noise) / prior.scale
        if not prior.sigma_min < level <= top:
            raise InputError(
                f"init_noise is {float(init_noise):g}; expected a standard deviation above "
                f"{prior.sigma_min * prior.scale:g} and at most {top * prior.scale:g}, data units"
            )
        start = torch.as_tensor(init).to(self.like)
        wanted = (self.num_measurements, *self.data_shape)
        if start.shape == wanted[1:]:
            start = start[None]
        if start.shape[1:] != wanted[1:] or len(start) not in (1, wanted[0]):
            raise ShapeError(
                f"init has shape {tuple(start.shape)}; expected clean signals {wanted}, one per measurement"
            )
        if not bool(start.isfinite().all()):
            raise InputError("init has NaN or infinite values; expected clean signals, data units")
        return prior.to_normalised(start).expand(wanted[0], *start.shape[1:]), level

    def with_reward(self, reward: Reward | None) -> Problem:
        """Return the problem with another reward, or none; the counters are shared."""
        return self._with(reward=reward)

    def rows(self, index: Tensor) -> Problem:
        """Return the problem whose row i is measurement index[i]; the counters are shared."""
        likelihood = None if self.likelihood is None else self.likelihood.rows(index)
        condition = {k: v[index.to(v.device)] for k, v in self.condition.items()}
        start = None if self.start is None else self.start[index.to(self.start.device)]
        return self._with(
            likelihood=likelihood,
            condition=condition,
            origin=self.origin[index.cpu()] if likelihood else torch.zeros_like(index.cpu()),
            start=start,
            _gain=None,
        )

    def repeat(self, count: int, rows: int) -> Problem:
        """Return the problem of `rows` rows with each row `count` times in a row, as candidates b * count + k."""
        return self.rows(torch.arange(rows).repeat_interleave(count))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        """Move prior (in place, as any module), operator and measurement; y and sigma_y take the dtype."""
        self.prior.to(device)
        likelihood = None if self.likelihood is None else self.likelihood.to(device, dtype)
        condition = {k: v.to(device) for k, v in self.condition.items()}
        like = torch.empty(0, dtype=dtype, device=device)
        start = None if self.start is None else self.start.to(like)
        return self._with(
            likelihood=likelihood, condition=condition, like=like, start=start, _gain=None
        )

    def replica(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        """Return a copy on another device that shares nothing with this one but the measured size of clean signals.

        Raises:
            InputError: The operator or reward is a black box: its workers cannot be copied.
        """
        if not self.differentiable:
            raise InputError(
                "a black box has workers of its own and serves one device; give one device, or call torch only"
            )
        return deepcopy(self).to(device, dtype)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one sample in data units; `shape` is that in normalised units."""
        return self.prior.data_shape(self.shape)

    # ---- the prior

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] under the prior, (B, *shape) -> (B, *shape); one network call per row, `batch_size` at a time."""
        self.counters.network += len(x)
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        size = self.batch_size or len(x)
        if len(x) <= size:
            return self.prior.denoise(x, level, **self.condition)
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        return torch.cat(
            [
                self.prior.denoise(
                    x[part],
                    level[part] if level.ndim else level,
                    **{name: value[part] for name, value in self.condition.items()},
                )
                for part in parts
            ]
        )

    @property
    def sigma_data(self) -> float:
        """Root mean square of clean signals, normalised units, as the prior tells, or else as measured."""
        told = self.prior.sigma_data
        return self.measured_size() if told is None else told

    def measured_size(self) -> float:
        """The same, measured: see `invguide.problem.data_size`; the network calls of the first time are counted.

        Raises:
            RunError: Signals drawn from the prior are not finite.
        """
        return self.size.get(self._measure)

    def _measure(self) -> float:
        first = {name: value.to(self.like.device) for name, value in self.size.condition.items()}

        def denoise(x: Tensor, sigma: float) -> Tensor:
            # One by one: that fits into memory wherever the run itself does, and the batch makes no difference.
            return self._with(condition=of_first(first, len(x)), batch_size=1).denoise(x, sigma)

        prior = self.prior
        value = measured_size(denoise, self.shape, prior.sigma_min, prior.sigma_max, self.like)
        if not value < float("inf"):
            raise RunError(
                f"signals drawn from {type(prior).__name__} between its sigma_max={prior.sigma_max:g} and "
                f"sigma_min={prior.sigma_min:g} are not finite; narrow that range, or mend its denoise"
            )
        return value

    def levels(self, schedule: Schedule, num_steps: int, k: int) -> tuple[float, float]:
        """Return the noise levels (a, b) of step k of a schedule that spans the prior's range."""
        sigmas = self.all_levels(schedule, num_steps)
        return sigmas[k], sigmas[k + 1]

    def all_levels(self, schedule: Schedule, num_steps: int) -> tuple[float, ...]:
        """Return the num_steps + 1 noise levels of a schedule that spans the prior's range, ending at 0.

        Where signals to start from are given it begins at the level of their noise.
        """
        named = schedule if isinstance(schedule, str) else tuple(schedule)
        return level_list(named, num_steps, self.prior.sigma_min, self.top)

    def begin(self, level: float | Tensor, n: Tensor) -> Tensor:
        """Where a run begins at this level: level n with standard normal n, plus the signal to start from."""
        return level * n if self.start is None else self.start + level * n

    # ---- the target, in normalised units

    def evaluate(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Log target (B,) and chi2 (B,; NaN without a likelihood) of clean signals x0 (B, *shape)."""
        data = self.prior.to_data(x0)
        log_prob = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
        chi2 = torch.full_like(log_prob, float("nan"))
        self.counters.forward += len(x0)
        if self.likelihood is not None:
            log_prob, chi2 = self.likelihood.evaluate(data)
        if self.reward is not None:
            log_prob = log_prob + self.reward(data)
        if self.seen is not None:
            self.seen.add(self.origin, x0, log_prob)
        return log_prob, chi2

    def whitened(self, x0: Tensor) -> Tensor:
        """Residual (y - A x0) / sigma_y as real numbers, (B, m), m = `measurement_size`: log p(y | x0) = -|r|^2 / 2.

        For methods that see a black box through an ensemble. A row whose forward model failed is NaN, and so is one
        that is absurd beside the others (`invguide.problem.seen`).
        """
        assert self.likelihood is not None
        self.counters.forward += len(x0)
        residuals = self.likelihood.whitened(self.prior.to_data(x0))
        if bool((self.origin == self.origin[0]).all()):  # an ensemble
            residuals = (self.seen or Seen()).without_absurd(residuals)
        if self.seen is not None and self.reward is None:
            self.seen.add(self.origin, x0, -0.5 * residuals.square().sum(1))
        return residuals

    def gradient(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log target, chi2, d log target / d x0) at clean signals x0."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            log_prob, chi2 = self.evaluate(x0)
            (gradient,) = _gradient(log_prob, x0)
        return log_prob.detach(), chi2, gradient

    def guide(
        self, x: Tensor, sigma: Tensor | float, keep: Callable[[Tensor], Tensor] | None = None
    ) -> Guidance:
        """Denoise x and differentiate the log target at D(x) with respect to x: one network call and one vjp.

        `keep` changes D before the target sees it, such as to what is known of it.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = self.denoise(x, sigma)
            denoised = denoised if keep is None else keep(denoised)
            log_prob, chi2 = self.evaluate(denoised)
            self.counters.vjp += len(x)
            slope, gradient = _gradient(log_prob, denoised, x)
        return Guidance(denoised.detach(), log_prob.detach(), chi2, slope, gradient)

    def prox(self, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """argmin_z -log p(y | z) + |z - x0|^2 / (2 sigma^2); sigma in normalised units, () or (B,).

        The posterior mean of z instead where the operator knows its own: see `invguide.problem.proximal`.
        """
        assert self.likelihood is not None
        self.counters.forward += len(x0)
        if self.own_data_step:
            level = torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device)
            sigma = (level**-2 + (OPEN * self.sigma_data) ** -2) ** -0.5
        if not self.prior.affine:
            decoded = self.likelihood.through(self.prior.to_data)
            return proximal(decoded, x0, torch.as_tensor(sigma, dtype=x0.dtype) ** 2)
        variance = (
            torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device) * self.prior.scale
        ) ** 2
        return self.prior.to_normalised(
            proximal(self.likelihood, self.prior.to_data(x0), variance, ACCURACY)
        )

    @property
    def y(self) -> Tensor:
        """The measurement of each row, (B, *y_shape); for problems with a likelihood."""
        assert self.likelihood is not None
        return self.likelihood.y

    def blank_estimate(self) -> Tensor:
        """The proximal point of a blank signal under a white prior of the data's size: a first guess, (B, *shape)."""
        y = self.y
        blank = torch.zeros(len(y), *self.shape, dtype=y.real.dtype, device=y.device)
        return self.prox(blank, self.sigma_data)

    @property
    def sigma_y(self) -> Tensor | None:
        """Noise standard deviation of each row divided by the data scale, (B,), where it is one number; else None."""
        noise = self.likelihood.noise if self.likelihood and self.prior.affine else None
        sigma = noise.one_sigma if isinstance(noise, GaussianLaw) else None
        return None if sigma is None else sigma / self.prior.scale

    def require_sigma_y(self, who: str) -> Tensor:
        """Return `sigma_y`, or raise InputError on behalf of `who`."""
        if self.sigma_y is None:
            raise InputError(
                f"{who} is defined for Gaussian noise with one sigma_y per measurement only, in pixels, not latents"
            )
        return self.sigma_y

    @property
    def noise_level(self) -> Tensor | None:
        """Of what standard deviation the noise is in signals, normalised units, (B,); None where no law tells.

        That of y over the gain of the operator, so that units of y drop out. Of Gaussian laws whose deviation varies
        the median, where some may stand for no value at all; of others the root mean square weighted by the variance:
        that of the bright parts, for counts.
        """
        if self.likelihood is None or not self.prior.affine:
            return None
        law, y = self.likelihood.noise, self.y
        sigma = law.sigma(y, y)
        if sigma is None or law.squares(y, y) is None:
            return None
        sigma = sigma.expand(y.shape).flatten(1).contiguous()  # median misreads expanded ones
        if isinstance(law, GaussianLaw):
            sigma = sigma.median(1).values
        else:
            scale = sigma.amax(1, keepdim=True)
            known = self.likelihood.only_known(torch.ones_like(y.real)).flatten(1)
            square = known * (sigma / scale) ** 2
            sigma = scale[:, 0] * ((square**2).sum(1) / square.sum(1)).sqrt()
        return sigma / self.gain() / self.prior.scale

    def gain(self) -> Tensor:
        """By how much a change of a signal comes out larger in y, (B,): root mean square over that of the change.

        The larger of two changes: from dark to bright everywhere, and, for maps that are blind to that, a white one.
        """
        if self._gain is not None and len(self._gain) == len(self.y):
            return self._gain
        assert self.likelihood is not None
        likelihood, y = self.likelihood, self.y
        dark = torch.full(
            (len(y), *self.data_shape), self.prior.shift, dtype=y.real.dtype, device=y.device
        )
        dark = dark - self.prior.scale
        source = torch.Generator().manual_seed(0)
        white = torch.randn(dark.shape[1:], generator=source, dtype=dark.dtype).to(dark)
        found: list[Tensor] = []
        with torch.no_grad():
            start = likelihood.residual(dark)
            for change in (torch.ones_like(dark), white.expand_as(dark)):
                there = likelihood.residual(dark + 2 * self.prior.scale * change)
                size = (likelihood.sizes / change[0].numel()).sqrt() * norm(change)
                found.append(norm(start - there) / (2 * self.prior.scale * size))
        # A nonlinear operator may know nothing of white signals.
        gain = torch.stack(found).nan_to_num(0.0, posinf=0.0).amax(0)
        self._gain = torch.where(gain > 0, gain, 1.0)
        return self._gain

    @property
    def has_residuals(self) -> bool:
        """Whether `whitened` has an answer: there is a measurement, and its noise law tells a standard deviation."""
        if self.likelihood is None:
            return False
        nothing = torch.zeros_like(self.y)
        return self.likelihood.noise.sigma(nothing, nothing) is not None

    @property
    def measurement_size(self) -> float:
        """How many real numbers of one measurement carry information; 1 without a likelihood."""
        return 1.0 if self.likelihood is None else self.likelihood.size

    @property
    def measurement_sizes(self) -> Tensor | float:
        """The same of each row, (B,): masks may differ."""
        return 1.0 if self.likelihood is None else self.likelihood.sizes

    def operators(self) -> list[Operator]:
        """Return every operator inside the target, parts of compositions and rewards too."""
        found = [] if self.likelihood is None else [self.likelihood.operator]
        found += [] if self.reward is None else self.reward.operators()
        return [m for o in found for m in o.modules() if isinstance(m, Operator)]

    def rewards(self, kind: type[R]) -> list[tuple[float, R]]:
        """Return (weight, reward) of the terms of the reward that are of this kind."""
        found = () if self.reward is None else terms(self.reward)
        return [(weight, part) for weight, part in found if isinstance(part, kind)]

    @property
    def linear(self) -> bool:
        """Whether the measurement is a linear function of x; through a decoder it is not."""
        operator = None if self.likelihood is None else self.likelihood.operator
        return self.prior.affine and isinstance(operator, LinearOperator)

    @property
    def gaussian(self) -> bool:
        """Whether the measurement's noise is Gaussian, of known covariance."""
        return self.likelihood is not None and isinstance(self.likelihood.noise, GaussianLaw)

    @property
    def own_data_step(self) -> bool:
        """Whether the operator is not linear and knows its own data step: `Operator.posterior_mean`."""
        operator = None if self.likelihood is None else self.likelihood.operator
        if operator is None or not self.prior.affine or self.linear:
            return False
        assert self.likelihood is not None
        if not isinstance(self.likelihood.noise, Gaussian) or self.likelihood.masked:
            return False
        if self._own_step is None:
            y, operator = self.y[:1], operator.rows(torch.tensor([0]))
            one = y.real.new_ones(())
            x = y.real.new_zeros(1, *self.data_shape)
            with torch.no_grad():
                self._own_step = operator.posterior_mean(x, y, one, one) is not None
        return self._own_step

    # ---- where y is the signal itself

    @property
    def orthonormal(self) -> bool:
        """Whether y is c times an orthonormal transform of x with one sigma_y per measurement.

        Then A* y / c^2 = x + sigma_y / c n, whatever the units of y are.
        """
        if not self.linear or self.sigma_y is None or self.reward is not None:
            return False
        if self.likelihood is None or self.likelihood.masked:
            return False
        if self._orthonormal is None:
            y, operator = self.y, self.likelihood.operator.rows(torch.tensor([0]))
            x = torch.empty(1, *self.data_shape, dtype=y.real.dtype, device=y.device)
            with torch.no_grad():
                assert isinstance(operator, LinearOperator)
                self._orthonormal = orthonormal_scale(operator.to(y.device), x, y[:1]) or 0.0
        return self._orthonormal > 0

    @property
    def denoises(self) -> bool:
        """Whether D(A* y; sigma_y) is the posterior mean of every row."""
        return self.orthonormal and bool((self.whole_signal_level() <= self.prior.sigma_max).all())

    def whole_signal(self) -> Tensor:
        """A* y / c^2 in normalised units, (B, *shape): the clean signal at noise level `whole_signal_noise`."""
        assert self.likelihood is not None
        assert isinstance(self.likelihood.operator, LinearOperator)
        assert self._orthonormal
        signal = self.likelihood.operator.adjoint(self.y) / self._orthonormal**2
        return self.prior.to_normalised(signal)

    def whole_signal_noise(self) -> Tensor:
        """Standard deviation of the noise in `whole_signal`, (B,), normalised units."""
        assert self._orthonormal
        return self.require_sigma_y("denoising in one call") / self._orthonormal

    def whole_signal_level(self) -> Tensor:
        """The same, but at least the least level that the prior knows."""
        return self.whole_signal_noise().clamp_min(self.prior.sigma_min)

    @property
    def counts(self) -> Counts | None:
        """How to even out the noise of y, where that counts a picture itself with one gain per measurement."""
        likelihood, prior = self.likelihood, self.prior
        if likelihood is None or likelihood.masked or self.reward is not None or not self.linear:
            return None
        law = likelihood.noise
        if not isinstance(law, CountingLaw) or not law.even:
            return None
        if not (prior.symmetric and prior.affine and prior.shift + prior.scale > 0):
            return None
        x = torch.empty(1, *self.data_shape, dtype=self.y.dtype, device=self.y.device)
        with torch.no_grad():
            c = multiple_of_identity(likelihood.operator.rows(torch.tensor([0])), x)
        if c is None:
            return None
        dark, bright = (
            law.stabilise(0 * law.gain + c * max(0.0, prior.shift + side * prior.scale))
            for side in (-1, 1)
        )
        half = (bright - dark) / 2
        return Counts(law, c, dark, half) if bool((1 / half <= prior.sigma_max).all()) else None

    @property
    def closed_form(self) -> bool:
        """Whether the prior tells its posterior under this measurement exactly."""
        return (
            self.linear
            and self.gaussian
            and self.reward is None
            and hasattr(self.prior, "posterior")
        )

    def closed_form_posterior(self, row: int) -> Prior:
        """The exact posterior of one row, a prior with `mean` and `sample(n, seed)`, normalised units."""
        assert self.likelihood is not None
        posterior = getattr(self.prior, "posterior")  # noqa: B009  of some priors only
        if self.sigma_y is None or self.likelihood.masked:
            white = WhitenedMap(self.likelihood.rows(torch.tensor([row])))
            return posterior(white, white.y, 1.0)
        sigma = float(self.sigma_y[row]) * self.prior.scale
        operator = self.likelihood.operator.rows(torch.tensor([row]))
        return posterior(operator, self.y[row, None], sigma)

    def whitened_linear(self) -> WhitenedLinear:
        """The measurement as whitened linear algebra; for linear operators and Gaussian noise."""
        assert self.likelihood is not None
        return WhitenedLinear(self.likelihood, self.prior)

    @property
    def differentiable(self) -> bool:
        parts = [p for p in (self.likelihood, self.reward) if p is not None]
        return all(p.differentiable for p in parts)


def _condition_rows(name: str, value: Any, rows: int | None) -> Tensor:
    """A condition in any plain form: 3, [3, 5], np.int64(3), an array, a tensor; one row per measurement, if any."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"condition {name!r} is {value!r}; expected numbers: a tensor, an array, a list or one number"
        ) from error
    tensor = tensor[None] if tensor.ndim == 0 else tensor
    if rows is None:
        return tensor
    if len(tensor) == 1 and rows > 1:
        tensor = tensor.expand(rows, *tensor.shape[1:])
    if len(tensor) != rows:
        raise ShapeError(
            f"condition {name!r} has {len(tensor)} rows; expected one per measurement ({rows}), or one for all"
        )
    return tensor


def _gradient(log_prob: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    if not log_prob.requires_grad:
        raise InputError(
            "the target does not depend on x through differentiable operations (its gradient is None); "
            "mark the operator or reward as differentiable=False and use a solver for black boxes"
        )
    return torch.autograd.grad(log_prob.sum(), inputs)


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...] | None) -> bool:
    return (
        shape is not None
        and len(shape) == len(wanted)
        and all(p in (None, n) for p, n in zip(wanted, shape, strict=True))
    )


def _how_to_fit(prior: Prior, likelihood: Likelihood) -> str:
    """Which arrangement of y would suit the prior, as arrays come from other programs."""
    shape = tuple(likelihood.y.shape)
    last_first = (*shape[:1], *shape[-1:], *shape[1:-1]), (*shape[-1:], *shape[:-1])
    for one, fix in (
        (shape, "y lacks its batch axis: pass y[None]"),
        (last_first[0][1:], "channels come first: pass np.moveaxis(y, -1, 1)"),
        (
            last_first[1],
            "channels come first, after the batch axis: pass np.moveaxis(y, -1, 0)[None]",
        ),
    ):
        try:
            told = likelihood.operator.input_shape(one)
            if told is not None and _fits(prior.sample_shape, tuple(told)):
                return fix
        except (InvguideError, ValueError, IndexError):  # no shape for this operator
            continue
    if len(shape) == len(prior.sample_shape) + 1 and shape[1] == 1 and prior.sample_shape[0] == 3:
        return GREY
    return "resize or tile y"


def _resolve_shape(
    prior: Prior, likelihood: Likelihood | None, shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    known = prior.normalised_shape(tuple(shape)) if shape is not None else None
    if known is None and all(n is not None for n in prior.shape):
        known = tuple(int(n) for n in prior.shape if n is not None)
    if known is None and likelihood is not None:
        known = likelihood.operator.input_shape(tuple(likelihood.y.shape[1:]))
        known = None if known is None else prior.normalised_shape(tuple(known))
    if known is None:
        raise ShapeError(
            f"the shape of x is unknown: the prior takes {prior.shape} and the operator cannot tell; "
            f"pass shape=(...), one sample without the batch axis"
        )
    if not _fits(prior.shape, known):
        fix = "resize or tile y" if likelihood is None else _how_to_fit(prior, likelihood)
        raise ShapeError(
            f"x would have shape {known}, but the prior was trained on {prior.shape}; {fix}"
        )
    small = [
        n for n, p in zip(known, prior.shape, strict=True) if p is None and n < prior.min_size
    ]
    if small:
        raise ShapeError(
            f"x would have shape {known}, but this prior needs at least {prior.min_size} along each free axis; "
            f"wrap it as ig.priors.Padded(prior, {prior.min_size}), or enlarge the picture first"
        )
    return known
