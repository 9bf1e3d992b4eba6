"""Prior and target together, as a solver sees them: in normalised units, counted, one row per sample."""

# Longer than 350 lines: one class, whose methods are what solvers ask a problem for.

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from invguide.arguments.checks import Checked
from invguide.arguments.entries import Entries, check_per_sample, check_signals
from invguide.arguments.rules import Count, CountOrNone, Shape
from invguide.errors import InputError, RunError
from invguide.forward_operator import (
    LinearOperator,
    Operator,
)
from invguide.likelihood import Likelihood
from invguide.noise import Gaussian, GaussianLaw
from invguide.noise.counts import Counts
from invguide.prior import Prior
from invguide.problem.data_size import SharedSize, measured_size, of_first
from invguide.problem.direct import Direct, counted_picture, direct_measurement, scale_of_transform
from invguide.problem.gain import gain_of, noise_in_signals
from invguide.problem.proximal import ACCURACY, proximal
from invguide.problem.seen import Seen
from invguide.problem.shapes import condition_rows, resolve_shape, starting_point
from invguide.problem.whitened_map import WhitenedLinear, WhitenedMap
from invguide.reward import Reward, terms
from invguide.schedule import Schedule, level_list
from invguide.system.surroundings import usable

# Standard deviation that a data step leaves to values of which y tells little, in units of sigma_data: what is clipped
# is known to be above a level, and the mean above it would be as far off as the noise level is high. 0.35 to 0.7 are
# within 0.4 dB on over-exposed photographs, 1 is 1.5 dB worse and 0.25 1 dB.
OPEN = 0.5

R = TypeVar("R", bound=Reward)


@dataclass
class Counters:
    """Calls so far, one per sample: a batch of eight counts eight."""

    network: int = 0
    vjp: int = 0
    forward: int = 0

    def restore(self, other: Counters) -> None:
        """Take over the numbers of another count; who holds this one sees them."""
        self.network, self.vjp, self.forward = other.network, other.vjp, other.forward


class TargetGradient(NamedTuple):
    """What one differentiated denoiser call tells."""

    denoised: Tensor  # D(x), (B, *shape)
    log_prob: Tensor  # log target at D, (B,)
    chi2: Tensor  # at D, (B,); NaN without a noise level
    slope: Tensor  # d log target / d D, (B, *shape)
    gradient: Tensor  # d log target / d x = J^T slope, (B, *shape)


class Problem(Entries, metaclass=Checked):
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

    entries = (
        "denoise", "evaluate", "whitened", "gradient", "guide", "prox", "levels", "all_levels", "begin", "rows",
        "repeat", "with_reward",
    )  # fmt: skip

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
            name: usable(condition_rows(name, value, None if likelihood is None else rows))
            for name, value in (condition or {}).items()
        }
        self.counters = Counters()
        self.batch_size: int | None = None  # rows in one network call; None: all of them
        self.size = SharedSize(self.condition)
        self._scale: float | None = (
            None  # of an orthonormal operator, 0 if it is none; None: not yet asked
        )
        self._own_step: bool | None = None
        self._gain: Tensor | None = None
        self._noise_level: tuple[Likelihood | None, Tensor | None] = None, None  # found for which
        exact = torch.promote_types(prior.dtype, torch.float32)
        self.like = torch.empty(0, dtype=exact, device=prior.device)  # of what type states are
        self.shape = resolve_shape(prior, likelihood, shape)
        self.num_measurements = rows
        self.origin = torch.arange(rows)  # the measurement of each row
        self.seen: Seen | None = None  # what the target answers, where somebody wants to know
        self.start, self.top = starting_point(self, init, init_noise)

    def check_given(self, method: str, given: dict[str, Any]) -> None:
        who = f"Problem.{method}"
        for name in ("x", "x0", "n"):
            if name in given:
                check_signals(who, name, given[name], self.shape)
                if "sigma" in given:
                    rows = len(given[name])
                    check_per_sample(
                        who, "sigma", given["sigma"], rows, positive=method != "denoise"
                    )
        if "level" in given:
            check_per_sample(who, "level", given["level"], len(given["n"]), positive=False)
        if "k" in given and not given["k"] < given["num_steps"]:
            raise InputError(
                f"{who}: k is {given['k']}; expected a step below num_steps = {given['num_steps']}"
            )

    def _with(self, **changes: Any) -> Problem:
        part = self.__new__(type(self))
        vars(part).update(self.__dict__, **changes)
        return part

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

    def repeat(self, count: Count, rows: Count) -> Problem:
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

    def levels(self, schedule: Schedule, num_steps: Count, k: CountOrNone) -> tuple[float, float]:
        """Return the noise levels (a, b) of step k of a schedule that spans the prior's range."""
        sigmas = self.all_levels(schedule, num_steps)
        return sigmas[k], sigmas[k + 1]

    def all_levels(self, schedule: Schedule, num_steps: Count) -> tuple[float, ...]:
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
    ) -> TargetGradient:
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
        return TargetGradient(denoised.detach(), log_prob.detach(), chi2, slope, gradient)

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
        that of the bright parts, for counts. Found once for a measurement.
        """
        found, level = self._noise_level
        if found is None or found is not self.likelihood:
            level = noise_in_signals(self)
            self._noise_level = self.likelihood, level
        return level

    def gain(self) -> Tensor:
        """By how much a change of a signal comes out larger in y, (B,); see `invguide.problem.gain`."""
        if self._gain is None or len(self._gain) != len(self.y):
            self._gain = gain_of(self)
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
    def direct(self) -> Direct | None:
        """The noisy signal that y is, up to an orthonormal transform; None where it is none."""
        if self._scale is None:
            self._scale = scale_of_transform(self)
        return direct_measurement(self, self._scale) if self._scale else None

    @property
    def denoises(self) -> bool:
        """Whether D at the noise level of y is the posterior mean of every row."""
        direct = self.direct
        return direct is not None and bool((direct.level <= self.prior.sigma_max).all())

    @property
    def counts(self) -> Counts | None:
        """How to even out the noise of y, where that counts a picture itself; None where it does not."""
        return counted_picture(self)

    @property
    def closed_form(self) -> bool:
        """Whether the prior tells its posterior under this measurement exactly; not under a condition."""
        return (
            self.linear
            and self.gaussian
            and self.reward is None
            and not self.condition
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


def _gradient(log_prob: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    if not log_prob.requires_grad:
        raise InputError(
            "the target does not depend on x through differentiable operations (its gradient is None); "
            "mark the operator or reward as differentiable=False and use a solver for black boxes"
        )
    return torch.autograd.grad(log_prob.sum(), inputs)
