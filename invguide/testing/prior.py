"""check_prior: what every prior promises to solvers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from invguide import driver
from invguide.arguments.checks import checked
from invguide.arguments.rules import Shape
from invguide.errors import InputError
from invguide.prior import Prior
from invguide.problem import Problem
from invguide.solvers import Unconditional
from invguide.testing.contract import difference, expect, keep, same_bits, sample_moments

DRAWS = 1000
SLACK = 0.02  # of a spread: 200 steps of the probability flow leave out 1.3 %, in closed form for a Gaussian


@checked
def check_prior(
    prior: Prior,
    shape: Shape | None = None,
    x0: Tensor | None = None,
    *,
    condition: Mapping[str, Tensor] | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> None:
    """Check what every prior promises; return nothing, or raise the first promise that is broken.

    "range": 0 < sigma_min < sigma_max, finite.
    "answers": `denoise` has the shape, type and device of x, is finite and the same each time, and leaves x.
    "rows independent": a row of a batch, each at its own level, is what it is alone, to rounding.
    "conditions": each row follows its own condition.
    "lowest level": at sigma_min it is the identity, to twice sigma_min root mean square.
    "highest level": at sigma_max it tends to the mean, to what a prior whose spread lies in one direction would keep.
    "gradient": vector-Jacobian products are those of central differences.
    "score and eps": `score` is (D - x) / sigma^2, `eps` is (x - D) / sigma.
    "units": `to_normalised` undoes `to_data`, which is scale * x + shift where `affine`; so do the shapes.
    "wrong shapes": x of another shape is refused.
    "sigma_data": where told, it is the root mean square of clean signals, to 5 % and five standard errors.
    "sample": draws of `sample`, where there is such, have mean and spread of draws by reverse steps with `denoise`.

    Args:
        prior: The prior.
        shape: Of one sample, normalised units. Default None; where the prior leaves sizes open.
        x0: Clean signals (N, *shape), normalised units. Default None: those of `sample`, or drawn by 40 reverse steps.
        condition: Two or more rows of each condition, that ought to make a difference. Default None; for priors that
            are told something.
        exceptions: {promise: why this prior cannot keep it}; such a promise has to be broken indeed. Default None.

    Raises:
        ContractError: A promise is broken; its name, what was expected and the numbers.
        InputError: Sizes are open and no shape is given, or an exception for no promise.
    """
    told = dict(condition or {})
    of = Promises(prior, shape, x0, told)
    promises = {
        "range": of.range,
        "answers": of.answers,
        "rows independent": of.rows_independent,
        "conditions": of.conditions,
        "lowest level": of.lowest_level,
        "highest level": of.highest_level,
        "gradient": of.gradient,
        "score and eps": of.score_and_eps,
        "units": of.units,
        "wrong shapes": of.wrong_shapes,
        "sigma_data": of.sigma_data,
        "sample": of.sample,
    }
    keep(type(prior).__name__, promises, dict(exceptions or {}))


class Promises:
    """Of one prior, on clean signals."""

    def __init__(
        self,
        prior: Prior,
        shape: tuple[int, ...] | None,
        x0: Tensor | None,
        condition: dict[str, Tensor],
    ) -> None:
        self.prior, self.condition = prior, condition
        self.like = torch.empty(0, dtype=prior.dtype, device=prior.device)
        self.eps = torch.finfo(prior.dtype).eps
        self.exact = prior.dtype == torch.float64
        known = tuple(prior.shape)
        self.shape = shape or tuple(n for n in known if n is not None)
        if x0 is None and len(self.shape) != len(known):
            raise InputError(f"the prior leaves sizes open, {known}; give shape=(...) or x0=...")
        self.given = x0
        self.shape = self.shape if x0 is None else tuple(x0.shape[1:])
        self.source = torch.Generator().manual_seed(0)

    @cached_property
    def x0(self) -> Tensor:
        return (self._draw() if self.given is None else self.given).detach().to(self.like)

    def _draw(self) -> Tensor:
        sample = getattr(self.prior, "sample", None)
        if callable(sample) and not self.condition:
            drawn = sample(256)
            assert isinstance(drawn, Tensor)
            return drawn
        return self._reverse(16, 40)

    def _reverse(self, count: int, steps: int) -> Tensor:
        """Clean signals by reverse steps, (count, *shape), normalised units."""
        one = {name: value[:1] for name, value in self.condition.items()}
        shape = self.prior.data_shape(self.shape)
        problem = Problem(self.prior, shape=shape, condition=one)
        run = driver.run(
            Unconditional(steps, eta=0.0),
            problem,
            count,
            batch_size=count,
            device=self.prior.device or "cpu",
            progress=False,
        )
        return self.prior.to_normalised(run.samples[0].to(self.like))

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.source, dtype=torch.float64).to(like)

    def told(self, rows: int) -> dict[str, Tensor]:
        """Conditions of so many rows, in turn."""
        index = torch.arange(rows)
        return {n: v[(index % len(v)).to(v.device)] for n, v in self.condition.items()}

    def denoise(self, x: Tensor, sigma: Any, **more: Tensor) -> Tensor:
        return self.prior.denoise(x, sigma, **(more or self.told(len(x)))).detach()

    @property
    def size(self) -> float:
        return max(float(self.x0.square().mean().sqrt()), 1e-6)

    def level(self) -> float:
        """One at which there is something to denoise."""
        return min(max(0.5 * self.size, self.prior.sigma_min), self.prior.sigma_max)

    def noisy(self, rows: int, sigma: float) -> Tensor:
        x0 = self.x0[torch.arange(rows) % len(self.x0)]
        return x0 + sigma * self.normal(x0)

    # ---- promises

    def range(self) -> None:
        low, high = self.prior.sigma_min, self.prior.sigma_max
        expect(
            0 < low < high < math.inf,
            f"sigma_min is {low!r} and sigma_max {high!r}; expected 0 < sigma_min < sigma_max, finite",
        )

    def sigma_data(self) -> None:
        told = self.prior.sigma_data
        if told is None or self.condition:
            return
        squares = self.x0.double().square().flatten(1).mean(1)
        error = 5 * float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else math.inf
        real = float(squares.mean())
        allowed = error + 0.1 * real
        expect(
            abs(told**2 - real) <= allowed,
            f"sigma_data is {told:.4g}, and {len(squares)} clean signals have a root mean square of {real**0.5:.4g}",
        )

    def answers(self) -> None:
        for sigma in (self.prior.sigma_min, self.level(), self.prior.sigma_max):
            x = self.noisy(3, sigma)
            kept = x.clone()
            found = self.denoise(x, sigma)
            expect(same_bits(x, kept), f"denoise changes x at sigma {sigma:g}")
            expect(
                found.shape == x.shape and found.dtype == x.dtype and found.device == x.device,
                f"denoise returns {found.dtype} {tuple(found.shape)} on {found.device} for x of {x.dtype} "
                f"{tuple(x.shape)} on {x.device}",
            )
            expect(bool(found.isfinite().all()), f"denoise is not finite at sigma {sigma:g}")
            expect(same_bits(found, self.denoise(x, sigma)), "denoise differs from call to call")

    def rows_independent(self) -> None:
        levels = torch.tensor([1.0, 0.5, 2.0, 1.0]).to(self.like) * self.level()
        levels = levels.clamp(self.prior.sigma_min, self.prior.sigma_max)
        x = torch.cat([self.noisy(1, float(s)) for s in levels])
        told = self.told(4)
        whole = self.denoise(x, levels)
        alone = torch.cat(
            [
                self.denoise(x[i : i + 1], levels[i], **{n: v[i : i + 1] for n, v in told.items()})
                for i in range(4)
            ]
        )
        # What sums in another order may add up to in a network of a hundred layers.
        allowed = 1e4 * self.eps * float(x.abs().max())
        off = difference(whole, alone)
        expect(
            off <= allowed,
            f"a batch, each row at its own level, is {off:.2e} off its rows alone; expected {allowed:.2e} at most",
        )

    def conditions(self) -> None:
        if not self.condition:
            return
        x = self.noisy(1, self.level()).expand(2, *self.shape)
        told = self.told(2)
        both = self.denoise(x, self.level(), **told)
        turned = self.denoise(x, self.level(), **{n: v.flip(0) for n, v in told.items()})
        allowed = 1e4 * self.eps * float(x.abs().max())
        expect(
            difference(both[0], both[1]) > allowed,
            f"two conditions give the same answer for the same x, to {allowed:.1e}; expected a difference",
        )
        off = difference(both, turned.flip(0))
        expect(
            off <= allowed,
            f"rows whose conditions change places are {off:.2e} off; expected {allowed:.2e} at most",
        )

    def lowest_level(self) -> None:
        sigma = self.prior.sigma_min
        x = self.noisy(min(len(self.x0), 8), sigma)
        off = float((self.denoise(x, sigma) - x).double().square().mean().sqrt())
        allowed = 2 * sigma + 100 * self.eps * self.size
        expect(
            off <= allowed,
            f"at sigma_min = {sigma:g} denoise moves x by {off:.3g} root mean square; expected {allowed:.3g} at most",
        )

    def highest_level(self) -> None:
        """Of a variance s^2 in each of d entries, all in one direction, D keeps d s^2 / (d s^2 + sigma^2) of it."""
        sigma = self.prior.sigma_max
        rows = min(len(self.x0), 16)
        told = {n: v[:1].expand(rows, *v.shape[1:]) for n, v in self.condition.items()}
        found = self.denoise(self.noisy(rows, sigma), sigma, **told).double()
        mean = self.x0.double().mean(0)
        variance = float(self.x0.double().var(0).mean()) if len(self.x0) > 1 else self.size**2
        total = variance * mean.numel()
        spread = float((found - found.mean(0)).square().mean().sqrt())
        # Four times: a draw of 16 may lie far out, and both spreads are estimates.
        allowed = 4 * (variance * total / (total + sigma**2)) ** 0.5
        allowed = min(allowed, 0.5 * variance**0.5) + 100 * self.eps * sigma
        expect(
            spread <= allowed,
            f"at sigma_max = {sigma:g} answers spread by {spread:.3g} root mean square; expected {allowed:.3g} at most",
        )
        off = float((found.mean(0) - mean).square().mean().sqrt())
        allowed += 5 * (variance / len(self.x0)) ** 0.5
        expect(
            off <= allowed,
            f"at sigma_max = {sigma:g} the mean answer is {off:.3g} off that of clean signals, root mean square; "
            f"expected {allowed:.3g} at most",
        )

    def gradient(self) -> None:
        sigma = self.level()
        x = self.noisy(2, sigma)
        told, w, u = self.told(2), self.normal(x), self.normal(x)
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            found = self.prior.denoise(at, sigma, **told)
            expect(found.grad_fn is not None, "the gradient does not reach x")
            (back,) = torch.autograd.grad(found, at, w)
        h, allowed = (1e-5 * sigma, 1e-6) if self.exact else (1e-2 * sigma, 2e-2)
        change = (self.denoise(x + h * u, sigma) - self.denoise(x - h * u, sigma)) / (2 * h)
        slope = (change * w).double().sum()
        scale = float(change.double().norm() * w.double().norm())
        error = abs(float((back * u).double().sum() - slope)) / max(scale, 1e-300)
        expect(
            error <= allowed,
            f"a vector-Jacobian product is {error:.1e} off central differences, relative; expected {allowed:g} at most",
        )

    def score_and_eps(self) -> None:
        sigma = self.level()
        x = self.noisy(2, sigma)
        told = self.told(2)
        clean = self.denoise(x, sigma)
        forms = {"score": (clean - x) / sigma**2, "eps": (x - clean) / sigma}
        for name, wanted in forms.items():
            found = getattr(self.prior, name)(x, sigma, **told).detach()
            allowed = 1e3 * self.eps * float(x.abs().max()) / sigma**2 * max(1.0, sigma)
            off = difference(found, wanted)
            expect(
                off <= allowed,
                f"{name} is {off:.2e} off what follows from denoise; expected {allowed:.2e} at most",
            )

    def units(self) -> None:
        prior, x = self.prior, self.x0[:4]
        data = prior.to_data(x).detach()
        shape = tuple(prior.data_shape(self.shape))
        expect(
            tuple(data.shape[1:]) == shape and tuple(prior.normalised_shape(shape)) == self.shape,
            f"to_data of {self.shape} has the shape {tuple(data.shape[1:])}; data_shape says {shape}, and "
            f"normalised_shape of that {tuple(prior.normalised_shape(shape))}",
        )
        if prior.affine:
            off = difference(data, prior.scale * x + prior.shift)
            allowed = 10 * self.eps * max(float(data.abs().max()), 1.0)
            expect(
                off <= allowed, f"to_data is {off:.2e} off scale * x + shift, and affine is True"
            )
        back = prior.to_normalised(data).detach()
        reach = max(float(data.abs().max()), abs(prior.shift), 1.0) / abs(prior.scale)
        off, allowed = difference(back, x), 10 * self.eps * max(reach, float(x.abs().max()))
        expect(
            off <= allowed,
            f"to_normalised of to_data is {off:.2e} off; expected {allowed:.2e} at most",
        )

    def wrong_shapes(self) -> None:
        x, sigma = self.noisy(2, self.level()), self.level()
        wrong = {"no batch axis": x[0], "another axis": x[:, None]}
        if self.prior.shape[-1] is not None:
            wrong["another width"] = x[..., 1:] if x.shape[-1] > 1 else torch.cat([x, x], -1)
        ours = type(self.prior).__module__.startswith("invguide.")
        for name, given in wrong.items():
            try:
                found = self.denoise(given, sigma)
            except Exception as error:
                refused = isinstance(error, InputError) or not ours
                told = f"{type(error).__name__}: {error}"
                expect(refused, f"x with {name} ends in {told}; expected an InputError")
                continue
            # A class of one's own is asked through a Problem, which refuses for it.
            expect(
                not ours and found.shape == given.shape,
                f"x with {name}, {tuple(given.shape)}, is denoised as {tuple(found.shape)}; expected an error",
            )

    def sample(self) -> None:
        draw = getattr(self.prior, "sample", None)
        if not callable(draw) or self.condition:
            return
        drawn, again, other = draw(DRAWS), draw(DRAWS), draw(DRAWS, seed=1)
        assert isinstance(drawn, Tensor)
        assert isinstance(again, Tensor)
        assert isinstance(other, Tensor)
        expect(same_bits(drawn, again), "sample differs from call to call with the same seed")
        expect(not same_bits(drawn, other), "sample is the same for another seed")
        sample_moments("draws of sample", drawn, self._reverse(DRAWS, 200), SLACK)
