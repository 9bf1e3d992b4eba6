"""check_operator: what every forward operator promises to likelihoods and solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from invguide.arguments.checks import checked
from invguide.arguments.rules import Shape
from invguide.diagnostics.check import FAILS, OperatorCheck
from invguide.diagnostics.numbers import signals
from invguide.diagnostics.operator import Examination
from invguide.errors import InputError
from invguide.forward_operator import LinearOperator, Operator
from invguide.numerics.linear import norm
from invguide.testing.contract import expect, same_bits

ROWS = 3
CERTIFIED = (
    "runs", "finite", "input unchanged", "deterministic", "rows independent", "linear", "differentiable", "adjoint",
    "svd", "solve",
)  # fmt: skip


@checked
def check_operator(
    operator: Operator,
    shape: Shape | None = None,
    x: Tensor | None = None,
    *,
    exceptions: Mapping[str, str] | None = None,
) -> None:
    """Check what every operator promises; return nothing, or raise the first promise that is broken.

    "runs", "finite", "input unchanged", "deterministic", "rows independent", "linear", "differentiable", "adjoint",
    "svd", "solve": no row of `operator.check()` fails, nor is left out for want of time.
    "inverse rows": adjoint, `pinv` and `solve` with a ridge for each row give every row what it gets alone, and leave
    what they are given.
    "types": x in single precision is measured in single, x in double in double, complex where y is complex, on the
    operator's device; the two agree to rounding, 1e-4.
    "input shape": `input_shape` of y is that of x, or None.
    "wrong shapes": x without its batch axis, with another axis or another width is refused, or measured as what it is.
    "row norms": `row_norms` are the norms of A* of each unit vector.
    "right inverse": A of `right_inverse(y)` is y.
    "posterior mean": z - E[z | y] is 0 on average, and uncorrelated with functions of y, to five standard errors of 500
    draws of z and y.

    Args:
        operator: The operator.
        shape: Of one clean signal, data units, without the batch axis. Default None; for random signals in [0, 1].
        x: Clean signals (B, *shape) to measure, data units. Default None; for operators that random ones do not suit.
        exceptions: {promise: why this operator cannot keep it}; such a promise has to be broken indeed. Default None.

    Raises:
        ContractError: A promise is broken; its name, what was expected and the numbers.
        InputError: Neither shape nor x, or both, or an exception for no promise.
    """
    from invguide.testing.contract import keep

    found, _ = signals(shape, x, count=ROWS, seed=0)
    of = Promises(operator, found.double())
    promises: dict[str, Callable[[], None]] = {
        name: lambda name=name: of.certified(name) for name in CERTIFIED[:2]
    }
    promises["input shape"] = of.input_shape  # the others rely on it
    promises |= {name: lambda name=name: of.certified(name) for name in CERTIFIED[2:]}
    promises |= {
        "inverse rows": of.inverse_rows,
        "types": of.types,
        "wrong shapes": of.wrong_shapes,
        "row norms": of.row_norms,
        "right inverse": of.right_inverse,
        "posterior mean": of.posterior_mean,
    }
    text = " ".join(operator.extra_repr().split())
    keep(f"{type(operator).__name__}({text})", promises, dict(exceptions or {}))


class Promises:
    """Of one operator, on clean signals x (B, *shape)."""

    def __init__(self, operator: Operator, x: Tensor) -> None:
        self.operator, self.tolerance = operator, 1e-10
        home = next((t.device for t in (*operator.parameters(), *operator.buffers())), x.device)
        self.x = x.to(home)

    @cached_property
    def certificate(self) -> OperatorCheck:
        examination = Examination(self.operator, self.x, torch.Generator().manual_seed(0))
        examination.seconds = float("inf")
        found = examination.run()
        self.tolerance = examination.tolerance  # 1e-4 for what computes in single precision
        return found

    @cached_property
    def y(self) -> Tensor:
        return self.operator(self.x.clone()).detach()

    def certified(self, name: str) -> None:
        rows = {row.name: row for row in self.certificate.rows}
        if name in rows:
            row = rows[name]
            left_out = row.value.startswith("not examined")
            expect(row.verdict != FAILS and not left_out, f"check() says: {row.value}")

    def inverse_rows(self) -> None:
        operator = self.operator
        if not isinstance(operator, LinearOperator):
            return
        ridge = torch.linspace(0.1, 1.0, len(self.y), dtype=torch.float64, device=self.x.device)
        maps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "adjoint": lambda y, _: operator.adjoint(y),
            "solve": operator.solve,
            "pinv": lambda y, _: operator.pinv(y),
        }
        for name, invert in maps.items():
            y = self.y.clone()
            whole = invert(y, ridge)
            expect(same_bits(y, self.y), f"{name} changes its input")
            alone = torch.cat([invert(y[i : i + 1], ridge[i : i + 1]) for i in range(len(y))])
            # Conjugate gradients stop at 1e-6 of each row; what is direct differs by rounding.
            allowed = self.tolerance if name == "adjoint" else 1e-4
            error = relative(whole, alone)
            expect(
                error <= allowed,
                f"{name} of a batch is {error:.1e} off that of each row alone, relative; expected {allowed:g} at most",
            )

    def types(self) -> None:
        answers = []
        for real, paired in (
            (torch.float32, torch.complex64),
            (torch.float64, torch.complex128),
        ):
            operator, x = self.operator, self.x.to(real)
            y = operator(x).detach()
            self._of_type("forward", y, paired if y.is_complex() else real)
            answers.append(y.to(torch.complex128 if y.is_complex() else torch.float64))
            if isinstance(operator, LinearOperator):
                self._of_type("adjoint", operator.adjoint(y), real)
                self._of_type("solve", operator.solve(y, 0.1), y.dtype)
                self._of_type("pinv", operator.pinv(y), real)
        error = relative(*answers)
        expect(
            error <= 1e-4,
            f"in single precision y is {error:.1e} off that in double, relative; expected 1e-4 at most",
        )

    def _of_type(self, name: str, t: Tensor, dtype: torch.dtype) -> None:
        expect(
            t.dtype == dtype and t.device == self.x.device,
            f"{name} returns {t.dtype} on {t.device}; expected {dtype} on {self.x.device}",
        )

    def input_shape(self) -> None:
        told, real = self.operator.input_shape(tuple(self.y.shape[1:])), tuple(self.x.shape[1:])
        expect(
            told is None or tuple(told) == real,
            f"input_shape({tuple(self.y.shape[1:])}) is {told}; expected {real}, or None",
        )

    def wrong_shapes(self) -> None:
        x = self.x
        wrong = {"no batch axis": x[0], "another axis": x[:, None], "another width": x[..., 1:]}
        refusal = (
            InputError if type(self.operator).__module__.startswith("invguide.") else Exception
        )
        for name, given in wrong.items():
            try:
                y = self.operator(given)
            except refusal:
                continue
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                expect(
                    False,
                    f"x with {name}, {tuple(given.shape)}, ends in {told}; expected an InputError",
                )
                continue
            told = self.operator.input_shape(tuple(y.shape[1:]))
            expect(
                len(y) == len(given) and (told is None or tuple(told) == tuple(given.shape[1:])),
                f"x with {name}, {tuple(given.shape)}, is measured as {tuple(y.shape)}, of which input_shape is {told};"
                " expected an error",
            )

    def row_norms(self) -> None:
        operator = self.operator
        told = operator.row_norms(self.y) if isinstance(operator, LinearOperator) else None
        if told is None or not isinstance(operator, LinearOperator):
            return
        one = self.y[0]
        expect(
            told.shape == one.shape,
            f"row_norms have the shape {tuple(told.shape)}; expected {tuple(one.shape)}",
        )
        unit = torch.eye(one.numel(), dtype=one.dtype, device=one.device)
        real = norm(operator.adjoint(unit.reshape(-1, *one.shape))).reshape(one.shape)
        error = float((told - real).abs().max() / real.max())
        allowed = max(1e-6, self.tolerance)
        expect(
            error <= allowed,
            f"row_norms are {error:.1e} off the largest; expected {allowed:g} at most",
        )

    def right_inverse(self) -> None:
        operator = self.operator
        x = operator.right_inverse(self.y) if isinstance(operator, LinearOperator) else None
        if x is not None:
            error = relative(operator(x), self.y)
            allowed = max(1e-6, self.tolerance)
            expect(
                error <= allowed,
                f"A of it is {error:.1e} off y, relative; expected {allowed:g} at most",
            )

    def posterior_mean(self) -> None:
        operator, draws = self.operator, 500
        deviation, sigma = 0.2, 0.1
        source = torch.Generator().manual_seed(0)
        x = self.x[:1].expand(draws, *self.x.shape[1:]).clone()

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=source, dtype=like.dtype).to(like.device)

        z = x + deviation * normal(x)
        y = operator(z).detach()
        y = y + sigma * normal(y)
        square = torch.full_like(x[:1], deviation**2)
        mean = operator.posterior_mean(x, y, square, torch.full_like(y.real[:1], sigma))
        if mean is None:
            return
        expect(mean.shape == x.shape, f"it has the shape {tuple(mean.shape)}, not that of x")
        at = x.clone().requires_grad_()
        (pull,) = torch.autograd.grad(operator(at), at, y - operator(x).detach())
        factors = {"1": torch.ones_like(x), "E[z | y] - x": mean - x, "A'* (y - A x)": pull}
        for name, factor in factors.items():
            sums = ((z - mean) * factor).flatten(1).sum(1)
            score = float(sums.mean() / (sums.std() / draws**0.5).clamp_min(1e-300))
            expect(
                abs(score) <= 5,
                f"(z - E[z | y]) times {name} is {score:.1f} standard errors off 0; expected 5 at most",
            )


def relative(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| / |b| of all rows; infinite where shapes differ or values are not finite."""
    if a.shape != b.shape:
        return float("inf")
    size = norm(b).clamp_min(torch.finfo(torch.float64).tiny)
    return float((norm(a - b) / size).nan_to_num(float("inf")).max())
