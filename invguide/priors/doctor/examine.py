"""The prior doctor: under which convention does this network denoise? Known clean signals, made noisy, tell.

The posterior mean is the one function with the least mean squared error at every noise level. So all
conventions denoise the same noisy signals, at the same levels in data units, and the right one has the least
error; nothing weaker, such as a white residual, is needed where the clean signal is known. The error is given
relative to that of the best linear filter, which only a trained network beats.

What cannot be told apart is said so: a network that ignores its time, for example, has no schedule.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from invguide.errors import InputError, ShapeError
from invguide.priors.doctor.convention import (
    Convention,
    declared,
    number_of_classes,
    possible,
    tried_on,
)
from invguide.priors.known_images import known_images
from invguide.priors.network import NetworkPrior
from invguide.system.tables import Table

# Noise levels as multiples of the contrast of the signals. Below, all conventions agree that D = x; above, all
# that is left of a signal is its mean.
WEAKEST, STRONGEST, LEVELS = 0.1, 20.0, 6
MOST_NOISE = 14.6 / 4  # data units: the end of Stable Diffusion's schedule, the widest data range
ORDER = (1, 3, 5, 0, 2, 4)  # in which levels are tried: those that tell most come first
HOPELESS = 2.0  # times the least error: such a convention is tried no further
FEWEST = 8  # that go on to the next level beside the better half: the right one is among the best at every level
EQUAL, WORSE = 1.005, 1.03  # ratios of errors: the same, and surely worse
# A data range is told by the contrast of the signals: of photographs with half the contrast of those that a
# network knows, a wrong range has an error up to 0.9 times that of the right one.
DOUBTFUL = 1.25
UNTRAINED = 1.15  # times the error of the best linear filter
# Seconds of this thread's processor a picture: where a call takes more, loading does not wait for the hundreds of a
# whole race. Not by the clock on the wall: what is refused must not depend on what else the machine does.
QUICK = 0.05
Scope = Literal["output", "nearby", "all"]
# How many arguments may differ, beside the meaning of the output.
REACH = {"output": 0, "nearby": 1, "all": 9}


@dataclass(frozen=True)
class Report:
    """What the doctor found; prints as a table and a verdict.

    Attributes:
        declared: The convention that the prior has.
        best: The one with the least error; the declared one where that does as well.
        equivalent: Others that do as well as the best.
        sigmas: Noise levels, data units.
        errors: Mean squared error at each level relative to the best linear filter; shorter for conventions
            that were given up.
    """

    declared: Convention
    best: Convention
    equivalent: tuple[Convention, ...]
    sigmas: tuple[float, ...]
    errors: dict[Convention, dict[int, float]]

    def overall(self, convention: Convention) -> float:
        """Geometric mean over the levels at which a convention was tried."""
        return _mean(self.errors[convention].values())

    @property
    def trained(self) -> bool:
        """Whether the network denoises these signals at all, under some convention."""
        return self.overall(self.best) < UNTRAINED

    @property
    def wrong(self) -> bool:
        """Whether another convention than the declared one is right."""
        return self.trained and self.overall(self.declared) > WORSE * self.overall(self.best)

    @property
    def doubtful(self) -> bool:
        """Whether nothing but the data range is wrong, and less so than signals of unusual contrast can feign."""
        only = replace(self.best, data_range=self.declared.data_range) == self.declared
        return only and self.overall(self.declared) < DOUBTFUL * self.overall(self.best)

    @property
    def fits(self) -> bool:
        """Whether the network denoises these signals, under no convention better than under the declared one."""
        return self.trained and not self.wrong

    @property
    def verdict(self) -> str:
        best = self.overall(self.best)
        first = "; ".join(map(str, self.equivalent[:3]))
        more = f"; and {len(self.equivalent) - 3} more" if len(self.equivalent) > 3 else ""
        same = f". These signals cannot tell it from {first}{more}" if first else ""
        if not self.trained:
            return (
                f"unknown: the network denoises these signals under no convention. The best, {self.best}, has "
                f"{best:.3g} times the error of a linear filter. Either the weights are untrained or damaged, or they "
                "know other signals: pass clean ones of their own kind as images="
            )
        if self.wrong:
            unless = ", unless these signals have another contrast than those of the training"
            return (
                f"wrong: {self.declared} has {self.overall(self.declared) / best:.3g} times the error of "
                f"{self.best}. Pass {self.declared.changes(self.best)}{unless if self.doubtful else ''}{same}"
            )
        return f"right: {self.declared}{same}"

    def table(self, rows: int = 12) -> Table:
        """The declared convention and the best of the others."""
        order = sorted(self.errors, key=lambda c: (-len(self.errors[c]), self.overall(c)))
        shown = [self.declared, *(c for c in order if c != self.declared)][:rows]
        body = []
        for convention in shown:
            errors = self.errors[convention]
            cells = [f"{errors[k]:.3g}" if k in errors else "" for k in range(LEVELS)]
            overall = f"{self.overall(convention):.3g}" if len(errors) == LEVELS else ""
            mark = " (declared)" if convention == self.declared else ""
            body.append((f"{convention}{mark}", *cells, overall))
        head = ("convention", *(f"sigma {s:.2g}" for s in self.sigmas), "overall")
        note = (
            "Squared error relative to the best linear filter; sigma in data units. "
            f"{len(self.errors)} conventions were tried, and given up at {HOPELESS:g} times the least error."
        )
        return Table(head, tuple(body), (note,), {str(c): e for c, e in self.errors.items()})

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.verdict}"


def examine(
    prior: NetworkPrior,
    images: Tensor | None = None,
    *,
    scope: Scope = "all",
    seed: int = 0,
    condition: Mapping[str, Tensor] | None = None,
) -> Report:
    """Denoise known signals under every convention that could apply.

    Args:
        prior: As it was loaded, right or wrong.
        images: Clean signals of the kind that the network was trained on, (N, *shape), data units; by default
            parts of a photograph.
        scope: "all" conventions, those "nearby", with one argument changed, or only other meanings of the
            "output", for which the network is called no more often.
        seed: Of the noise.
        condition: Of a conditional network, one row for all signals or one for each; label 0 where none is given.

    Raises:
        InputError: The network takes no pictures, and images is left out.
        ShapeError: Signals of another shape.
    """
    own = declared(prior)
    trial = _Trial(prior, own, images, seed, condition or {})
    finished = trial.race(c for c in possible(prior, own) if own.distance(c) <= REACH[scope])
    overall = {c: _mean(trial.errors[c].values()) for c in finished}
    least = min(overall.values())
    best = own if overall[own] <= EQUAL * least else min(finished, key=overall.__getitem__)
    equal = (c for c in finished if c != best and overall[c] <= EQUAL * least)
    equivalent = tuple(sorted(equal, key=overall.__getitem__))
    return Report(own, best, equivalent, tuple(trial.sigmas), trial.errors)


def check_loaded(prior: NetworkPrior, images: Tensor | None = None) -> None:
    """Refuse a prior of the wrong convention and name the right one; warn of a network that does not denoise.

    A network that is too slow to be called often is asked only whether its output means something else. The
    photograph alone is no reason to refuse a data range that fits it a little worse than another.

    Raises:
        InputError: Another convention is right.
    """
    default = images is None
    try:
        images = _default(prior) if images is None else images
    except InputError:
        return  # no pictures: nothing is known of its signals
    scopes: tuple[Scope, ...] = ("nearby", "all") if _quick(prior, images) else ("output",)
    for scope in scopes:
        try:
            report = examine(prior, images if len(scopes) > 1 else images[:1], scope=scope)
        except (TypeError, IndexError, ValueError, RuntimeError) as error:
            warnings.warn(
                f"the network could not be checked ({str(error).splitlines()[0]}); call prior.check(images, ...) with "
                "what it needs",
                stacklevel=4,
            )
            return
        if report.fits:
            return
    if report.wrong and not (default and report.doubtful):
        raise InputError(
            f"this network was trained otherwise: {report.verdict}. If that cannot be, pass check=False"
        )
    hint = "" if len(scopes) > 1 else "; more is told by prior.check() or `invguide doctor`"
    warnings.warn(report.verdict + hint, stacklevel=4)


@torch.no_grad()
def _quick(prior: NetworkPrior, images: Tensor) -> bool:
    """Time one call, after one that does not count; what fails here is told of by the trial."""
    x = prior.to_normalised(images[:1])
    for _ in range(2):
        start = time.thread_time()
        with contextlib.suppress(TypeError, IndexError, ValueError, RuntimeError):
            prior.denoise(x.to(prior.device), (prior.sigma_min * prior.sigma_max) ** 0.5).cpu()
    return time.thread_time() - start < QUICK


class _Trial:
    """The signals, their noise, and the error of each convention at each level."""

    def __init__(
        self,
        prior: NetworkPrior,
        own: Convention,
        images: Tensor | None,
        seed: int,
        condition: Mapping[str, Tensor],
    ) -> None:
        device = prior.device
        images = _default(prior) if images is None else _checked(images, prior)
        self.prior, self.own = prior, own
        classes = number_of_classes(prior)
        labels = {"label": torch.zeros(len(images), dtype=torch.long)} if classes else {}
        told = {k: v.to(device) for k, v in {**labels, **condition}.items()}
        count = len(images)
        self.condition = {
            k: v.expand(count, *v.shape[1:]) if len(v) == 1 else v for k, v in told.items()
        }
        self.images = images.to(device)
        contrast = float(images.std())
        if not contrast > 0:
            raise InputError("the images are all of one value: pass some with structure")
        most = min(STRONGEST * contrast, MOST_NOISE, prior.sigma_max * prior.scale)
        least = min(WEAKEST * contrast, most / 10)
        self.sigmas = torch.logspace(math.log10(least), math.log10(most), LEVELS).tolist()
        self.linear = [linear_error(images, sigma) for sigma in self.sigmas]
        source = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(images.shape, generator=source, dtype=images.dtype).to(device)
        self.errors: dict[Convention, dict[int, float]] = {}

    def race(self, conventions: Iterable[Convention]) -> list[Convention]:
        """Try them level by level; return those that are not hopeless, and the declared one in any case."""
        running = list(dict.fromkeys([self.own, *conventions]))
        for level in ORDER:
            self._measure(running, level)
            overall = {c: _mean(self.errors[c].values()) for c in running}
            ranked = sorted(overall.values())
            limit = min(
                HOPELESS * ranked[0], ranked[min(len(ranked) - 1, max(len(ranked) // 2, FEWEST))]
            )
            running = [c for c in running if overall[c] <= limit or c == self.own]
        return running

    @torch.no_grad()
    def _measure(self, conventions: list[Convention], level: int) -> None:
        """Conventions that differ only in what the output means share one call of the network."""
        calls: dict[Convention, list[Convention]] = {}
        for c in conventions:
            calls.setdefault(replace(c, predicts=""), []).append(c)
        for members in calls.values():
            with tried_on(self.prior, self.own, members[0]) as variant:
                x = variant.to_normalised(self.images + self.sigmas[level] * self.noise)
                sigma = torch.full((len(x),), self.sigmas[level] / variant.scale).to(x)
                try:
                    output = variant.output(x, sigma, **self.condition)
                except (IndexError, ValueError, RuntimeError):
                    if self.own in members:
                        raise
                    output = torch.full_like(x, math.inf)  # a time that the network refuses
                for c in members:
                    variant.predicts = c.predicts
                    difference = variant.to_data(variant.convert(x, sigma, output)) - self.images
                    error = float(difference.square().mean()) / self.linear[level]
                    errors = self.errors.setdefault(c, {})
                    errors[level] = error if math.isfinite(error) else math.inf


def linear_error(images: Tensor, sigma: float) -> float:
    """Mean squared error of Wiener's filter for the radial spectrum of the images; of shrinkage for plain vectors."""
    axes = tuple(range(2, images.ndim))
    if not axes:
        power = images.var()[None]
        return float(power * sigma**2 / (power + sigma**2))
    centred = images - images.mean((0, *axes), keepdim=True)
    power = (torch.fft.fftn(centred, dim=axes, norm="ortho").abs() ** 2).mean((0, 1))
    waves = [torch.fft.fftfreq(n) * max(power.shape) for n in power.shape]
    radius = torch.stack([w**2 for w in torch.meshgrid(*waves, indexing="ij")]).sum(0).sqrt()
    ring = radius.round().long().flatten()
    count = torch.bincount(ring)
    power = torch.bincount(ring, power.flatten().cpu()) / count.clamp_min(1)
    return float((count * power * sigma**2 / (power + sigma**2)).sum() / count.sum())


def _default(prior: NetworkPrior) -> Tensor:
    return known_images(prior.shape, min_size=prior.min_size)


def _checked(images: Tensor, prior: NetworkPrior) -> Tensor:
    wanted = ", ".join("any" if n is None else str(n) for n in prior.shape)
    fits = images.ndim == 1 + len(prior.shape) and all(
        want in (None, got) for want, got in zip(prior.shape, images.shape[1:], strict=True)
    )
    if not fits:
        raise ShapeError(f"images must be (N, {wanted}), in data units; got {tuple(images.shape)}")
    return images


def _mean(errors: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(max(error, 1e-30)) for error in errors]
    return math.exp(sum(logs) / len(logs))
