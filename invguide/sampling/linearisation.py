"""Statistical linearisation of a black box: slopes from pairs of calls, with no gradient and no d x d matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from invguide.problem.problem import Problem

RIDGES = tuple(100.0**-i for i in range(8))  # relative to the largest singular value squared
PENALTIES = (1.0, 10.0, 100.0)  # of a local correction, in pairs
NEGLIGIBLE = 0.01  # error variance, in variances of the noise
MAX_PAIRS = 2000  # in local corrections, which cost particles times pairs


class Slopes(NamedTuple):
    """The matrix left^T axes (m, d), in at most as many terms as there are particles."""

    left: Tensor  # (terms, m)
    axes: Tensor  # (terms, d)

    def apply(self, v: Tensor) -> Tensor:
        """(J, d) -> (J, m)."""
        return v @ self.axes.mT @ self.left

    def adjoint(self, u: Tensor) -> Tensor:
        """(J, m) -> (J, d)."""
        return u @ self.left.mT @ self.axes

    def plus(self, other: Slopes) -> Slopes:
        """The sum, cut to the largest terms and filled up with zeros to as many as self has."""
        left, axes = (torch.cat(parts) for parts in zip(self, other, strict=True))
        Q, R = torch.linalg.qr(axes.mT)
        U, s, V = torch.linalg.svd(R @ left, full_matrices=False)
        terms = len(self.left)
        left, axes = (s[:, None] * V)[:terms], (Q @ U).mT[:terms]
        empty = (0, 0, 0, terms - len(left))
        return Slopes(pad(left, empty), pad(axes, empty))


class Local(NamedTuple):
    """What the common matrix leaves unexplained, regressed again around every particle on P pairs."""

    weights: Tensor  # (J, P), of pair i at particle j; 0 for its own pair, so that every error is out of sample
    axes: Tensor  # (q, d), divided by the rms of the shifts
    features: Tensor  # (P, q + 1), shifts along the axes, and 1
    rest: Tensor  # (P, m)
    inverse: Tensor  # (J, q + 1, q + 1)

    def at(self, features: Tensor) -> Tensor:
        """(J, q + 1) -> (J, m)."""
        coefficients = (self.inverse @ features[..., None])[..., 0]
        return (self.weights * (coefficients @ self.features.mT)) @ self.rest

    def apply(self, v: Tensor) -> Tensor:
        """(J, d) -> (J, m)."""
        return self.at(pad(v @ self.axes.mT, (0, 1)))

    def adjoint(self, u: Tensor) -> Tensor:
        """(J, m) -> (J, d)."""
        moments = (self.weights * (u @ self.rest.mT)) @ self.features
        return (self.inverse @ moments[..., None])[:, :-1, 0] @ self.axes


class Linearisation(NamedTuple):
    """f(x0) ~ value_j + H_j (x0 - D_j) around every particle, with H_j = gain_j (slopes + local_j)."""

    slopes: Slopes  # common to all particles
    value: Tensor  # (J, m), the mean of f(x0) given x
    error: Tensor  # (J, m), variance of what is left, every pair judged by a fit without it; before gain
    gain: Tensor  # (J, m)
    local: Local | None = None

    def apply(self, v: Tensor) -> Tensor:
        """H_j v_j, (J, d) -> (J, m)."""
        image = self.slopes.apply(v)
        return self.gain * (image if self.local is None else image + self.local.apply(v))

    def adjoint(self, u: Tensor) -> Tensor:
        """H_j^T u_j, (J, m) -> (J, d)."""
        u = self.gain * u
        image = self.slopes.adjoint(u)
        return image if self.local is None else image + self.local.adjoint(u)

    def whitened(self) -> Linearisation:
        """The same in units of noise and error together, for residuals whose noise has variance 1."""
        scale = (1 + self.gain.square() * self.error).rsqrt()
        return self._replace(value=scale * self.value, gain=scale * self.gain)

    def as_residual(self, best: Tensor, spread: Tensor) -> Linearisation:
        """The last output, a log density, as a residual r = sqrt(2 (top - log density)): exp(-r^2 / 2) is the density.

        With top = best + spread, r and its slope are bounded: a density that looks linear is not followed for ever.
        """
        floor = torch.finfo(best.dtype).eps ** 0.5 * (1 + best.abs())
        spread = torch.maximum(spread, floor)
        r = (2 * torch.maximum(best + spread - self.value[:, -1], spread)).sqrt()[:, None]
        return self._replace(
            value=torch.cat([self.value[:, :-1], r], 1),
            gain=torch.cat([self.gain[:, :-1], -1 / r], 1),
        )


def no_slopes(problem: Problem, like: Tensor) -> Slopes:
    """What is known of a problem's black box before any call, as many terms as `like` (J, *shape) has rows."""
    m = round(problem.measurement_size) if problem.has_residuals else 0
    m += not problem.has_residuals or problem.reward is not None
    return Slopes(like.new_zeros(len(like), m), torch.zeros_like(like).flatten(1))


def linearise_target(
    problem: Problem, points: Tensor, shifts: Tensor, known: Slopes
) -> tuple[Linearisation, Tensor]:
    """Call the black box at D (J, d) and at D + shifts; return its linearised residuals, and who failed at D, (J,).

    What has no residuals, a reward or a density of one's own, becomes one more residual.
    """
    shape = (len(points), *problem.shape)
    here = _outputs(problem, points.reshape(shape))
    there = _outputs(problem, (points + shifts).reshape(shape))
    fit = linearise(points, shifts, here, there, known)
    if not problem.has_residuals or problem.reward is not None:
        seen = torch.cat([here[:, -1], there[:, -1]])
        seen = seen[seen.isfinite()]
        if len(seen) > 1:
            fit = fit.as_residual(seen.max(), seen.std())
    return fit, here.isnan().any(1)


def _outputs(problem: Problem, x0: Tensor) -> Tensor:
    """Whitened residuals, and last what is to be increased, (J, m); NaN where a call failed or was impossible."""
    if not problem.has_residuals:
        rows = problem.evaluate(x0)[0][:, None]
    else:
        rows = problem.whitened(x0)
        if problem.reward is not None:
            score = problem.reward(problem.prior.to_data(x0))
            rows = torch.cat([rows, score[:, None]], 1)
    return torch.where(rows.isfinite(), rows, torch.nan)


def linearise(
    points: Tensor, shifts: Tensor, here: Tensor, there: Tensor, known: Slopes
) -> Linearisation:
    """Learn f around points D (J, d) from its values (J, m) here = f(D) and there = f(D + shifts); NaN is unknown.

    One ridge regression of there - here on shifts, shrunk to 0 or to the slopes known from before; which of them, and
    the ridge, are those whose leave-one-out errors are least: exact for a linear map and J > d, and after some rounds
    with fewer pairs than dimensions. Where errors still count (f being whitened) and pairs suffice, the rest is
    regressed again around each particle, with Gaussian weights as wide as the shifts are long and shrunk to the common
    matrix; or not at all, if that predicts no better. Where f varies so fast that f(D) says little about f nearby, the
    mean of f(x0) is drawn from f(D) to that of the neighbours.

    A point whose own value is unknown takes that of its shifted call, brought back by the fit, or where both are
    unknown that of its neighbours.
    """
    alive = here.isfinite().all(1, keepdim=True)
    pairs = (alive & there.isfinite().all(1, keepdim=True))[:, 0].nonzero().flatten()
    one = torch.ones_like(here)
    # No two that differ: there are too few, or at this level D does not depend on x at all.
    if not bool((shifts[pairs] != shifts[pairs[:1]]).any()):
        return Linearisation(known, torch.zeros_like(here), one, one)
    slopes, axes, bias, errors, rest = _ridge(shifts[pairs], (there - here)[pairs], known)
    fit = Linearisation(slopes, bias.expand(here.shape), one, one)
    weights = None
    if len(pairs) >= 8 * (len(axes) + 1) and bool((errors.square().mean(0) > NEGLIGIBLE).any()):
        pairs, errors, rest = (t[:MAX_PAIRS] for t in (pairs, errors, rest))
        axes = axes / shifts[pairs].square().mean().sqrt()
        weights = _neighbours(points, pairs, shifts)
        fit, errors = _localise(fit, weights, axes, shifts[pairs], pairs, rest, errors)

    def around(values: Tensor) -> Tensor:
        """Means over the neighbours and one more member of average value, for those who have none."""
        mean = values.mean(0).expand(here.shape)
        if weights is None:
            return mean
        return (weights @ values + mean) / (weights.sum(1, keepdim=True) + 1)

    slope = slopes.apply(points)
    typical = slope + around((here - slope)[pairs])
    back = there - fit.apply(shifts) - fit.value
    at_point = torch.where(alive, here, torch.where(back.isfinite(), back, typical))
    excess = at_point - typical
    square = excess[pairs].square().sum(0).clamp_min(1e-30)
    returned = (-(errors * excess[pairs]).sum(0) / square).clamp(0.0, 1.0)
    error = around((errors + returned * excess[pairs]).square())
    return fit._replace(value=at_point + fit.value - returned * excess, error=error)


def _ridge(
    shifts: Tensor, changes: Tensor, known: Slopes
) -> tuple[Slopes, Tensor, Tensor, Tensor, Tensor]:
    """Slopes, axes of the shifts, bias (m,), leave-one-out errors (n, m) and residuals (n, m) of an affine fit."""
    n = len(shifts)
    centre = shifts.mean(0)
    P, s, axes = torch.linalg.svd(shifts - centre, full_matrices=False)
    kept = s > 10 * torch.finfo(s.dtype).eps * s[0]
    P, s, axes = P[:, kept], s[kept], axes[kept]
    nothing = Slopes(torch.zeros_like(known.left), torch.zeros_like(known.axes))
    least, best = float("inf"), None
    for start in (nothing, known):
        target = changes - start.apply(shifts)
        target = target - target.mean(0)
        inside = P.mT @ target
        # What no slope can explain, of changes and of leverages: nothing, where unknowns are as many as pairs.
        full = len(s) >= n - 1
        outside = torch.zeros_like(target) if full else target - P @ inside
        free = 0.0 if full else (1 - 1 / n - P.square().sum(1)).clamp_min(0.0)
        for ridge in RIDGES:
            lost = ridge * s[0] ** 2 / (s**2 + ridge * s[0] ** 2)
            rest = outside + P @ (lost[:, None] * inside)
            errors = rest / (free + P.square() @ lost).clamp_min(1e-30)[:, None]
            if best is None or float(errors.square().sum()) < least:
                least = float(errors.square().sum())
                best = start, Slopes(((1 - lost) / s)[:, None] * inside, axes), errors, rest
    assert best is not None
    start, more, errors, rest = best
    slopes = start.plus(more)
    return slopes, axes, (changes - slopes.apply(shifts)).mean(0), errors, rest


def _neighbours(points: Tensor, pairs: Tensor, shifts: Tensor) -> Tensor:
    own = torch.arange(len(points), device=points.device)[:, None] == pairs
    width = shifts[pairs].square().sum(1).mean().sqrt()
    near = torch.exp(-0.5 * (torch.cdist(points, points[pairs]) / width) ** 2)
    return near.masked_fill(own, 0.0)


def _localise(
    common: Linearisation,
    weights: Tensor,
    axes: Tensor,
    shifts: Tensor,
    pairs: Tensor,
    rest: Tensor,
    errors: Tensor,
) -> tuple[Linearisation, Tensor]:
    """The fit with the best correction around every particle, and its out-of-sample errors at the pairs."""
    features = pad(shifts @ axes.mT, (0, 1), value=1.0)
    q = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).flatten(1)
    gram = (weights @ products).reshape(-1, q, q)
    identity = torch.eye(q, dtype=gram.dtype, device=gram.device)
    best = common
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(gram + penalty * identity)
        local = Local(weights, axes, features, rest, inverse)
        at_pairs = local._replace(weights=weights[pairs], inverse=inverse[pairs])
        trial = rest - at_pairs.at(features)
        if trial.square().sum() < errors.square().sum():
            errors = trial
            intercept = local.at(identity[-1].expand(len(weights), q))
            best = common._replace(value=common.value + intercept, local=local)
    return best, errors
