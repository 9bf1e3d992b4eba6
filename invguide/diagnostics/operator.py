"""The operator certificate: what a forward operator says of itself, checked on numbers.

Everything that a solver relies on and that user code gets wrong: a batch whose rows share something, an adjoint that is
not one, a gradient that stops on the way, random or non-finite outputs, a changed input.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from invguide.diagnostics import numbers
from invguide.diagnostics.check import FAILS, NOTE, OK, OperatorCheck, Property
from invguide.forward_operator import LinearOperator, Operator
from invguide.numerics.linear import InnerSolves, counted_solves, inner, norm
from invguide.renamed import old_names


def certify(
    operator: Operator,
    shape: tuple[int, ...] | None = None,
    x: Tensor | None = None,
    seed: int = 0,
) -> OperatorCheck:
    """Examine an operator on clean signals x (B, *shape), data units, or on two of uniform random numbers in [0, 1].

    Takes at most 10 s, or says what it left out for that. Runs in double precision where the operator allows it.

    Raises:
        InputError: Neither shape nor x is given, or both.
    """
    x, generator = numbers.signals(shape, x, count=2, seed=seed)
    home = next((t.device for t in (*operator.parameters(), *operator.buffers())), x.device)
    return Examination(operator, x.to(home), generator).run()


# Of one row, besides the rows that follow from the ones before: calls of the operator, about.
CALLS = {
    "rows independent": 6,
    "linear": 3,
    "differentiable": 7,
    "adjoint": 5,
    "svd": 8,
    "solve": 20,
}
CALLS |= {"pinv": 20, "input unchanged": 2}
# What makes no sense where another row fails.
_STEADY = ("deterministic", "input unchanged")
NEEDS: dict[str, tuple[str, ...]] = {
    "rows independent": (),
    "linear": _STEADY,
    "differentiable": _STEADY,
    "adjoint": (*_STEADY, "linear"),
    "svd": (*_STEADY, "linear", "adjoint"),
    "solve": (*_STEADY, "linear", "adjoint"),
    "pinv": (*_STEADY, "linear", "adjoint", "solve"),
}


class _OutOfTimeError(Exception):
    """The time that a certificate may take is over."""


class _Deadline(InnerSolves):
    """Ends conjugate gradients at a time of `time.perf_counter`."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def iterate(self) -> None:
        super().iterate()
        if time.perf_counter() > self.at:
            raise _OutOfTimeError


class Examination:
    """The questions to one operator, and the rows that answer them.

    Rows that depend on one that fails are not examined, nor those for which `seconds` are too few: both are said.
    """

    seconds = 10.0

    def __init__(self, operator: Operator, x: Tensor, generator: torch.Generator) -> None:
        self.operator, self.x, self.generator = operator, x, generator
        self.certificate = OperatorCheck(f"{type(operator).__name__}({operator.extra_repr()})")
        self.tolerance = 1e-10
        self.begin = time.perf_counter()
        self.one_call = 0.0  # seconds

    def add(self, name: str, good: bool | None, value: str) -> bool:
        """Record a row; good None makes it a note."""
        verdict = NOTE if good is None else OK if good else FAILS
        self.certificate.rows.append(Property(name, value, verdict))
        return good is not False

    def normal(self, like: Tensor) -> Tensor:
        kind = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, generator=self.generator, dtype=kind).to(like)

    def run(self) -> OperatorCheck:
        y = self.measure()
        if y is None:
            return self.certificate
        examinations = {
            "rows independent": lambda: self.repetition(y),
            "linear": self.linearity,
            "differentiable": self.gradient,
        }
        operator = self.operator
        if isinstance(operator, LinearOperator):
            examinations |= {
                "adjoint": lambda: self.adjoint(operator, y),
                "svd": lambda: self.svd(operator, y),
                "solve": lambda: self.solve(operator, y),
                "pinv": lambda: self.pinv(operator, y),
            }
        self.attempt(examinations)
        self.scale(y)
        self.time()
        return self.certificate

    def attempt(self, examinations: dict[str, Callable[[], None]]) -> None:
        """Run each that the others and the time allow; one that raises fails the row of its name."""
        for name, examine in examinations.items():
            failed = [row.name for row in self.certificate.rows if row.verdict == FAILS]
            blamed = [need for need in NEEDS.get(name, ()) if need in failed]
            if blamed:
                self.add(name, None, f"not examined: '{blamed[0]}' fails")
                continue
            now = time.perf_counter()
            end = self.begin + self.seconds
            if now + CALLS.get(name, 1) * self.one_call > end:
                self.add(name, None, self._late(f"a call takes {self.one_call:.2g} s"))
                continue
            count = _Deadline(end)
            try:
                with counted_solves(count):
                    examine()
            except _OutOfTimeError:
                work = (
                    f"{count.iterations} iterations of conjugate gradients took {end - now:.2g} s"
                )
                self.add(name, None, self._late(work))
            except Exception as error:
                self.add(name, False, f"raises {numbers.brief(error)}")

    def _late(self, why: str) -> str:
        return f"not examined: a check takes at most {self.seconds:g} s, and {why}"

    def measure(self) -> Tensor | None:
        """Find a precision in which the operator runs; None where no further question makes sense."""
        # Values that float32 cannot hold, so that an operator which rounds to it gives itself away.
        x, reason = self.x.double(), ""
        x = x * (1 - 1e-9 * torch.rand(x.shape, generator=self.generator).to(x))
        try:
            y = self._timed_call(x)
        except Exception as error:
            reason = numbers.brief(error)
            x = self.x.float()
            try:
                y = self._timed_call(x)
            except Exception as error:
                return self._only_single_rows(x, error)
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
            got = f"a tensor {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            fix = f"the first axis must stay {len(x)}"
            self.add("runs", False, f"{tuple(x.shape)} gave {got}; {fix}")
            return None
        self.x = x
        dtype = str(y.dtype).removeprefix("torch.")
        self.add("runs", True, f"{tuple(x.shape[1:])} -> {tuple(y.shape[1:])}, {dtype}")
        y = y.detach()
        if not self.add("finite", *numbers.finite(y)):
            return None
        if x.dtype == torch.float32:
            self.tolerance = 1e-4
            self.add("precision", None, f"float32 only; float64 raises {reason}")
        elif numbers.rounded(y) > 0.01:
            self.tolerance = 1e-4
            self.add("precision", None, "float32 inside, whatever x is")
        else:
            self.add("precision", True, "float64")
        return y

    def _timed_call(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        y = self.operator(x.clone())
        self.one_call = time.perf_counter() - start
        return y

    def _only_single_rows(self, x: Tensor, error: Exception) -> None:
        try:
            y = self.operator(x[:1].clone())
        except Exception:
            self.add("runs", False, f"raises {numbers.brief(error)}")
        else:
            self.add("runs", True, "one sample at a time")
            self.add("finite", *numbers.finite(y))
            self.add(
                "rows independent", False, f"a batch of {len(x)} raises {numbers.brief(error)}"
            )

    def repetition(self, y: Tensor) -> None:
        x = self.x.clone()
        again = self.operator(x).detach()
        changed = not torch.equal(x, self.x)
        self.add("input unchanged", not changed, "x is changed in place" if changed else "yes")
        self.add("deterministic", *numbers.difference(again, y, 0.1 * self.tolerance))
        alone = torch.cat([self.operator(row.clone()[None]).detach() for row in self.x])
        # Another companion: rows that share a quantity may still agree on the batch itself.
        crowd = self.operator(torch.cat([self.x, self.x.flip(0) * 0.5 + 0.1])).detach()[: len(y)]
        worst = max(((alone, y), (crowd, y)), key=lambda pair: numbers.relative(*pair))
        self.add("rows independent", *numbers.difference(*worst, self.tolerance))
        x = self.x.clone()
        if self.operator(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            self.add("own memory", None, "y shares the memory of x")

    def linearity(self) -> None:
        declared = isinstance(self.operator, LinearOperator)
        u, v = self.x, self.normal(self.x)
        try:
            image_u, image_v = self.operator(u).detach(), self.operator(v).detach()
            combined = self.operator(0.7 * u - 1.3 * v).detach()
        except Exception as error:  # a nonlinear operator may refuse values beyond the data
            self.add("linear", False if declared else None, f"raises {numbers.brief(error)}")
            return
        defect = norm(combined - 0.7 * image_u + 1.3 * image_v)
        error = numbers.ratio(defect, norm(image_u) + norm(image_v)).max().item()
        linear = error <= self.tolerance
        if declared:
            self.add("linear", linear, f"relative defect {error:.1e}")
        elif linear:
            hint = "yes, but not declared: a LinearOperator has more and faster solvers"
            self.add("linear", None, hint)
        else:
            self.add("linear", True, f"no (relative defect {error:.1e})")

    def gradient(self) -> None:
        x = self.x.clone().requires_grad_()
        gradient = None
        try:
            y = self.operator(x)
            if y.grad_fn is not None:
                (gradient,) = torch.autograd.grad(y, x, self.normal(y.detach()))
        except Exception as error:
            self.add(
                "differentiable",
                not self.operator.differentiable,
                f"raises {numbers.brief(error)}",
            )
            return
        declared = self.operator.differentiable  # a callable knows only after its first call
        if gradient is None:
            fix = "; set differentiable = False, or remove detach and numpy" if declared else ""
            text = f"no, the gradient does not reach x{fix}"
        elif not bool(torch.isfinite(gradient).all()):
            text = "the gradient is not finite"
        elif not bool(gradient.any()):
            text = "the gradient is zero everywhere"
        elif declared:
            self.slope()
            return
        else:
            self.add("differentiable", None, "yes, but declared a black box")
            return
        self.add("differentiable", not declared, text)

    def slope(self) -> None:
        """Directional derivative: automatic against central differences."""
        x, direction = self.x.clone().requires_grad_(), self.normal(self.x)
        y = self.operator(x)
        weights = y.detach() / norm(y.detach()).max()
        automatic = inner(torch.autograd.grad(y, x, weights)[0], direction)
        step, limit = (1e-6, 1e-4) if self.tolerance < 1e-6 else (1e-2, 1e-2)
        move = step * direction
        with torch.no_grad():
            change = (self.operator(self.x + move) - self.operator(self.x - move)) / (2 * step)
        size = norm(change) * norm(weights)
        error = numbers.ratio((automatic - inner(weights, change)).abs(), size).max().item()
        text = f"relative to central differences {error:.1e}"
        if error <= limit:
            self.add("differentiable", True, text)
        else:
            self.add("differentiable", None, f"{text}: a surrogate or a rough gradient")

    def adjoint(self, operator: LinearOperator, y: Tensor) -> None:
        worst = 0.0
        u = self.normal(self.x)
        image = operator(u).detach()
        # A random v sees all of y; v = A u makes the products large, so that small errors show.
        for v in (self.normal(y), image):
            back = operator.adjoint(v)
            if back.shape != u.shape:
                shapes = f"has shape {tuple(back.shape[1:])} for x {tuple(u.shape[1:])}"
                self.add("adjoint", False, shapes)
                return
            error = numbers.ratio((inner(image, v) - inner(u, back)).abs(), norm(image) * norm(v))
            worst = max(worst, error.max().item())
        self.add("adjoint", worst <= self.tolerance, f"|<Au,v> - <u,A*v>| / |Au||v| = {worst:.1e}")

    def svd(self, operator: LinearOperator, y: Tensor) -> None:
        svd = operator.svd(self.x)
        if svd is None:
            self.add("svd", True, "none")
            return
        z = self.normal(svd.V_adjoint(self.x)) * (svd.s != 0)
        error = max(
            numbers.relative(svd.U(svd.s * svd.V_adjoint(self.x)), y),
            numbers.relative(svd.V_adjoint(svd.V(z)), z),
            numbers.relative(svd.U_adjoint(svd.U(z)), z),
        )
        low, high = svd.s.abs().min().item(), svd.s.abs().max().item()
        text = f"relative error {error:.1e}; singular values {low:.2g} to {high:.2g}"
        self.add("svd", error <= max(1e-6, self.tolerance), text)

    def solve(self, operator: LinearOperator, y: Tensor) -> None:
        ridge = 1e-2 * (norm(operator.adjoint(y)) / norm(y)).square().mean().item()
        solution = operator.solve(y, ridge)
        error = numbers.relative(operator(operator.adjoint(solution)) + ridge * solution, y)
        self.add("solve", error <= max(1e-5, self.tolerance), f"relative residual {error:.1e}")

    def pinv(self, operator: LinearOperator, y: Tensor) -> None:
        error = numbers.relative(operator(operator.pinv(y)), y)
        good = True if error <= max(1e-5, self.tolerance) else None
        self.add("pinv", good, f"|A A^+ A x - A x| / |A x| = {error:.1e}")

    def scale(self, y: Tensor) -> None:
        gain = numbers.ratio(norm(y), norm(self.x)).max().item()
        parts = torch.view_as_real(y) if y.is_complex() else y
        span = f"values {parts.min():.3g} to {parts.max():.3g}"
        self.add("scale", True, f"|A x| / |x| = {gain:.3g}; {span}")

    def time(self) -> None:
        if self.one_call > self.seconds / 4:
            self.add("time", True, f"{1e3 * self.one_call / len(self.x):.3g} ms per sample")
            return
        start = time.perf_counter()
        with torch.no_grad():
            self.operator(self.x).sum().item()
        milliseconds = 1e3 * (time.perf_counter() - start) / len(self.x)
        self.add("time", True, f"{milliseconds:.3g} ms per sample")


__getattr__ = old_names(__name__)
